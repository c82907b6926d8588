"""One file over HTTP from a local server that drops, stalls, ignores ranges, lies about lengths and changes files."""

import random
import socket
from pathlib import Path

import pytest
from download_server import CONTENT, FILE, NAME, ONCE, QUICK, WEIGHTS, Act, Server, assert_whole, get, make_zip

from fastvlm.common.errors import UserError
from fastvlm.download import fetch, unpack

pytest_plugins = ["download_server"]
DATE = {"Last-Modified": "Sat, 21 Nov 2026 07:00:00 GMT"}
DROPPED = Act(drop=100_000)
# How the server answers in turn, and the ranges that it is asked for.
GOES_ON: dict[str, tuple[list[Act], list[str]]] = {
    "dropped twice": ([DROPPED, Act(drop=50_000), Act()], ["", "bytes=100000-", "bytes=150000-"]),
    "ten drops, three retries": (
        [*(Act(drop=20_000) for _ in range(10)), Act()], ["", *(f"bytes={20_000 * n}-" for n in range(1, 11))]
    ),
    "no ranges": (
        [DROPPED, Act(ranges=False, drop=150_000), Act(ranges=False)], ["", "bytes=100000-", "bytes=150000-"]
    ),
    "no ETag": ([Act(drop=100_000, etag=False), Act(etag=False)], ["", ""]),
    "a weak ETag": ([Act(drop=100_000, etag=False, headers={"ETag": 'W/"x"'}), Act(etag=False)], ["", ""]),
    "an ETag of no use": ([Act(drop=70_000, etag=False, headers={"ETag": "\u00e9"}), Act()], ["", ""]),
    "a date": (
        [Act(drop=100_000, etag=False, headers=DATE), Act(etag=False, headers=DATE, if_range=False)],
        ["", "bytes=100000-"],
    ),
    "server errors": ([Act(status=500), Act(status=503), Act(status=429), Act()], [""] * 4),
    "redirects": ([Act(status=302, location=FILE), DROPPED, Act(status=307, location=FILE), Act()],
                  ["", "", "bytes=100000-", "bytes=100000-"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOES_ON)
def test_goes_on_until_it_is_whole(zoo: Server, tmp_path: Path, kind: str) -> None:
    zoo.acts[FILE], ranges = GOES_ON[kind]
    get(tmp_path)
    assert zoo.ranges() == ranges
    assert_whole(tmp_path)


def test_goes_on_in_the_next_run(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(drop=70_000)]
    with pytest.raises(UserError, match=r"connection lost .* 70 kB received\); run it again to go on"):
        get(tmp_path, ONCE)
    assert not (tmp_path / NAME).exists() and (tmp_path / f"{NAME}.partial" / "part").stat().st_size == 70_000
    zoo.acts[FILE] = []
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=70000-"]
    assert_whole(tmp_path)


def test_stalled_connection_is_dropped(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(drop=60_000, stall=600.0), Act()]
    get(tmp_path, fetch.Retries(waits=(0.01,) * 9, timeout=1.0))
    # On a machine that stands still the second attempt may stall too: more may follow.
    assert zoo.ranges()[:2] == ["", "bytes=60000-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("weights", [random.Random(1).randbytes(290_000), WEIGHTS[::-1]], ids=["length", "bytes alone"])
@pytest.mark.parametrize(
    "second", [Act(), Act(if_range=False), Act(ranges=False)], ids=["", "no If-Range", "no ranges"]
)
def test_file_that_changes_between_attempts(zoo: Server, tmp_path: Path, second: Act, weights: bytes) -> None:
    changed = {**CONTENT, "model.safetensors": weights}
    zoo.acts[FILE] = [DROPPED]
    with pytest.raises(UserError):
        get(tmp_path, ONCE)
    zoo.acts[FILE], zoo.files[FILE] = [second, Act()], make_zip(changed)
    get(tmp_path)
    assert zoo.ranges()[1] == "bytes=100000-"
    assert_whole(tmp_path, content=changed)


@pytest.mark.parametrize("ranges", [True, False])
def test_whole_archive_is_not_sent_again(zoo: Server, tmp_path: Path, ranges: bool) -> None:
    def full(folder: Path, size: int) -> None:
        raise fetch.DiskFull("full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(fetch.DiskFull):
        patch.setattr(unpack, "need_disk", full)
        get(tmp_path)
    zoo.acts[FILE] = [Act(ranges=ranges, drop=0 if not ranges else None)]  # a body would be missed
    get(tmp_path)
    assert zoo.ranges() == ["", f"bytes={len(zoo.files[FILE])}-"]
    assert_whole(tmp_path)


# How the server answers, what is said, and how many requests that takes (None: all that are allowed).
REFUSED: dict[str, tuple[Act, str, int | None]] = {
    "no length": (Act(length=False), "gives no length", 1),
    "a length that is none": (Act(length=False, headers={"Content-Length": "\u00b2"}), "received", None),
    "an endless length": (Act(length=False, headers={"Content-Length": "9" * 5000}), "received", None),
    "compressed": (Act(headers={"Content-Encoding": "gzip"}), "compressed", 1),
    "404": (Act(status=404), "404", 1),
    "204": (Act(status=204), "204", 1),
    "403": (Act(status=403), "403", 1),
    "503": (Act(status=503), "503.*4 fruitless attempts", None),
    "a part unasked": (Act(status=206), "HTTP 206.*4 fruitless attempts", None),
    "no part unasked": (Act(status=416), "HTTP 416.*4 fruitless attempts", None),
    "a lying range": (Act(status=206, headers={"Content-Range": f"bytes 0-5/{'9' * 5000}"}), "HTTP 206", None),
    "to a file": (Act(status=302, location="file:///etc/passwd"), "expected an https address", 1),
    "to FTP": (Act(status=302, location="ftp://127.0.0.1/x"), "expected an https address", 1),
    "to no address": (Act(status=302, location="http://[::1"), "received", None),
    "to itself": (Act(status=302, location=FILE), "redirects", 21),
    "too short": (Act(announce=-1000), "broken archive", 1),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_nothing_left(zoo: Server, tmp_path: Path, kind: str) -> None:
    zoo.acts[FILE], message, requests = [REFUSED[kind][0]], *REFUSED[kind][1:]
    with pytest.raises(UserError, match=message) as caught:
        get(tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    assert len(zoo.requests) == (1 + len(QUICK.waits) if requests is None else requests)


def test_a_length_too_long_ends(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(announce=1000)]
    with pytest.raises(UserError, match=r"connection lost|changed on the server"):
        get(tmp_path)
    assert not (tmp_path / NAME).exists() and len(zoo.requests) <= 2 * (1 + len(QUICK.waits))


def test_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FASTVLM_ZOO_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match=r"refused.*4 fruitless attempts"):
            get(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_secrets_stay_with_their_host(zoo: Server, tmp_path: Path) -> None:
    other = Server()
    other.files["/elsewhere"] = zoo.files[FILE]
    zoo.acts[FILE] = [Act(status=307, location=other.url + "/elsewhere")]
    fetch.fetch(zoo.url + FILE, tmp_path / "got", QUICK, headers={"Authorization": "Bearer s3cret"})
    other.close()
    assert (tmp_path / "got").read_bytes() == zoo.files[FILE]
    assert [[one.get("authorization") for one in server.requests] for server in (zoo, other)] == [
        ["Bearer s3cret"],
        [None],
    ]
