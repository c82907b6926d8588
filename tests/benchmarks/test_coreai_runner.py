"""A Core AI bundle under the verbs that measure: `evaluate`, `ttft`, `sweep`; its runner is Apple's interpreter."""

import json

import numpy as np
import pytest

from benchmarks import shared_exports
from benchmarks.parity import language
from benchmarks.quality import evaluate, job, sweep_point
from benchmarks.suites import coreai_steps
from benchmarks.ttft import models, plan, report, runner, runners
from benchmarks.ttft.run import Effort
from fastvlm.common import memory
from fastvlm.common.errors import UserError
from fastvlm.data import scenes
from model_export import artefact
from quantization.recipe import load_recipe

pytest.importorskip("coreai")
pytestmark = pytest.mark.slow


def request_of(**changes):
    return runners.Request(scenes.CHECKPOINT, Effort(1, 1, 60.0), **changes)


def test_evaluate_holds_a_bundle_against_its_checkpoint(demo_bundle, tmp_path):
    common = {"results": str(tmp_path / "results.zip"), "count": 1}
    job.evaluate(job.Job(str(scenes.CHECKPOINT), is_reference=True, **common))
    own = memory.peak_bytes()
    result = job.evaluate(job.Job(str(demo_bundle), **common))
    figures, timings = result["figures"], result["timings"]
    assert figures["same_answers"] == figures["exact"] == 1 and 0 < figures["prompt_kl_mean"] < 1e-3
    assert min(figures[f"bytes_{part}"] for part in ("vision", "language")) > 1e6 and "bytes_projector" not in figures
    assert timings["peak_gb"] * 1e9 > own + 50e6, "the runtime's process counts"
    assert result["about"]["runners"]["language"].startswith("Core AI (interpreter, CPU")


def test_evaluate_refuses_a_bundle_of_another_vocabulary(demo_bundle, tiny_fast_vlm):
    kinds = {demo_bundle: "artefact", tiny_fast_vlm: "checkpoint"}
    faults = [*evaluate._mismatches(tiny_fast_vlm, demo_bundle, kinds)]
    assert len(faults) == 2 and "a vocabulary of 448" in faults[0] and "its tokenizer is not" in faults[1]
    assert [*evaluate._mismatches(scenes.CHECKPOINT, demo_bundle, kinds | {scenes.CHECKPOINT: "checkpoint"})] == []


def test_a_runner_of_ttft_has_every_stage_and_its_processs_memory(demo_bundle, tmp_path):
    picture = tmp_path / "picture.png"
    scenes.draw_scene(np.random.default_rng(0), []).save(picture)
    asked = request_of(artefacts=(demo_bundle,), patterns=("coreai",))
    assert runners.choose(asked.patterns, runners.names(asked)) == ["fp16/coreai"]
    identity = plan.identify(scenes.CHECKPOINT)
    (specification,) = runners.specifications(asked, ["fp16/coreai"], identity, [], print)
    conditions = {"picture": str(picture), "prompt": "What?", "question": "Why?", "tokens": 1, "resolution": 256}
    opened = models.open_runner(conditions | specification)
    state = {}
    spent, _ = runner.one_round(runner.stages_of(opened), {}, state)
    assert set(spent) == set(runner.STAGES) and set(runner.totals(spent)) == set(runner.TOTALS)
    assert opened.bytes_beside() > 50e6
    assert "features" not in state, "image embeddings, which are not what other runners' features are"
    assert state["projected"].shape == (1, 16, 128)
    record = {"name": "fp16/coreai", "settings": opened.settings}
    (note,) = report._on_the_interpreter([{"runners": [record]}])
    assert "no device's times" in note[1]
    assert report._on_the_interpreter([{"runners": [record | {"settings": {"vision": "executor"}}]}]) == []


def test_ttft_exports_bundles_and_refuses_what_they_are_not(demo_bundle, demo_artefact, monkeypatch):
    both = request_of(artefacts=(demo_bundle, demo_artefact))
    assert [(one.recipe, one.format) for one in runners.sources(both)] == [("fp16", "coreai"), ("fp16", "coreml")]
    asked, options = request_of(format="coreai"), []
    monkeypatch.setattr(runners, "exported", lambda *given: options.append(given[3]) or demo_bundle)
    identity = plan.identify(scenes.CHECKPOINT)
    for sizes in ([], [128]):
        assert len([*runners.specifications(asked, ["fp16/coreai"], identity, sizes, print)]) == 1
    assert options == [{"format": "coreai"}, {"format": "coreai", "image_size": 128}]
    with pytest.raises(UserError, match="a Core AI bundle has one"):
        plan.check(request_of(format="coreai", resolutions=(128, 256)))
    with pytest.raises(UserError, match="wasn't exported for it"):
        plan.check(request_of(artefacts=(demo_bundle,), resolutions=(128,)))


def test_a_point_of_a_sweep_is_a_whole_bundle(tiny_fast_vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_point, "export_apart", shared_exports.export_here)
    settings = {"work": str(tmp_path), "checkpoint": str(tiny_fast_vlm), "calibration_data": None, "common": "x"}
    folder = tmp_path / "point"
    folder.mkdir()
    recipe = load_recipe("fp16").to_json()
    point = {"name": "p", "recipe": recipe, "vision_quant": "fp16", "resolution": 128, "format": "coreai"}
    made = sweep_point.put_together(point, settings, folder)
    assert artefact.verify(folder) == [] and made["config"]["format"] == "coreai"
    assert made["image"]["image_size"] == 128 and {"metadata.json", "vision.aimodel/main.mlirb"} <= {*made["files"]}


def test_a_sweep_of_bundles_takes_no_forms_of_core_ml(cli, tiny_fast_vlm, tmp_path):
    flags = ("--checkpoint", tiny_fast_vlm, "--work-dir", tmp_path / "work", "--vision-quant", "palette4")
    answer = cli("sweep", *flags, "--format", "coreai")
    assert answer.code == 2 and "--vision-quant with --format coreai: a recipe names the forms" in answer.err


def test_prompts_are_read_one_at_a_time_by_what_reads_one_sequence(demo_model, monkeypatch):
    prompts = [demo_model.language.embed(np.array([[5, 9, 300, number]])) for number in (17, 250, 3)]
    together = language.answers(demo_model.language, prompts, 4, lambda count: None)
    original, sizes = demo_model.language._hidden, []

    def alone(embeds, past, cached):
        sizes.append(len(embeds))
        return original(embeds, past, cached)

    monkeypatch.setattr(demo_model.language, "_hidden", alone)
    monkeypatch.setattr(demo_model.language, "one_sequence", True)
    apart = language.answers(demo_model.language, prompts, 4, lambda count: None)
    assert {*sizes} == {1} and [one.tokens for one in apart] == [one.tokens for one in together]


def test_the_float32_twin_is_pytorch_but_for_the_order_of_sums(tmp_path, monkeypatch):
    monkeypatch.setattr(coreai_steps, "QUESTIONS", 1)
    worst = coreai_steps.float32_twin(str(scenes.CHECKPOINT), str(tmp_path / "twin"))
    assert all(110 < value < 150 for value in worst.values()), json.dumps(worst)
