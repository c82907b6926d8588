"""What a run measures: runners by name, prompts of a length, the same weights for all; and a whole run end to end."""

import json

import pytest
import ttft_documents
from html_page import Page

from benchmarks import __main__ as command
from benchmarks.suites.suite import DEMO
from benchmarks.ttft import command as ttft
from benchmarks.ttft import plan, runners
from benchmarks.ttft import run as ttft_run
from benchmarks.ttft.document import load_document
from benchmarks.ttft.runner import DELAY, STAGES
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError
from fastvlm.data import prompt
from model_export import export
from model_export.artefact import read_manifest
from model_export.config import ExportConfig
from quantization.recipe import load_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo_artefact(tmp_path_factory):
    target = tmp_path_factory.mktemp("ttft") / "demo"
    export.export(export.plan(ExportConfig(checkpoint=DEMO, output_dir=target)))
    return target


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
def test_runners_are_chosen_by_pattern_and_peers_stay(patterns, expected):
    assert runners.choose(patterns, [*NAMES, "peer:llava"]) == [*expected, "peer:llava"]
    with pytest.raises(
        UserError, match=r"--runner: no runner coreml-\*, cuda here, expected some of fp16/executor-auto"
    ):
        runners.choose(("coreml-*", "cuda", *patterns), NAMES)


@pytest.mark.parametrize("search", [True, False])
def test_the_best_setting_is_a_runner_only_with_the_search(search, monkeypatch):
    monkeypatch.setattr(runners, "devices", lambda: ["cpu"])
    names = runners.names(runners.Request(DEMO, search=search))
    assert "transformers-cpu" in names and ("transformers-cpu-best" in names) == search


def test_runners_are_named_after_the_recipe_in_the_manifest_and_no_two_alike(demo_artefact, tmp_path):
    known = runners.recipes(runners.Request(DEMO, artefacts=(demo_artefact,)))
    assert {name: path for name, (_, path) in known.items()} == {"fp16": demo_artefact}
    mine = tmp_path / "recipe.json"
    mine.write_text(json.dumps(load_recipe("int4").to_json() | {"name": "mine"}))
    assert list(runners.recipes(runners.Request(DEMO, recipes=(str(mine), "int4")))) == ["mine", "int4"]
    mine.write_text(json.dumps(load_recipe("int4").to_json()))
    with pytest.raises(UserError, match="--quant: recipe int4 twice"):
        runners.recipes(runners.Request(DEMO, recipes=(str(mine), "int4")))
    with pytest.raises(UserError, match="--artefact: recipe fp16 twice"):
        runners.recipes(runners.Request(DEMO, artefacts=(demo_artefact, demo_artefact)))


def test_mlx_vlm_gets_the_recipe_of_the_artefact(demo_artefact, monkeypatch):
    monkeypatch.setenv(runners.MLX_VLM_PYTHON, "python")
    asked = runners.Request(DEMO, artefacts=(demo_artefact,), recipes=("int4",))
    exported = []
    monkeypatch.setattr(runners, "exported", lambda asked, identity, recipe, *rest: exported.append(recipe))
    assert runners.mlx_vlm(asked, {}, print)["recipe"] == "fp16"
    assert exported == [read_manifest(demo_artefact)["llm"]["recipe"]] == [load_recipe("fp16").to_json()]


def test_peers_run_at_the_first_point_with_the_threads_asked_for(monkeypatch):
    points = []

    def measure(specifications, effort, say):
        points.append(specifications)
        return [{"name": one["name"], "error": "killed"} for one in specifications], False

    monkeypatch.setattr(plan.run, "measure", measure)
    monkeypatch.setattr(runners, "devices", lambda: ["cpu"])
    monkeypatch.setattr(plan.figures, "compare_peers", lambda document: [])
    asked = runners.Request(
        DEMO, patterns=("transformers-cpu",), against=("llava-onevision-0.5b",), resolutions=(256, 512), search=False,
        threads=3,
    )  # fmt: skip
    document = plan.measure(asked, lambda line: None)
    first, second = ([one["name"] for one in point] for point in points)
    assert first == ["transformers-cpu", "peer:llava-onevision-0.5b", "peer:fastvlm-0.5b"]
    assert second == ["transformers-cpu"]
    assert all(one["threads"] == 3 for point in points for one in point)
    assert document["passed"] is False  # nothing was measured


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


