"""One file over HTTP from a local server that drops, stalls, ignores ranges, lies about lengths and changes files."""

import random
import socket
import time
from pathlib import Path

import pytest
from download_server import CONTENT, FILE, NAME, ONCE, QUICK, WEIGHTS, Act, Server, assert_whole, get, make_zip

from fastvlm.common.errors import UserError
from fastvlm.download import fetch, unpack

pytest_plugins = ["download_server"]


@pytest.mark.parametrize("reset", [False, True])
def test_goes_on_where_a_connection_dropped(zoo: Server, tmp_path: Path, reset: bool) -> None:
    zoo.acts[FILE] = [Act(drop=100_000, reset=reset), Act(drop=50_000, reset=reset), Act()]
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=100000-", "bytes=150000-"]
    assert all(request.get("if-range", "").startswith('"') for request in zoo.requests[1:])
    assert_whole(tmp_path)


def test_goes_on_in_the_next_run(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(drop=70_000)]
    with pytest.raises(UserError, match=r"connection closed after 70000 of \d+ bytes .*run it again to go on"):
        get(tmp_path, ONCE)
    assert not (tmp_path / NAME).exists() and (tmp_path / f"{NAME}.partial" / "part").stat().st_size == 70_000
    zoo.acts[FILE] = []
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=70000-"]
    assert_whole(tmp_path)


