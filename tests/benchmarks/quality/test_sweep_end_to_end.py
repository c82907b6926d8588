"""The sweep's verb and what it does for a point: refusals, the artefact put together, and a whole sweep, once."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import shared_exports
from benchmarks.quality import sweep, sweep_point
from fastvlm.common import threads
from fastvlm.common.arguments import Parser
from fastvlm.common.cli import add_common, run
from fastvlm.data.conversations import Sample
from model_export import artefact, contract, export
from model_export.config import ExportConfig
from quantization.recipe import load_recipe

pytestmark = pytest.mark.slow


def parser() -> argparse.ArgumentParser:
    built = Parser()
    verbs = built.add_subparsers(required=True)
    sweep.add_sweep(verbs)
    add_common(verbs.choices["sweep"])
    return built


def run_verb(*arguments):
    return run(parser, ["sweep", *map(str, arguments)])


def test_every_fault_is_named_at_once(tiny_fast_vlm, tmp_path, capsys):
    code = run_verb(
        "--checkpoint", tiny_fast_vlm, "--quant", "int5x", "int4", "--vision-quant", "palette5", "--resolutions", 100,
        "--samples", tmp_path / "none", "--count", 0, "--text", tmp_path / "no.txt", "--jobs", 0, "--memory", -1,
        "--max-size", "5 apples", "--min-agreement", "101%", "--work-dir", tmp_path / "work",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and said.startswith("error: ")
    for part in ("int5x", "palette5", "got 100", "none: no such file", "--count: got 0", "no.txt", "--jobs: got 0",
                 "--memory: got -1", "--max-size 5 apples", "--min-agreement 101%"):  # fmt: skip
        assert part in said, part
    assert not (tmp_path / "work").exists()


def test_a_recipe_that_does_not_fit_the_model_is_refused_before_any_work(tiny_fast_vlm, tmp_path, capsys):
    recipe = load_recipe("int4").to_json() | {"name": "odd"}
    recipe["rules"].insert(0, {"pattern": "language_model.nothing.*", "scheme": {"mode": "cast", "dtype": "float16"}})
    (tmp_path / "odd.json").write_text(json.dumps(recipe))
    work = tmp_path / "work"
    code = run_verb("--checkpoint", tiny_fast_vlm, "--quant", "fp16", tmp_path / "odd.json", "--work-dir", work)
    said = capsys.readouterr().err
    assert code == 2 and "matches no weight: 'language_model.nothing.*'" in said and not work.exists()


@pytest.mark.parametrize(
    ("flags", "constraints"),
    [
        ({"max_size": "500MB", "min_agreement": "99%"}, (500e6, 0.99)),
        ({"max_size": "1.2 GB", "min_agreement": "0.995"}, (1.2e9, 0.995)),
        ({"max_size": None, "min_agreement": "1"}, (None, 1.0)),
    ],
)
def test_constraints(flags, constraints):
    faults: list[str] = []
    found = sweep._constraints(argparse.Namespace(**flags), faults)
    assert (found.max_size, found.min_agreement) == constraints and not faults


def test_samples_are_hashed_by_content():
    def sample(colour=(1, 2, 3), question="What?", answer="It.", size=(8, 4)):
        return Sample("one", lambda: Image.new("RGB", size, colour), question, answer)

    def of(**changes):
        return sweep.samples_sha256([sample(**changes)])

    others = [of(colour=(1, 2, 4)), of(question="Why?"), of(answer=None), of(size=(4, 8))]
    assert of() == of() and len({of(), *others}) == 5


def test_first_token_has_every_stage(reference):
    picture = Sample("one", lambda: Image.new("RGB", (90, 60)), "What?", None)
    text = Sample("two", None, "Why?", None)
    stages = sweep_point.first_token(reference, [text, picture])
    parts = [stages[f"ttft_{part}_s"] for part in ("encode", "project", "prefill")]
    assert min(parts) > 0 and stages["ttft_s"] >= max(parts)
    assert sweep_point.first_token(reference, [text]) == {}


def test_what_points_share_is_made_once_and_never_half(tmp_path):
    made = []

    def make(target, fail=False):
        made.append(target)
        if fail:
            raise OSError("full")
        target.write_text("whole")

    target = tmp_path / "shared" / "one"
    with pytest.raises(OSError):
        sweep_point.once(target, lambda path: make(path, fail=True))
    assert not target.exists()
    assert sweep_point.once(target, make).read_text() == "whole"
    sweep_point.once(target, make)
    assert len(made) == 2


def test_an_encoder_that_points_share_sees_each_picture_once(tmp_path):
    class Vision:
        name, remedy = "fake", ""

        def encode(self, pixel_values):
            seen.append(float(pixel_values[0, 0, 0, 0]))
            return pixel_values[:, 0] * 2

    def ask(vision, package="1", number=1.0):
        files = {f"{contract.PACKAGE}/weights": {"sha256": package}, "model.safetensors": {"sha256": str(len(seen))}}
        pixels = np.full((1, 3, 4, 4), number, np.float32)
        features = shared_exports.Remembered(vision, tmp_path, {"files": files}).encode(pixels)
        assert features.dtype == np.float32 and np.array_equal(features, pixels[:, 0] * 2)

    seen: list[float] = []
    vision, other = Vision(), Vision()
    other.name = "another way"
    for number in (1, 2, 1, 2):
        ask(vision, number=number)
    assert seen == [1, 2]
    ask(vision, "2")
    ask(other)
    with threads.alone():
        ask(vision)
    assert seen == [1, 2, 1, 1] + [1] * (torch.get_num_threads() > 1), "other encoders, other threads"


@pytest.fixture
def exports_here(monkeypatch):
    """Exports run in this process, and are noted."""
    seen = []

    def here(settings, parts, options, target, encoder=None):
        seen.append(parts)
        shared_exports.export_here(settings, parts, options, target, encoder)

    monkeypatch.setattr(sweep_point, "export_apart", here)
    return seen


def test_halves_put_together_are_the_artefact_of_one_export(tiny_fast_vlm, tmp_path, exports_here):
    settings = {"work": str(tmp_path), "checkpoint": str(tiny_fast_vlm), "calibration_data": None, "common": "x"}
    point = {"name": "p", "recipe": load_recipe("int4").to_json(), "vision_quant": "fp16", "resolution": 64}
    folder = tmp_path / "together"
    folder.mkdir()
    manifest = sweep_point.put_together(point, settings, folder)
    assert artefact.verify(folder) == [] and manifest["llm"]["bits_per_weight"] < 8
    whole = export.export(export.plan(ExportConfig(tiny_fast_vlm, tmp_path / "whole", quant="int4", image_size=64)))
    for name in ("fastvithd.mlpackage", "model.safetensors", "multi_modal_projector", "preprocessor_config.json"):
        mine, theirs = ({n: f for n, f in one["files"].items() if n.startswith(name)} for one in (manifest, whole))
        assert mine == theirs and mine, name
    assert manifest["image"] == whole["image"] and manifest["files"].keys() == whole["files"].keys()
    assert exports_here == [("vision",), ("llm",)]


def test_what_is_calibrated_sees_through_the_encoder_that_all_recipes_share(tiny_fast_vlm, tmp_path, exports_here):
    data = tmp_path / "pictures"
    data.mkdir()
    Image.new("RGB", (80, 60), (200, 30, 40)).save(data / "one.png")
    settings = {"work": str(tmp_path), "checkpoint": str(tiny_fast_vlm), "calibration_data": str(data), "common": "x"}
    made = {}
    for name in ("int4", "int4-awq"):
        folder = tmp_path / name
        folder.mkdir()
        point = {"name": "p", "recipe": load_recipe(name).to_json(), "vision_quant": "fp16", "resolution": 64}
        made[name] = sweep_point.put_together(point, settings, folder)
    assert exports_here == [("vision",), ("llm",), ("llm",)]
    config = ExportConfig(tiny_fast_vlm, tmp_path / "whole", quant="int4-awq", image_size=64, calibration_data=data)
    whole = export.export(export.plan(config))
    files = made["int4-awq"]["files"]
    for name in ("fastvithd.mlpackage", "model.safetensors"):
        assert [f for n, f in files.items() if n.startswith(name)] == [
            f for n, f in whole["files"].items() if n.startswith(name)
        ], name
    assert files["model.safetensors"] != made["int4"]["files"]["model.safetensors"]
    mine, theirs = (one["llm"]["calibration"] for one in (made["int4-awq"], whole))
    assert mine == theirs and mine["encoder"] == "the exported package"


@pytest.mark.parametrize(
    ("name", "exported"),
    [
        ("int4", "vision llm vision"),  # a language model of its own once for all resolutions
        ("int4-awq", "vision llm vision llm"),
        ("fit:5bpw", "vision llm vision llm"),
    ],
)
def test_what_is_exported_anew_for_another_resolution(name, exported, tmp_path, monkeypatch):
    def export_apart(settings, parts, options, target, encoder):
        seen.extend(parts)
        calibrates = parts == ("llm",) and name != "int4"
        assert ("quant" in options) == (parts == ("llm",)) and (encoder is not None) == calibrates
        assert ("image_size" in options) == (parts == ("vision",) or calibrates)
        target.mkdir()
        for part in parts:
            (target / part).write_text(part)
        artefact.write_manifest(target, {"parts": list(parts)} | {part: {"options": str(options)} for part in parts})

    seen: list[str] = []
    monkeypatch.setattr(sweep_point, "export_apart", export_apart)
    settings = {"work": str(tmp_path / "work"), "common": "x"}
    for size in (64, 64, 128):
        folder = tmp_path / f"together-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        point = {"name": "p", "recipe": load_recipe(name).to_json(), "vision_quant": "fp16", "resolution": size}
        manifest = sweep_point.put_together(point, settings, folder)
        assert set(manifest["files"]) == {"llm", "vision"} and artefact.verify(folder) == []
    assert seen == exported.split()


@pytest.mark.slow
def test_a_whole_sweep(tiny_fast_vlm, tmp_path, capsys, monkeypatch):
    """One point, from the verb to the page; asked again, it is there."""
    monkeypatch.setattr(shared_exports, "identity", lambda: {"sources": "as they are"})  # also while someone edits them
    work, report = tmp_path / "work", tmp_path / "report"
    arguments = ["--checkpoint", tiny_fast_vlm, "--quant", "int4", "--count", 2, "--jobs", 1, "--json"]
    assert run_verb(*arguments, "--work-dir", work, "--report", report) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    (point,) = found["points"]
    figures, timings = point["figures"], found["timings"]["points"][point["name"]]
    assert figures["bytes"] > figures["bytes_vision"] + figures["bytes_language"] and figures["same_answers"] <= 1
    assert len(point["answers"]) == 2 and timings["ttft_s"] > 0 and timings["peak_bytes"] > 1e8
    assert timings["runners"]["vision"] in found["timings"]["notes"]["TTFT"]
    page = (report / "index.html").read_text()
    assert page.count("<svg") == 4 and page.count("data:image/jpeg") == 2
    assert not list(work.glob("artefact.*")) and not list((work / "shared").glob("llm-*"))
    assert run_verb(*arguments, "--work-dir", work, "--report", report) == 0
    again = capsys.readouterr()
    assert "1 of 1 points, 1 of them were there already" in again.err
    document = json.loads(again.out.splitlines()[-1])
    assert {**document, "timings": 0} == {**found, "timings": 0}