def test_without_mlx_vlm_its_line_says_what_to_do(monkeypatch):
    monkeypatch.delenv(runners.MLX_VLM_PYTHON, raising=False)
    monkeypatch.setattr(runners.importlib.util, "find_spec", lambda name: None)
    one = runners.mlx_vlm(runners.Request(DEMO), {}, print)
    assert "not installed: FASTVLM_MLX_VLM_PYTHON names the Python" in one["absent"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--launches", "0", "--budget", "-1", "--rounds", "1.5"],
         ["--launches: got 0, expected a whole number from 1", "--budget: got -1, expected a number above 0",
          "--rounds: got 1.5"]),
        (["--budget", "nan", "--threads", "0", "--resolution", "100"],
         ["--budget: got nan", "--threads: got 0", "--resolution: got 100, expected a whole number from 64, a mul"]),
        (["--save", "/tmp", "--output", "/usr", "--image-file", "/nowhere.png", "--against", "gpt"],
         ["--save: /tmp is a folder", "--output: /usr is a folder", "--image-file: /nowhere.png: no such file",
          "--against: got gpt, expected one of llava-onevision-0.5b"]),
        (["--artefact", "/nowhere", "--shape", "7b"], ["--artefact /nowhere: no such folder", DELAY]),
        (["--quant", "int3.5", "--prompt-length", "0"], ["--quant: unknown recipe 'int3.5'", "--prompt-length: got 0"]),
        (["--artefact", str(DEMO), "--quant", "int4"], ["--quant: not allowed with argument --artefact"]),
        (["--runner", "nobody"], ["--runner: no runner nobody here", f"{DELAY}: got encode=fast"]),
        (["--checkpoint", "/nowhere", "--runner", "transformers-cpu"], [f"{DELAY}: got encode=fast"]),
        (["--shape", "3b"], ["--shape: got 3b"]),
        (["show", "/nowhere.json"], ["/nowhere.json: not readable as JSON"]),
        (["show", "/nowhere.json", "--output", "/tmp"], ["--output: /tmp is a folder"]),
        (["repeatability", "--pairs", "0", "--launches", "0"], ["--pairs: got 0", "--launches: got 0"]),
        (["repeatability"], [f"{DELAY} is set to encode=fast: expected none"]),
    ],
)  # fmt: skip
def test_all_faults_are_one_line_and_told_before_a_checkpoint_is_written(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(ttft, "synthetic", None)  # not reached
    monkeypatch.setenv(DELAY, "encode=fast")
    try:
        code = run(command.build_parser, ["ttft", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert not [fault for fault in said if fault not in line]


def test_a_checkpoint_and_resolutions_that_are_not_there_are_refused(demo_artefact, capsys):
    assert run(command.build_parser, ["ttft", "--checkpoint", "/nowhere", "--runner", "transformers-cpu"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    arguments = ["--artefact", str(demo_artefact), "--resolution", "64", "256", "--runner", "nobody"]
    assert run(command.build_parser, ["ttft", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"--resolution 64: {demo_artefact} wasn't exported for it, expected some of 256" in error
    assert "no runner nobody" in error


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
def test_a_damaged_run_is_one_line(damage, said, tmp_path, capsys):
    saved, sound = tmp_path / "run.json", ttft_documents.document(1)
    saved.write_text(json.dumps(sound))
    assert load_document(saved) == sound
    damage(damaged := ttft_documents.changed(sound))
    saved.write_text(json.dumps(damaged))
    for arguments in (["show", str(saved)], ["diff", str(saved), str(saved)]):
        assert run(command.build_parser, ["ttft", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line and str(saved) in line


def test_a_runner_whose_values_are_not_finite_fails_the_run(hot_demo, capsys):
    arguments = ["--checkpoint", str(hot_demo), "--runner", "transformers-cpu", "--no-search", "--launches", "1"]
    assert run(command.build_parser, ["ttft", *arguments, "--json"]) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    ((runner,),) = [point["runners"] for point in document["points"]]
    assert runner["passed"] is document["passed"] is False
    assert runner["error"].startswith("projector: embeddings of a picture: ")


def test_one_failed_runner_beside_a_sound_one_fails_the_run(monkeypatch):
    def document(**hot):
        sound = ttft_documents.document(1)["points"][0]["runners"][0]
        found = [{"name": "hot", "error": "why", **hot}, sound]
        monkeypatch.setattr(plan.run, "measure", lambda *asked: ([dict(one) for one in found], False))
        monkeypatch.setattr(runners, "devices", lambda: ["cpu", "mps"])
        return plan.measure(runners.Request(DEMO, patterns=("transformers-*",), search=False), lambda line: None)

    monkeypatch.setattr(plan, "_compare", lambda *asked: None)
    assert document(passed=False)["passed"] is False
    assert "passed" not in document()  # one that is killed is a line


@pytest.mark.slow
def test_a_run_end_to_end_with_a_stage_held_up(tmp_path, demo_artefact, monkeypatch, capsys):
    """Every stage of both kinds of runner; the delay is in the encoder's time, in the document and on the page."""
    monkeypatch.setenv(DELAY, "encode=1.0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    saved, page = tmp_path / "run.json", tmp_path / "page.html"
    arguments = ["--artefact", str(demo_artefact), "--runner", "executor-as-typed", "transformers-cpu", "--no-search"]
    monkeypatch.setattr(ttft_run, "share", lambda cold, effort: (0, 0))  # the cold round is all there is time for
    effort = ["--launches", "1", "--rounds", "1", "--budget", "600", "--prompt-length", "40"]
    code = run(
        command.build_parser, ["ttft", *arguments, *effort, "--save", str(saved), "--output", str(page), "--json"]
    )
    assert code == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
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
    assert run(command.build_parser, ["ttft", "show", str(saved)]) == 0
    assert "SLOWED ON PURPOSE" in capsys.readouterr().out
