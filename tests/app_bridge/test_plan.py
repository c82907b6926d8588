"""`plan`: sizes against the artefact's files, verdicts, exit codes, and the table of limits."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app_bridge.memory import plan, report
from app_bridge.memory.model import MIB
from app_bridge.memory.plan import FITS, NOT, TIGHT, Limit
from benchmarks.estimate.estimate import devices, estimate, facts
from fastvlm.common.arguments import Parser
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from fastvlm.synthetic.checkpoint import SHAPES
from quantization.recipe import load_recipe

Run = Callable[..., tuple[int, str, str]]


def build() -> argparse.ArgumentParser:
    parser = Parser(prog="test")
    plan.add_parser(parser.add_subparsers(required=True))
    return parser


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = run(build, ["plan", *map(str, arguments)])
        except SystemExit as error:  # argparse's own refusals
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def document(command: Run, *arguments: object) -> tuple[int, dict[str, Any]]:
    code, out, _ = command(*arguments, "--json")
    return code, json.loads(out.splitlines()[-1])


def parts(found: dict[str, Any]) -> dict[str, int]:
    return {part["name"]: part["high"] for part in found["parts"]}


def test_an_artefacts_sizes_are_its_files(command: Run, app_artefact: Path) -> None:
    code, found = document(command, app_artefact, "--device", "iphone-15-pro")
    assert code == 0
    assert found["passed"]
    for part, name in (("language model", "model"), ("projector", "multi_modal_projector")):
        stored = (value.nbytes for value in load_file(app_artefact / f"{name}.safetensors").values())
        assert parts(found)[part] == sum(stored)
    weights = app_artefact / "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert parts(found)["encoder"] == weights.stat().st_size
    assert (found["picture_tokens"], found["prompt_tokens"]) == (256, 18)
    assert found["need"]["high"] == sum(parts(found).values())


def test_what_is_planned_is_what_an_export_writes(app_artefact: Path) -> None:
    stored, shape = plan.stored(app_artefact)
    planned = plan.sized(SHAPES["app"], load_recipe("fp16"))
    same = (
        "language",
        "projector",
        "sizes",
        "features",
        "itemsize",
        "encoder_itemsize",
        "quantized",
        "image_size",
        "picture_tokens",
    )
    assert all(getattr(stored, name) == getattr(planned, name) for name in same)
    assert replace(shape, vision_args=None) == replace(SHAPES["app"], vision_args=None, published_ids=True)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1, 10, FITS), (1, 11, TIGHT), (20, 30, TIGHT), (21, 30, NOT), (10, 10, FITS)]
)
def test_verdicts(low: int, high: int, verdict: str) -> None:
    assert Limit(10, 20, ()).verdict(low, high) == verdict


def test_a_model_that_does_not_fit_names_the_largest_that_does(command: Run) -> None:
    code, found = document(command, "--shape", "1.5b", "--recipe", "fp16", "--device", "iphone-12")
    assert code == 1
    assert not found["passed"]
    limit = found["limits"]["increased"]["low"]
    best, in_app = found["largest"], found["largest_in_app"]
    assert best["high"] <= limit
    assert in_app["high"] <= limit
    assert "demo app" in in_app["loads_in"]
    assert best["high"] >= in_app["high"]
    code, again = document(command, "--shape", "1.5b", "--recipe", in_app["recipe"], "--device", "iphone-12")
    assert (code, again["need"]["high"]) == (0, in_app["high"])
    larger = [one for one, _ in plan.candidates(SHAPES["1.5b"])]
    names = [one["name"] for one in larger]
    before = names[names.index(best["recipe"]) - 1]
    assert document(command, "--shape", "1.5b", "--recipe", before, "--device", "iphone-12")[0] == 1


def test_no_recipe_fits(command: Run) -> None:
    code, found = document(command, "--shape", "7b", "--device", "iphone-12")
    assert code == 1
    assert found["largest"] is None
    assert found["largest_in_app"] is None
    assert "No named recipe" in command("--shape", "7b", "--device", "iphone-12")[1]


def test_the_entitlement_decides(command: Run) -> None:
    code, found = document(command, "--shape", "7b", "--recipe", "int4", "--device", "iphone-16-pro")
    assert code == 0
    assert found["limits"]["increased"]["verdict"] == FITS
    assert found["limits"]["default"]["verdict"] == NOT
    said = " ".join(command("--shape", "7b", "--recipe", "int4", "--device", "iphone-16-pro")[1].split())
    assert "fits (the published app has the entitlement); without it does not fit" in said


def test_a_given_limit_takes_any_device(command: Run) -> None:
    assert document(command, "--shape", "0.5b", "--limit", "3.0GB")[0] == 0
    code, found = document(command, "--shape", "0.5b", "--limit", "1GiB", "--device", "vision-pro")
    assert code == 1
    started = next(part["low"] for part in found["parts"] if part["name"] == "app")
    assert found["limits"]["default"]["low"] == found["limits"]["increased"]["high"] == 1024 * MIB + started
    assert started == 95 * MIB  # what was given is what was left beside it
    said = command("--shape", "0.5b", "--limit", "1GiB")[1]
    assert "1.07 GB as you measured it, and 99.6 MB that the app itself has at its start" in said


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("iphone-15-pro-max", "iphone-15-pro"), ("iPhone 14 Pro Max", "iphone-14-pro"),
        ("IPHONE15PRO", "iphone-15-pro"), ("iphone-13-mini", "iphone-13"), ("iPhone 16 Plus", "iphone-16"),
        ("M4 Pro", "m4-pro"), ("m4pro", "m4-pro"),
        ("Apple M1 Max", "m1-max"), ("MacBook Pro M4", "m4"), ("Mac with M2 Ultra", "m2-ultra"),
        ("MacBook Air (M2)", "m2"), ("iPad Air (M2)", "ipad-pro-m2"), ("iPad Pro M4", "ipad-pro-m4"),
    ],
)  # fmt: skip
def test_a_device_by_its_other_names(command: Run, name: str, key: str) -> None:
    assert document(command, "--shape", "0.5b", "--device", name)[1]["device"] == key
    assert estimate("0.5b", name)["device"] == key  # one function


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("iPhone 13 Max", "iphone-13"),
        ("iphone-16e", "iphone-16"),
        ("M6 Pro", "m4-pro"),
        ("ipad pro 11 m4", "ipad-pro-m4"),
    ],
)
def test_the_nearest_device_is_named(command: Run, name: str, nearest: str) -> None:
    code, _, err = command("--shape", "0.5b", "--device", name)
    assert code == 2 and f"--device {name}: unknown (is " in err and nearest in err.partition(" meant?)")[0]
    with pytest.raises(UserError, match=" meant"):
        estimate("0.5b", name)


def test_aliases_are_of_one_device_that_says_so() -> None:
    entries = facts("devices.json")["devices"]
    aliases = [(alias, entry) for entry in entries.values() for alias in entry.get("aliases", ())]
    assert len({alias for alias, _ in aliases}) == len(aliases) > 5
    for alias, entry in aliases:
        assert alias not in entries
        assert all(word in entry["name"].lower() for word in alias.split("-")), alias


def test_memory_chooses_among_the_sizes_sold(command: Run) -> None:
    small, large = (document(command, "--shape", "7b", "--device", "m1", *more)[1] for more in ([], ["--memory", "16"]))
    assert (small["memory_gb"], large["memory_gb"]) == (8, 16)
    assert small["limits"]["default"]["low"] < large["limits"]["default"]["low"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "neither"),
        (("--shape", "9b", "--device", "m1"), "--shape 9b: expected one of 0.5b, 1.5b, 7b"),
        (("x", "--shape", "0.5b", "--device", "m1"), "got both"),
        (("x", "--recipe", "int4", "--device", "m1"), "an artefact has its own"),
        (("--shape", "0.5b"), "--device or --limit is missing"),
        (("--shape", "0.5b", "--device", "pixel-9"), "unknown; expected one of m1,"),
        (("--shape", "0.5b", "--device", "pixel-9"), "--limit 3.0GB"),
        (("--shape", "0.5b", "--device", "ipad-pro-m5"), "is not known: measure os_proc_available_memory()"),
        (("--shape", "0.5b", "--device", "m1", "--memory", "12"), "sold with 8 or 16 GB"),
        (("--shape", "0.5b", "--memory", "8", "--limit", "3GB"), "--memory: expected with --device"),
        (("--shape", "0.5b", "--limit", "3"), "expected a size such as"),
        (("--shape", "0.5b", "--limit", "0GB"), "expected a size such as"),
        (("--shape", "0.5b", "--limit", "0.0000000001MB"), "expected a size such as"),
        (("--shape", "0.5b", "--limit", "9" * 400 + "GB"), "expected a size such as"),
        (("--shape", "0.5b", "--device", "m1", "--recipe", "int7"), "unknown recipe 'int7'"),
        (("--shape", "0.5b", "--device", "m1", "--recipe", "fit"), "say how large"),
        (("--shape", "0.5b", "--device", "m1", "--prompt-length", "-1"), "expected 0 to 2048"),
        (("--shape", "0.5b", "--device", "m1", "--prompt-length", "many"), "got many, expected a whole number"),
        (("--shape", "0.5b", "--measure"), "--measure: expected with an ARTEFACT"),
        (("x", "--measure", "--device", "m1"), "it runs on this machine"),
        (("--table", "--device", "m1"), "leave out device"),
        (("/nowhere", "--device", "m1"), "no such folder"),
    ],
)
def test_refusals_are_one_line(command: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err + out


def test_every_fault_at_once(command: Run) -> None:
    _, _, err = command("--shape", "9b", "--memory", "8", "--prompt-length", "9999")
    assert all(said in err for said in ("--shape 9b", "--memory", "--prompt-length 9999", "--device or --limit"))


def _resave(artefact: Path, name: str, text: bytes) -> None:
    """Put other bytes into a file, and their size into the manifest."""
    path = artefact / "export.json"
    found = json.loads(path.read_text())
    found["files"][name]["size"] = len(text)
    path.write_text(json.dumps(found))
    (artefact / name).unlink()
    (artefact / name).write_bytes(text)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace(b'"hidden_size": 64', b'"hidden_size": 62')),
        ("config.json", lambda text: text.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 0')),
        ("config.json", lambda text: b"\xff\xfe"),
        ("model.safetensors", lambda text: text[:100]),
        ("multi_modal_projector.safetensors", lambda text: b""),
    ],
)
def test_an_unusable_artefact_is_refused(
    command: Run, app_artefact: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    copy = shutil.copytree(app_artefact, tmp_path / "copy")
    before = (copy / name).read_bytes()
    _resave(copy, name, change(before))
    assert (copy / name).read_bytes() != before
    code, out, err = command(copy, "--device", "m1")
    assert (code, err.count("\n")) == (2, 1)
    assert "Traceback" not in out + err


def test_an_artefact_of_another_layout_or_half_is_refused(command: Run, app_artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(app_artefact, tmp_path / "copy")
    whole = json.loads((copy / "export.json").read_text())
    for change, said in (
        ({"config": {**whole["config"], "layout": "mlx-vlm"}}, "layout mlx-vlm"),
        ({"config": {}}, "layout None"),
        ({"config": None}, "config is no object"),
        ({"parts": ["llm"]}, "only part of a model"),
        ({"image": {}}, "no image.image_size"),
    ):
        (copy / "export.json").write_text(json.dumps(whole | change))
        code, _, err = command(copy, "--device", "m1")
        assert code == 2
        assert said in err
    (copy / "model.safetensors").unlink()
    assert command(copy, "--device", "m1")[0] == 2


def test_every_device_has_a_sourced_limit_or_asks() -> None:
    sources, unknown = plan.limits()["sources"], set()
    for device in devices().values():
        for memory in device.memory_gb:
            limits = plan.limits_of(device, memory)
            if not limits:
                unknown.add((device.key, memory))
                continue
            for limit in limits.values():
                assert 0 < limit.low <= limit.high <= memory * 1024 * MIB
                assert limit.sources
                assert set(limit.sources) <= set(sources)
            assert limits["default"].high <= limits["increased"].high
    assert unknown == {("ipad-pro-m5", 12)}


def test_every_source_says_something_and_is_used() -> None:
    text = json.dumps({key: value for key, value in plan.limits().items() if key != "sources"})
    for name, source in plan.limits()["sources"].items():
        assert source["url"].startswith("http")
        assert source["says"]
        assert f'"{name}"' in text
    assert set(plan.limits()["devices"]) <= set(devices())
    unconfirmed = {name for name, source in plan.limits()["sources"].items() if "not confirmed" in source["says"]}
    assert unconfirmed == {"examples-359", "nx2apple", "macotakara"}
    for of_kind in plan.limits()["limits"].values():
        for entry in of_kind.values():
            assert all(set(state["sources"]) - unconfirmed for state in entry.values())  # none rests on that alone


def test_the_plan_agrees_with_what_was_reported(command: Run) -> None:
    """apple/ml-fastvlm issues 8, 23 and 24, and what Apple tested (iPhone 15 and later)."""
    ours = plan.planned("0.5b", "fp16")[0]
    # apple/FastVLM-0.5B-fp16: 1.27 GB of language model and projector, an encoder in float32
    published = replace(ours, language=1_260_000_000, encoder=490_000_000, encoder_itemsize=4)
    verdicts = {}
    for device in ("iphone-13", "iphone-14-pro", "iphone-15", "iphone-16-pro"):
        limits, _ = plan.known_limits(device, None)
        found = plan.plan(published, SHAPES["0.5b"], limits)
        verdicts[device] = {state: found["limits"][state]["verdict"] for state in plan.STATES}
    assert verdicts["iphone-13"] == {"increased": TIGHT, "default": TIGHT}  # 8: killed with the entitlement
    assert verdicts["iphone-14-pro"]["increased"] == FITS  # 23: black and hot, but nothing of memory
    assert verdicts["iphone-15"]["increased"] == FITS  # tested
    assert verdicts["iphone-16-pro"]["increased"] == FITS  # 24 doesn't say which model
    assert document(command, "--shape", "7b", "--recipe", "int8", "--device", "iphone-16-pro")[0] == 1


def test_the_table_in_the_docs_is_what_is_printed(command: Run) -> None:
    text = (Path(plan.__file__).parents[1] / "docs" / "APP.md").read_text(encoding="utf-8")
    stands = text.partition("<!-- plan --table -->\n")[2].partition("<!-- /plan --table -->")[0]
    assert stands.strip() == command("--table")[1].strip()


def test_the_table_is_what_plan_says(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = document(command, "--table")
    assert code == 0
    report.print_overview(found)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 1 + len(found["rows"])
    assert {row["model"] for row in found["rows"]} == {"0.5B", "1.5B", "7B"}
    assert all(device.name in str(found["columns"]) for device in devices().values())
    keys = {device.name: device.key for device in devices().values()}
    cells = {(row["model"], row["recipe"]): row["verdicts"] for row in found["rows"]}
    seen = set()
    for model, recipe, place in (("0.5B", "int8", 0), ("1.5B", "fp16", 1), ("7B", "int4", -1), ("7B", "int6", 3)):
        column, verdicts = found["columns"][place], cells[model, recipe][place]
        asked = ("--shape", model.lower(), "--recipe", recipe, "--device", keys[column["devices"][0]])
        code, one = document(command, *asked, "--memory", f"{column['memory_gb']:g}")
        assert {state: limit["verdict"] for state, limit in one["limits"].items()} == verdicts
        assert code == (verdicts["increased"] != FITS)
        seen |= set(verdicts.values())
    assert seen >= {FITS, NOT}
    unknown = [column["devices"] for column in found["columns"] if not column["limits"]]
    assert unknown == [["iPad Pro (M5)"]]
    assert sum("?" in line for line in lines) == len(found["rows"])
