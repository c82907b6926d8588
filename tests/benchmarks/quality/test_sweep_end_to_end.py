"""The sweep's verb and what it does for a point: refusals, the artefact put together, and a whole sweep, once."""

import json
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import shared_exports
from benchmarks.quality import sweep, sweep_point
from fastvlm.common import threads
from fastvlm.data.conversations import Sample
from model_export import artefact, contract, export
from model_export.config import ExportConfig
from quantization.recipe import load_recipe

pytestmark = pytest.mark.slow


def refused(answer, *parts):
    """Whether a command ended with one line that has all the parts."""
    return answer.code == 2 and answer.err.count("\n") == 1 and [part for part in parts if part not in answer.err] == []


def test_every_fault_is_named_at_once_and_before_any_work(cli, tiny_fast_vlm, tmp_path):
    work = tmp_path / "work"
    values = {"--vision-quant": "palette5", "--count": 0, "--jobs": 0, "--memory": -1, "--max-size": "5 apples",
              "--min-agreement": "101%"}  # fmt: skip
    answer = cli("sweep", "--checkpoint", tiny_fast_vlm, *(word for pair in values.items() for word in pair))
    assert refused(answer, *(f"{flag}: got {value}" for flag, value in values.items()))
    assert refused(cli("sweep", "--checkpoint", tiny_fast_vlm, "--resolutions", 100), "--resolutions: got 100")
    odd = load_recipe("int4").to_json() | {"name": "odd"}
    odd["rules"].insert(0, {"pattern": "language_model.nothing.*", "scheme": {"mode": "cast", "dtype": "float16"}})
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    answer = cli(
        "sweep", "--checkpoint", tiny_fast_vlm, "--quant", "fp16", tmp_path / "odd.json", "--work-dir", work,
        "--samples", tmp_path / "none",
    )  # fmt: skip
    assert refused(answer, "matches no weight: 'language_model.nothing.*'", "none: no such file")
    assert refused(cli("sweep", "--checkpoint", tmp_path / "none", "--quant", "int5x"), "int5x", "none")
    assert not work.exists()


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


def test_halves_put_together_are_the_artefacts_of_whole_exports(tiny_fast_vlm, tmp_path, exports_here):
    """What is calibrated sees through the encoder that all recipes share."""
    data = tmp_path / "pictures"
    data.mkdir()
    Image.new("RGB", (80, 60), (200, 30, 40)).save(data / "one.png")
    settings = {"work": str(tmp_path), "checkpoint": str(tiny_fast_vlm), "calibration_data": str(data), "common": "x"}
    made, whole = {}, {}
    for name in ("int4", "int4-awq"):
        folder = tmp_path / name
        folder.mkdir()
        point = {"name": "p", "recipe": load_recipe(name).to_json(), "vision_quant": "fp16", "resolution": 64}
        made[name] = sweep_point.put_together(point, settings, folder)
        assert artefact.verify(folder) == [] and made[name]["llm"]["bits_per_weight"] < 8
    assert exports_here == [("vision",), ("llm",), ("llm",)]
    for name, parts, own in (("int4", ("llm",), []), ("int4-awq", ("vision", "llm"), ["fastvithd.mlpackage"])):
        data_too = {"calibration_data": data} if own else {}
        config = ExportConfig(tiny_fast_vlm, tmp_path / f"whole-{name}", quant=name, image_size=64, **data_too)
        whole[name] = export.export(export.plan(config, parts))
        for part in (*own, "model.safetensors", "multi_modal_projector", "preprocessor_config.json"):
            mine, theirs = (
                {path: file for path, file in one["files"].items() if path.startswith(part)}
                for one in (made[name], whole[name])
            )
            assert mine == theirs and mine, (name, part)
        assert made[name]["image"] == whole[name]["image"]
    assert made["int4-awq"]["files"].keys() == whole["int4-awq"]["files"].keys()
    assert len({one["files"]["model.safetensors"]["sha256"] for one in made.values()}) == 2
    mine, theirs = (one["int4-awq"]["llm"]["calibration"] for one in (made, whole))
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


def test_a_whole_sweep(cli, tiny_fast_vlm, tmp_path, monkeypatch):
    """One point, from the verb to the page; asked again, it is there."""
    monkeypatch.setattr(shared_exports, "identity", lambda: {"sources": "as they are"})  # also while someone edits them
    for name in threads.environment(1):
        monkeypatch.setenv(name, "1")  # the sweep sets them
    forkserver._forkserver._stop()  # one of an earlier test hasn't imported the libraries
    work, report = tmp_path / "work", tmp_path / "report"
    arguments = ["--checkpoint", tiny_fast_vlm, "--quant", "int4", "--count", 2, "--jobs", 1, "--json"]
    arguments += ["--work-dir", work, "--report", report, "--max-size", "1.2 GB", "--min-agreement", "0%"]
    first = cli("sweep", *arguments)
    assert first.code == 0, first.err
    document = first.document
    (point,) = document["points"]
    figures, timings = point["figures"], document["timings"]["points"][point["name"]]
    assert document["constraints"] == {"max_size": 1.2e9, "min_agreement": 0.0}
    assert figures["bytes"] > figures["bytes_vision"] + figures["bytes_language"] and figures["same_answers"] <= 1
    assert len(point["answers"]) == 2 and timings["ttft_s"] > 0 and timings["peak_bytes"] > 1e8
    assert timings["runners"]["vision"] in document["timings"]["notes"]["TTFT"]
    page = (report / "index.html").read_text()
    assert page.count("<svg") == 4 and page.count("data:image/jpeg") == 2
    assert not list(work.glob("artefact.*")) and not list((work / "shared").glob("llm-*"))
    again = cli("sweep", *arguments)
    assert again.code == 0 and "1 of 1 points, 1 of them were there already" in again.err
    assert {**again.document, "timings": 0} == {**document, "timings": 0}
    small = cli("sweep", *arguments, "--max-size", "1kB")
    assert small.code == 1 and small.document["recommendation"]["point"] is None and not small.document["passed"]
