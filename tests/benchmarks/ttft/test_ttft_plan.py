"""What a run measures: runners by name, prompts of a length, the same weights for all; and a whole run end to end."""

import json

import pytest
import ttft_documents
from html_page import Page

from benchmarks.suites import suite
from benchmarks.ttft import plan, runners
from benchmarks.ttft import run as ttft_run
from benchmarks.ttft.document import load_document
from benchmarks.ttft.run import Effort
from benchmarks.ttft.runner import DELAY, STAGES
from fastvlm.common.errors import UserError
from fastvlm.data import prompt
from fastvlm.data.scenes import CHECKPOINT as DEMO
from model_export.artefact import read_manifest
from quantization.recipe import load_recipe

pytestmark = pytest.mark.slow


def request_of(**changes):
    return runners.Request(DEMO, Effort(3, 5, 120.0), **changes)


NAMES = [
    "fp16/executor-auto",
    "fp16/executor-as-typed",
    "int4/executor-auto",
    "transformers-cpu",
    "transformers-cpu-best",
]


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ((), NAMES),
        (("executor-auto",), ["fp16/executor-auto", "int4/executor-auto"]),
        (("int4/*", "transformers-cpu"), ["int4/executor-auto", "transformers-cpu"]),
        (("*-best",), ["transformers-cpu-best"]),
    ],
)
def test_runners_are_chosen_by_pattern(patterns, expected):
    assert runners.choose(patterns, NAMES) == expected
    with pytest.raises(UserError, match=r"no runner coreml-\*, cuda here, expected some of fp16/executor-auto"):
        runners.choose(("coreml-*", "cuda", *patterns), NAMES)


@pytest.mark.parametrize("search", [True, False])
def test_the_best_setting_is_a_runner_only_with_the_search(search, monkeypatch):
    monkeypatch.setattr(runners, "devices", lambda: ["cpu"])
    names = runners.names(request_of(search=search))
    assert "transformers-cpu" in names and ("transformers-cpu-best" in names) == search


def test_runners_are_named_after_the_recipe_in_the_manifest_and_no_two_alike(demo_artefact, tmp_path):
    (known,) = runners.sources(request_of(artefacts=(demo_artefact,)))
    assert (known.recipe, known.artefact, known.format) == ("fp16", demo_artefact, "coreml")
    mine = tmp_path / "recipe.json"
    mine.write_text(json.dumps(load_recipe("int4").to_json() | {"name": "mine"}))
    assert [one.recipe for one in runners.sources(request_of(recipes=(str(mine), "int4")))] == ["mine", "int4"]
    mine.write_text(json.dumps(load_recipe("int4").to_json()))
    for alike in ({"recipes": (str(mine), "int4")}, {"artefacts": (demo_artefact, demo_artefact)}):
        with pytest.raises(UserError, match="twice"):
            runners.sources(request_of(**alike))


def test_mlx_vlm_gets_the_recipe_of_the_artefact_or_says_what_it_needs(demo_artefact, monkeypatch):
    monkeypatch.setenv(runners.MLX_VLM_PYTHON, "python")
    exported = []
    monkeypatch.setattr(runners, "exported", lambda asked, identity, recipe, *rest: exported.append(recipe))
    asked = request_of(artefacts=(demo_artefact,), recipes=("int4",))
    assert runners.mlx_vlm(asked, {}, print)["recipe"] == "fp16"
    assert exported == [read_manifest(demo_artefact)["llm"]["recipe"]] == [load_recipe("fp16").to_json()]
    monkeypatch.delenv(runners.MLX_VLM_PYTHON)
    monkeypatch.setattr(runners.importlib.util, "find_spec", lambda name: None)
    assert runners.MLX_VLM_PYTHON in runners.mlx_vlm(request_of(), {}, print)["absent"]


