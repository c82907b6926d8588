"""Flipped bits in every file of a Core AI bundle: each is found or refused, also where the hashes are made to match;
what Apple's runtime does in its own process is a finding here."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.app import facts
from app_bridge.validation import check_assets
from app_bridge.validation.validate import validate
from fastvlm.common import findings
from fastvlm.common.errors import CheckFailed, UserError
from model_export.coreai.process import Runtime
from tests.app_bridge import broken
from tests.app_bridge.validation.remembering import remembering
from tests.helpers import contents

pytestmark = pytest.mark.slow

PROGRAM = "embed.aimodel"  # of three that would take as long each
EACH = 8  # flips of each file


def flipped(raw: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(raw))
    return raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :]


def outcome(folder: Path) -> str:
    """ "found", "refused", or "passed"; any other exception is the test's."""
    try:
        found = validate(folder, facts.table())
    except (UserError, CheckFailed) as error:
        assert "\n" not in str(error)
        return "refused"
    return "found" if findings.errors(found) else "passed"


def test_a_flipped_bit_is_found_or_refused(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_assets, "Runtime", remembering())
    assert outcome(demo_bundle) == "passed"
    draw, count = random.Random(18), 0
    for name in sorted(contents(demo_bundle)):
        for number in range(EACH):
            folder = broken.linked(demo_bundle, tmp_path / f"{count}")
            broken.in_text(name, lambda raw: flipped(raw, draw))(folder)
            assert outcome(folder) in ("found", "refused"), (name, number)
            count += 1
    assert count == 15 * EACH


@pytest.mark.parametrize(
    "name", ["metadata.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "NOTICE"]
)
def test_without_a_manifest_a_flipped_bit_ends_in_no_other_exception(
    name: str, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_assets, "Runtime", remembering())
    draw, seen = random.Random(name), []
    for number in range(12):
        folder = broken.linked(demo_bundle, tmp_path / f"{number}")
        broken.gone("export.json")(folder)
        broken.in_text(name, lambda raw: flipped(raw, draw))(folder)
        seen.append(outcome(folder))
    assert name == "NOTICE" or "found" in seen


def matching(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other bytes in a program, with their own hash beside them."""

    def both(folder: Path) -> None:
        raw = change((folder / PROGRAM / "main.mlirb").read_bytes())
        broken.replace(folder / PROGRAM / "main.mlirb", raw)
        broken.replace(folder / PROGRAM / "main.hash", hashlib.sha256(raw).digest())

    return both


CRASHES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "random": lambda raw: random.Random(1).randbytes(5000),
    "bit 1": lambda raw: flipped(raw[:4000], random.Random(1)) + raw[4000:],
    "bit 2": lambda raw: flipped(raw[:4000], random.Random(2)) + raw[4000:],
    "last bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
}


@pytest.mark.parametrize("name", CRASHES)
def test_what_apples_runtime_does_with_it_is_a_finding(
    name: str, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash matches: the child may crash or take it; the others are still looked at."""
    sound, whole = remembering()(), (demo_bundle / PROGRAM / "main.mlirb").read_bytes()

    class Real:
        """The broken program alone in a child process."""

        def load(self, role: str, asset: Path, function: str = "main") -> Any:
            if (asset / "main.mlirb").read_bytes() == (demo_bundle / asset.name / "main.mlirb").read_bytes():
                return sound.load(role, asset, function)
            runtime = Runtime()
            try:
                return runtime.load(role, asset, function)
            finally:
                runtime.close()

    monkeypatch.setattr(check_assets, "Runtime", Real)
    folder = broken.linked(demo_bundle, tmp_path / "bundle")
    matching(CRASHES[name])(folder)
    assert (folder / PROGRAM / "main.mlirb").read_bytes() != whole
    broken.signed(folder)
    rules = {rule for rule, _ in broken.rules(folder, facts.table())}
    if name in ("truncated", "empty", "random"):
        assert rules <= {"asset-crashes", "asset-refused"} and rules
    vision = broken.in_json("metadata.json", lambda document: document["vision"].update(rescale_factor=0.5))
    vision(folder)
    broken.signed(folder)
    assert {rule for rule, _ in broken.rules(folder, facts.table())} == rules | {"rescale-factor"}