def test_progress_counts_failures_anew(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [*(Act(drop=20_000) for _ in range(10)), Act()]  # ten drops, three retries
    get(tmp_path)
    assert len(zoo.requests) == 11
    assert_whole(tmp_path)


def test_stalled_connection_is_dropped(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(drop=60_000, stall=600.0), Act()]
    began = time.monotonic()
    get(tmp_path, fetch.Retries(waits=(0.01,) * 9, timeout=2.0))
    # On a machine that stands still the second attempt may stall too: more may follow.
    assert zoo.ranges()[:2] == ["", "bytes=60000-"] and time.monotonic() - began < 300
    assert_whole(tmp_path)


def test_server_without_ranges(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(drop=100_000), Act(ranges=False, drop=150_000), Act(ranges=False)]
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=100000-", "bytes=150000-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("second", [Act(), Act(if_range=False), Act(ranges=False)])
def test_file_that_changes_between_attempts(zoo: Server, tmp_path: Path, second: Act) -> None:
    changed = {**CONTENT, "model.safetensors": random.Random(1).randbytes(290_000)}
    zoo.acts[FILE] = [Act(drop=100_000)]
    with pytest.raises(UserError):
        get(tmp_path, ONCE)
    zoo.acts[FILE], zoo.files[FILE] = [second], make_zip(changed)
    zoo.acts[FILE] = [second, Act()] if not second.if_range else [second]
    get(tmp_path)
    assert zoo.ranges()[1] == "bytes=100000-"
    assert_whole(tmp_path, content=changed)


def test_same_length_change_with_a_server_that_ignores_if_range(zoo: Server, tmp_path: Path) -> None:
    changed = {**CONTENT, "model.safetensors": WEIGHTS[::-1]}
    zoo.files[FILE] = make_zip(CONTENT)
    zoo.acts[FILE] = [Act(drop=100_000), Act(if_range=False), Act()]
    before = len(zoo.files[FILE])
    with pytest.raises(UserError):
        get(tmp_path, ONCE)
    zoo.files[FILE] = make_zip(changed)
    assert len(zoo.files[FILE]) == before
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=100000-", ""]
    assert_whole(tmp_path, content=changed)


@pytest.mark.parametrize("tag", [{}, {"ETag": 'W/"weak"'}])
def test_no_validator_means_no_going_on(zoo: Server, tmp_path: Path, tag: dict[str, str]) -> None:
    zoo.acts[FILE] = [Act(drop=100_000, etag=False, headers=tag), Act(etag=False, headers=tag)]
    get(tmp_path)
    assert zoo.ranges() == ["", ""]
    assert_whole(tmp_path)


def test_last_modified_serves_where_there_is_no_etag(zoo: Server, tmp_path: Path) -> None:
    date = {"Last-Modified": "Sat, 21 Nov 2026 07:00:00 GMT"}
    zoo.acts[FILE] = [Act(drop=100_000, etag=False, headers=date), Act(etag=False, headers=date, if_range=False)]
    get(tmp_path)
    assert zoo.ranges() == ["", "bytes=100000-"] and zoo.requests[1]["if-range"] == date["Last-Modified"]
    assert_whole(tmp_path)


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


def test_length_announced_too_long(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(announce=1000)]
    with pytest.raises(UserError, match=r"changed on the server|connection closed after"):
        get(tmp_path)
    assert not (tmp_path / NAME).exists() and len(zoo.requests) <= 2 * (1 + len(QUICK.waits))


def test_length_announced_too_short(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(announce=-1000)]
    with pytest.raises(UserError, match="broken archive"):
        get(tmp_path)
    assert list(tmp_path.iterdir()) == [], "bytes that can't be gone on from are removed"


@pytest.mark.parametrize(("act", "message"), [
    (Act(length=False), "gives no length"),
    (Act(headers={"Content-Encoding": "gzip"}), "compressed"),
    (Act(status=404), "404"),
    (Act(status=403), "403"),
    (Act(status=302, location="file:///etc/passwd"), "302|redirects to file"),
    (Act(status=302, location="ftp://127.0.0.1/x"), "redirects to ftp"),
])  # fmt: skip
def test_refused_at_once_with_nothing_left(zoo: Server, tmp_path: Path, act: Act, message: str) -> None:
    zoo.acts[FILE] = [act]
    with pytest.raises(UserError, match=message):
        get(tmp_path)
    assert len(zoo.requests) == 1 and list(tmp_path.iterdir()) == []


def test_server_errors_are_tried_again_a_few_times(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(status=500), Act(status=503), Act(status=429), Act()]
    get(tmp_path)
    assert_whole(tmp_path)
    zoo.acts[FILE] = [Act(status=503)]
    zoo.requests.clear()
    with pytest.raises(UserError, match=r"503.*4 fruitless attempts"):
        get(tmp_path / "other")
    assert len(zoo.requests) == 1 + len(QUICK.waits)


@pytest.mark.parametrize("status", [206, 416])
def test_parts_that_nobody_asked_for(zoo: Server, tmp_path: Path, status: int) -> None:
    zoo.acts[FILE] = [Act(status=status)]
    with pytest.raises(UserError, match=f"HTTP {status}.*4 fruitless attempts"):
        get(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("FASTVLM_ZOO_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(UserError, match=r"refused.*4 fruitless attempts"):
            get(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_redirects_keep_the_range_and_guard_secrets(zoo: Server, tmp_path: Path) -> None:
    other = Server()
    other.files["/elsewhere"], other.acts["/elsewhere"] = zoo.files[FILE], [Act(drop=100_000), Act()]
    zoo.acts["/old"] = [Act(status=302, location=FILE)]
    zoo.acts[FILE] = [Act(status=307, location=other.url + "/elsewhere")]
    fetch.fetch(zoo.url + "/old", tmp_path / "got", QUICK, secrets={"Authorization": "Bearer s3cret"})
    other.close()
    assert (tmp_path / "got").read_bytes() == zoo.files[FILE]
    assert other.ranges("/elsewhere") == ["", "bytes=100000-"]
    assert all(request.get("authorization") == "Bearer s3cret" for request in zoo.requests) and len(zoo.requests) == 4
    assert all("authorization" not in request for request in other.requests)


def test_endless_redirects_end(zoo: Server, tmp_path: Path) -> None:
    zoo.acts[FILE] = [Act(status=302, location=FILE)]
    with pytest.raises(UserError, match="302"):
        get(tmp_path)
    assert len(zoo.requests) < 20


@pytest.mark.parametrize(
    "act",
    [
        Act(length=False, headers={"Content-Length": "\u00b2"}),
        Act(length=False, headers={"Content-Length": "9" * 5000}),
        Act(length=False, headers={"Content-Length": "-5"}),
        Act(status=206, headers={"Content-Range": f"bytes 0-5/{'9' * 5000}"}),
        Act(status=206, headers={"Content-Range": "bytes 5-9/10"}),
        Act(status=204),
        Act(status=301, location="http://[::1"),
        Act(status=301, location="http://127.0.0.1:port/"),
        Act(status=301, location="http://h/\u00e9"),
        Act(status=301, location="file:///etc/passwd"),
        Act(status=301, location="/a b\tc"),
        Act(headers={"Content-Encoding": "gzip"}),
        Act(headers={f"X-{n}": "x" for n in range(200)}),
        Act(headers={"X": "x" * 100_000}),
    ],
    ids=lambda act: f"{act.status}-{act.location or ''.join(act.headers)[:20]}",
)
def test_a_lying_answer_is_one_line(zoo: Server, tmp_path: Path, act: Act) -> None:
    zoo.acts[FILE] = [act]
    with pytest.raises(UserError) as caught:
        get(tmp_path, ONCE)
    assert "\n" not in str(caught.value) and not (tmp_path / NAME).exists()


@pytest.mark.parametrize("etag", ["\u00e9\u00e8", "x" * 5000, "a\n b"])
def test_a_validator_that_cannot_be_sent_back_is_none(zoo: Server, tmp_path: Path, etag: str) -> None:
    zoo.acts[FILE] = [Act(drop=70_000, headers={"ETag": etag}), Act()]
    get(tmp_path)
    assert_whole(tmp_path)


class Endless:
    """A body of chunks that claim a negative size: each read gives more than was asked for."""

    def read1(self, count: int) -> bytes:
        return b"x" * (count + 7)


def test_no_more_is_taken_than_was_announced() -> None:
    assert sum(map(len, fetch.body(Endless(), 3 * fetch.CHUNK + 1))) == 3 * fetch.CHUNK + 1