@pytest.mark.parametrize("length", [30, 64, 200])
def test_prompts_have_so_many_text_tokens(length, demo_model):
    text = plan.lengthened(DEMO, length)
    ids = prompt.encode_prompt(demo_model.tokenizer, text, demo_model.image_token_id, 16)
    assert (ids != demo_model.image_token_id).sum() == length
    with pytest.raises(UserError, match="--prompt-length: got 3, expected more than the template's"):
        plan.lengthened(DEMO, 3)


def test_artefacts_of_other_weights_are_refused(demo_artefact):
    identity = plan.identify(DEMO)
    runners.check_weights(demo_artefact, identity)
    with pytest.raises(UserError, match=r"made from another checkpoint .* name its --checkpoint"):
        runners.check_weights(demo_artefact, identity | {"sha256": "0" * 64})


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--launches", "0", "--budget", "-1", "--rounds", "1.5"],
         ["--launches: got 0", "--budget: got -1", "--rounds: got 1.5"]),
        (["--budget", "nan", "--threads", "0", "--resolution", "100"],
         ["--budget: got nan", "--threads: got 0", "--resolution: got 100"]),
        (["--save", "/tmp", "--output", "/usr", "--image-file", "/nowhere.png"],
         ["--save: /tmp is a folder", "--output: /usr is a folder", "--image-file: /nowhere.png"]),
        (["--artefact", "/nowhere", "--shape", "7B"], ["--artefact /nowhere: no such folder", DELAY]),
        (["--quant", "int3.5", "--prompt-length", "0"], ["--quant: unknown recipe 'int3.5'", "--prompt-length: got 0"]),
        (["--artefact", str(DEMO), "--quant", "int4"], ["--quant: not allowed with argument --artefact"]),
        (["--runner", "nobody"], ["--runner: no runner nobody here", f"{DELAY}: got encode=fast"]),
        (["--checkpoint", "/nowhere", "--runner", "transformers-cpu"], [f"{DELAY}: got encode=fast"]),
        (["--shape", "3b"], ["--shape: got 3b"]),
        (["show", "/nowhere.json"], ["/nowhere.json: no such file: expected what"]),
        (["show", "/nowhere.json", "--output", "/tmp"], ["--output: /tmp is a folder"]),
        (["repeatability", "--pairs", "0", "--launches", "0"], ["--pairs: got 0", "--launches: got 0"]),
        (["repeatability"], [f"{DELAY} is set to encode=fast"]),
    ],
)  # fmt: skip
def test_all_faults_are_one_line_and_told_before_a_checkpoint_is_written(arguments, said, monkeypatch, cli):
    monkeypatch.setattr(suite, "synthetic", None)  # not reached
    monkeypatch.setattr(runners, "devices", lambda: ["cpu"])
    monkeypatch.setenv(DELAY, "encode=fast")
    answer = cli("ttft", *arguments)
    (line,) = answer.err.strip().splitlines()
    assert answer.code == 2 and not [fault for fault in said if fault not in line]


def test_a_checkpoint_and_resolutions_that_are_not_there_are_refused(demo_artefact, monkeypatch, cli):
    answer = cli("ttft", "--checkpoint", "/nowhere", "--runner", "transformers-cpu")
    assert answer.code == 2 and "/nowhere" in answer.err
    monkeypatch.setattr(runners, "devices", lambda: ["cpu"])
    answer = cli("ttft", "--artefact", demo_artefact, "--resolution", "64", "256", "--runner", "nobody")
    assert answer.code == 2 and "no runner nobody" in answer.err
    assert f"--resolution 64: {demo_artefact} wasn't exported for it, expected some of 256" in answer.err


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: [run.pop(key) for key in list(run) if key not in ("benchmark", "format")], "damaged: no date, "),
        (lambda run: run.update(points=[]), "damaged: points is empty"),
        (lambda run: run["points"][0].update(runners={}), "points[0].runners is no list"),
        (lambda run: run["points"][0]["runners"][1].pop("cold"), "no points[0].runners[1].cold"),
        (lambda run: run["points"][0]["runners"][0]["launches"][2].update(rounds=[]), "launches[2].rounds is empty"),
        (
            lambda run: run["points"][0]["runners"][0]["launches"][0]["rounds"][3]["stages"].update(encode="fast"),
            "rounds[3].stages.encode is no number",
        ),
        (lambda run: run.update(environment=None), "environment is no object"),
    ],
)
def test_a_damaged_run_is_one_line(damage, said, tmp_path, cli):
    saved, sound = tmp_path / "run.json", ttft_documents.document(1)
    saved.write_text(json.dumps(sound))
    assert load_document(saved) == sound
    damage(damaged := ttft_documents.changed(sound))
    saved.write_text(json.dumps(damaged))
    for words in (["show", saved], ["diff", saved, saved]):
        answer = cli("ttft", *words)
        (line,) = answer.err.strip().splitlines()
        assert answer.code == 2 and said in line and str(saved) in line


