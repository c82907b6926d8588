"""`plan`: sizes against the artefact's files, verdicts, exit codes, and the table of limits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app_bridge.memory import fit, limits, report
from app_bridge.memory.limits import FITS, MIB, NOT, TIGHT, Limit
from benchmarks.estimate.devices import devices, facts
from fastvlm.synthetic.checkpoint import SHAPES
from quantization.recipe import load_recipe

Cli = Callable[..., Any]


def document(cli: Cli, *arguments: object) -> tuple[int, dict[str, Any]]:
    answer = cli("plan", *arguments, "--json")
    return answer.code, answer.document


def test_an_artefacts_sizes_are_its_files_and_what_was_planned(cli: Cli, app_artefact: Path) -> None:
    code, found = document(cli, app_artefact, "--device", "iphone-15-pro")
    parts = {part["name"]: part["high"] for part in found["parts"]}
    assert code == 0 and found["passed"] and found["need"]["high"] == sum(parts.values())
    for part, name in (("language model", "model"), ("projector", "multi_modal_projector")):
        weights = load_file(app_artefact / f"{name}.safetensors").values()
        assert parts[part] == sum(value.nbytes for value in weights)
    encoder = app_artefact / "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert parts["encoder"] == encoder.stat().st_size
    assert (found["picture_tokens"], found["prompt_tokens"]) == (256, 18)
    stored, shape = fit.stored(app_artefact)
    planned = fit.planned(SHAPES["app"], load_recipe("fp16"))
    assert replace(stored, encoder=0) == replace(planned, encoder=0)  # the tiny encoder isn't FastViTHD
    assert replace(shape, vision_args=None) == replace(SHAPES["app"], vision_args=None, published_ids=True)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1, 10, FITS), (1, 11, TIGHT), (20, 30, TIGHT), (21, 30, NOT), (10, 10, FITS)]
)
def test_verdicts(low: int, high: int, verdict: str) -> None:
    assert Limit(10, 20, ()).verdict(low, high) == verdict


def test_a_model_that_does_not_fit_names_the_largest_that_does(cli: Cli) -> None:
    asked = ("--shape", "1.5b", "--device", "iphone-12", "--recipe")
    code, found = document(cli, *asked, "fp16")
    best, in_app = found["largest"], found["largest_in_app"]
    assert code == 1 and not found["passed"]
    assert in_app["high"] <= best["high"] <= found["limits"]["increased"]["low"] and "demo app" in in_app["loads_in"]
    code, again = document(cli, *asked, in_app["recipe"])
    assert (code, again["need"]["high"]) == (0, in_app["high"])
    names = [one.name for one, _ in fit.sized_recipes(SHAPES["1.5b"])]
    assert document(cli, *asked, names[names.index(best["recipe"]) - 1])[0] == 1  # the next larger one
    code, found = document(cli, "--shape", "7b", "--device", "iphone-12")
    assert (code, found["largest"], found["largest_in_app"]) == (1, None, None)


def test_the_entitlement_decides_and_no_source_is_quoted(cli: Cli) -> None:
    asked = ("--shape", "7b", "--recipe", "int4", "--device", "iphone-16-pro")
    code, found = document(cli, *asked)
    assert code == 0
    assert {state: limit["verdict"] for state, limit in found["limits"].items()} == {"increased": FITS, "default": NOT}
    line = report.verdict(found)
    assert "fits (the published app has the entitlement); without it does not fit" in line
    out = cli("plan", *asked).out
    assert " ".join(out.split()).endswith(line) and "http" not in out
    sources = [source for limit in found["limits"].values() for source in limit["sources"]]
    assert sources and not any(source["says"] in " ".join(out.split()) for source in sources)


def test_a_given_limit_takes_any_device(cli: Cli) -> None:
    assert document(cli, "--shape", "0.5b", "--limit", "3.0GB")[0] == 0
    code, found = document(cli, "--shape", "0.5b", "--limit", "1GiB", "--device", "vision-pro")
    started = next(part["low"] for part in found["parts"] if part["name"] == "app")
    assert code == 1 and started == 95 * MIB  # what was given is what was left beside it
    assert found["limits"]["default"]["low"] == found["limits"]["increased"]["high"] == 1024 * MIB + started
    assert "1.07 GB as you measured it" in cli("plan", "--shape", "0.5b", "--limit", "1GiB").out
    assert report.verdict(found).endswith("take a smaller model.")
    small = document(cli, "--shape", "0.5b", "--limit", "50MB")[1]
    assert report.verdict(small).endswith("No model fits for sure: the app alone takes 99.6 MB to 419 MB.")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("iphone-15-pro-max", "iphone-15-pro"), ("iPhone 14 Pro Max", "iphone-14-pro"),
        ("IPHONE15PRO", "iphone-15-pro"), ("iphone-13-mini", "iphone-13"), ("iPhone 16 Plus", "iphone-16"),
        ("M4 Pro", "m4-pro"), ("m4pro", "m4-pro"), ("Apple M1 Max", "m1-max"), ("MacBook Pro M4", "m4"),
        ("Mac with M2 Ultra", "m2-ultra"), ("MacBook Air (M2)", "m2"), ("iPad Air (M2)", "ipad-pro-m2"),
        ("iPad Pro M4", "ipad-pro-m4"),
    ],
)  # fmt: skip
def test_a_device_by_its_other_names(name: str, key: str) -> None:
    assert limits.reported_limits(name, None)[1]["device"] == key


def test_aliases_are_of_one_device_that_says_so() -> None:
    entries = facts("devices.json")["devices"]
    aliases = [(alias, entry) for entry in entries.values() for alias in entry.get("aliases", ())]
    assert len({alias for alias, _ in aliases}) == len(aliases) > 5
    for alias, entry in aliases:
        assert alias not in entries
        assert all(word in entry["name"].lower() for word in alias.split("-")), alias


def test_memory_chooses_among_the_sizes_sold() -> None:
    (small, of_small), (large, of_large) = (limits.reported_limits("m1", memory) for memory in (None, "16"))
    assert (of_small["memory_gb"], of_large["memory_gb"]) == (8, 16)
    assert small["default"].low < large["default"].low


SHAPE, DEVICE = ("--shape", "0.5b"), ("--device", "m1")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["ARTEFACT", "--device"]),
        (("x", *SHAPE, *DEVICE), ["--shape"]),
        (("x", "--recipe", "int4", *DEVICE), ["--recipe"]),
        (("--shape", "9b", "--limit", "3", "--prompt-length", "9999"),
         ["--shape", "0.5b, 1.5b, 7b", "--limit", "--prompt-length"]),
        (("--shape", "7b", "--memory", "8"), ["--memory", "--device"]),
        ((*SHAPE, "--device", "pixel-9"), ["unknown", "--limit 3.0GB"]),
        *(((*SHAPE, "--device", device), [f"--device {device}", nearest]) for device, nearest in (
            ("iPhone 13 Max", "iphone-13"), ("iphone-16e", "iphone-16"), ("M6 Pro", "m4-pro"),
            ("ipad pro 11 m4", "ipad-pro-m4"))),
        ((*SHAPE, "--device", "ipad-pro-m5"), ["--limit"]),
        ((*SHAPE, *DEVICE, "--memory", "12"), ["--memory", "8 or 16"]),
        ((*SHAPE, "--memory", "8", "--limit", "3GB"), ["--memory"]),
        *(((*SHAPE, "--limit", size), ["--limit"]) for size in ("3", "0GB", "0.0000000001MB", "9" * 400 + "GB")),
        ((*SHAPE, *DEVICE, "--recipe", "int7"), ["int7"]),
        ((*SHAPE, *DEVICE, "--recipe", "fit"), ["fit"]),
        *(((*SHAPE, *DEVICE, "--prompt-length", text), ["--prompt-length"]) for text in ("-1", "many")),
        (("/nowhere", *DEVICE), ["/nowhere"]),
    ],
)  # fmt: skip
def test_refusals_are_one_line_with_every_fault(cli: Cli, arguments: tuple[str, ...], messages: list[str]) -> None:
    answer = cli("plan", *arguments)
    assert (answer.code, answer.err.count("\n")) == (2, 1) and answer.err.startswith("error: ")
    assert all(message in answer.err for message in messages)


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
    cli: Cli, app_artefact: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    copy = shutil.copytree(app_artefact, tmp_path / "copy")
    before = (copy / name).read_bytes()
    (copy / name).write_bytes(change(before))
    assert (copy / name).read_bytes() != before
    manifest = json.loads((copy / "export.json").read_text())
    manifest["files"][name]["size"] = (copy / name).stat().st_size
    (copy / "export.json").write_text(json.dumps(manifest))
    answer = cli("plan", copy, "--device", "m1")
    assert (answer.code, answer.err.count("\n")) == (2, 1)


def test_an_artefact_of_another_layout_or_half_is_refused(cli: Cli, app_artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(app_artefact, tmp_path / "copy")
    whole = json.loads((copy / "export.json").read_text())
    for change, message in (
        ({"config": {**whole["config"], "layout": "mlx-vlm"}}, "layout mlx-vlm"),
        ({"config": {}}, "layout None"),
        ({"config": None}, "config is no object"),
        ({"parts": ["llm"]}, "only part of a model"),
        ({"image": {}}, "no image.image_size"),
    ):
        (copy / "export.json").write_text(json.dumps(whole | change))
        answer = cli("plan", copy, "--device", "m1")
        assert answer.code == 2 and message in answer.err
    (copy / "model.safetensors").unlink()
    assert cli("plan", copy, "--device", "m1").code == 2


def test_every_device_has_a_sourced_limit_or_asks() -> None:
    sources, unknown = limits.table()["sources"], set()
    for device in devices().values():
        for memory in device.memory_gb:
            found = limits.limits_of(device, memory)
            if not found:
                unknown.add((device.key, memory))
                continue
            for limit in found.values():
                assert 0 < limit.low <= limit.high <= memory * 1024 * MIB
                assert limit.sources and set(limit.sources) <= set(sources)
            assert found["default"].high <= found["increased"].high
    assert unknown == {("ipad-pro-m5", 12)}


def test_every_source_says_something_and_is_used() -> None:
    table = limits.table()
    text = json.dumps({key: value for key, value in table.items() if key != "sources"})
    for name, source in table["sources"].items():
        assert source["url"].startswith("http") and source["says"] and f'"{name}"' in text
    assert set(table["devices"]) <= set(devices())
    unconfirmed = {name for name, source in table["sources"].items() if "not confirmed" in source["says"]}
    assert unconfirmed == {"examples-359", "nx2apple", "macotakara"}
    for of_kind in table["limits"].values():
        for entry in of_kind.values():
            assert all(set(state["sources"]) - unconfirmed for state in entry.values())  # none rests on that alone


def test_the_plan_agrees_with_what_was_reported() -> None:
    """apple/ml-fastvlm issues 8, 23 and 24, and what Apple tested (iPhone 15 and later)."""
    ours = fit.planned(SHAPES["0.5b"], load_recipe("fp16"))
    # apple/FastVLM-0.5B-fp16: 1.27 GB of language model and projector, an encoder in float32
    published = replace(ours, language=1_260_000_000, encoder=490_000_000, encoder_itemsize=4)
    verdicts = {}
    for device in ("iphone-13", "iphone-14-pro", "iphone-15", "iphone-16-pro"):
        found = fit.plan(published, SHAPES["0.5b"], limits.reported_limits(device, None)[0])
        verdicts[device] = {state: limit["verdict"] for state, limit in found["limits"].items()}
    assert verdicts["iphone-13"] == {"increased": TIGHT, "default": TIGHT}  # 8: killed with the entitlement
    assert verdicts["iphone-14-pro"]["increased"] == FITS  # 23: black and hot, but nothing of memory
    assert verdicts["iphone-15"]["increased"] == FITS  # tested
    assert verdicts["iphone-16-pro"]["increased"] == FITS  # 24 doesn't say which model