def test_a_runner_whose_values_are_not_finite_fails_the_run(hot_demo, cli):
    words = ["--checkpoint", hot_demo, "--runner", "transformers-cpu", "--no-search", "--launches", "1", "--json"]
    answer = cli("ttft", *words)
    ((runner,),) = [point["runners"] for point in answer.document["points"]]
    assert answer.code == 1 and runner["passed"] is answer.document["passed"] is False
    assert runner["error"].startswith("projector: embeddings of a picture: ")


def test_one_failed_runner_beside_a_sound_one_fails_the_run(monkeypatch):
    """At every point, with the threads that were asked for."""
    points = []
    sound = ttft_documents.document(1)["points"][0]["runners"][0]

    def document(*broken):
        def measure(specifications, effort, say):
            points.append(specifications)
            return [dict(one) for one in broken], False

        monkeypatch.setattr(plan.run, "measure", measure)
        request = request_of(patterns=("transformers-*",), resolutions=(256, 512), search=False, threads=3)
        return plan.measure(request, lambda line: None)

    monkeypatch.setattr(runners, "devices", lambda: ["cpu", "mps"])
    killed = {"name": "hot", "error": "why"}
    assert document(killed | {"passed": False}, sound)["passed"] is False
    assert "passed" not in document(killed, sound)  # one that is killed is a line
    assert document(killed, killed)["passed"] is False  # nothing was measured
    assert len(points) == 6 and all(one["threads"] == 3 for point in points for one in point)
    assert [one["name"] for one in points[1]] == ["transformers-cpu", "transformers-mps"]


def test_a_run_end_to_end_with_a_stage_held_up(tmp_path, demo_artefact, monkeypatch, cli):
    """Every stage of both kinds of runner; the delay is in the encoder's time, in the document and on the page."""
    monkeypatch.setenv(DELAY, "encode=1.0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    saved, page = tmp_path / "run.json", tmp_path / "page.html"
    monkeypatch.setattr(ttft_run, "share", lambda cold, effort: (0, 0))  # the cold round is all there is time for
    words = ["--artefact", demo_artefact, "--runner", "executor-as-typed", "transformers-cpu", "--no-search"]
    words += ["--launches", "1", "--rounds", "1", "--budget", "600", "--prompt-length", "40"]
    answer = cli("ttft", *words, "--save", saved, "--output", page, "--json")
    document = answer.document
    assert answer.code == 0
    assert document == json.loads(saved.read_text()) and document["delay"] == "encode=1.0"
    (point,) = document["points"]
    answers = []
    for runner in point["runners"]:
        assert "error" not in runner
        (launch,) = runner["launches"]
        (one,) = launch["rounds"]
        assert tuple(one["stages"]) == STAGES
        assert one["stages"]["encode"] >= 1.0 and "one round, cold" in runner["note"]
        answers.append(runner["answer"])
    assert len(answers) == 2 and answers[0] == answers[1] and len(answers[0]) == 17
    assert point["runners"][0]["snr_db"]["features"] > 40
    assert "SLOWED ON PURPOSE: encode=1.0" in " ".join(Page(page.read_text()).texts)
    assert "SLOWED ON PURPOSE" in cli("ttft", "show", saved).out
