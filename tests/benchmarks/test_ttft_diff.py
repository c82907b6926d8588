"""`ttft diff`: calls nothing between runs of the same on a noisy machine, names what was slowed, refuses the rest."""

import itertools
import json
import math
import statistics

import pytest
from ttft_documents import BASE, changed, document

from benchmarks import __main__ as command
from benchmarks.ttft import diff, repeat
from benchmarks.ttft.runner import DELAY, TOTALS
from fastvlm.common.cli import run
from fastvlm.common.errors import UserError


@pytest.fixture(scope="module")
def runs():
    return [document(seed) for seed in range(41)]


def test_equal_runs_are_not_called_different(runs):
    false = [bool(diff.compare(old, new)["changes"]) for old, new in itertools.pairwise(runs)]
    assert sum(false) <= len(false) // 20


def test_the_noise_would_fool_a_comparison_of_medians(runs):
    """The negative control: what is made up here is noise indeed."""

    def median(run):
        launches = run["points"][0]["runners"][0]["launches"]
        return statistics.median(one["stages"]["decode"] for launch in launches for one in launch["rounds"])

    apart = [abs(math.log(median(new) / median(old))) for old, new in itertools.pairwise(runs)]
    assert sum(one > math.log(1.15) for one in apart) > 10


@pytest.mark.parametrize("stage", BASE)
def test_a_slowed_stage_is_named_and_nothing_else(stage, runs):
    within = {stage, *(total for total, parts in TOTALS.items() if stage in parts)}
    named = 0
    for seed in range(5):
        rows = diff.compare(runs[seed], document(100 + seed, {stage: 1.15}))["rows"]
        slower = {(row["runner"], row["stage"]) for row in rows if row["called"]}
        assert {name for _, name in slower} <= within
        named += sum(name == stage for _, name in slower)
    assert named >= 9  # of 2 runners in 5 runs


def test_a_faster_stage_is_called_faster(runs):
    rows = diff.compare(document(7, {"encode": 1.3}), runs[8])["changes"]
    assert {(row["stage"], row["called"]) for row in rows} >= {("encode", "faster"), ("ttft_paper", "faster")}
    assert all(row["change"] < -0.1 for row in rows if row["stage"] == "encode")


def test_a_change_is_measured_and_thresholds_follow_the_noise(runs):
    rows = diff.compare(document(1, quiet=True), document(2, {"encode": 1.15}, quiet=True))["rows"]
    for row in rows:
        if row["stage"] == "encode":
            assert row["change"] == pytest.approx(0.15, abs=1e-6)
        assert row["threshold"] == pytest.approx(diff.LEAST)
    noisy = diff.compare(runs[0], runs[1])["rows"]
    assert statistics.median(row["threshold"] for row in noisy) > diff.LEAST


def test_no_yardstick_no_waiting_and_one_process_still_compare():
    def bare(run):
        for runner in run["points"][0]["runners"]:
            runner["launches"] = runner["launches"][:1]
            for one in runner["launches"][0]["rounds"]:
                one["yardstick"] = None
                del one["waited"]
        return run

    rows = diff.compare(*(bare(document(seed, quiet=True)) for seed in (1, 2)))["rows"]
    assert not any(row["called"] for row in rows)
    assert all(row["threshold"] > 0.2 for row in rows)  # nothing is known of how processes differ


def test_more_threads_than_cores_wait_for_themselves():
    old, new = document(1, quiet=True), document(2, quiet=True)
    for runner in new["points"][0]["runners"]:
        for launch in runner["launches"]:
            for one in launch["rounds"]:
                one["stages"]["encode"] += 0.004
                one["waited"]["encode"] += 0.004
    assert not diff.compare(old, new)["changes"]
    for run_ in (old, new):
        for runner in run_["points"][0]["runners"]:
            runner["settings"]["threads"] = 8
    called = diff.compare(old, new)["changes"]
    assert {row["stage"] for row in called} == {"encode", "ttft_paper", "ttft_app"}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"environment": {"cpu": "Another", "machine": "x86_64", "cores": 2, "memory_gib": 8.0, "system": "A system"}},
         "cpu A processor and Another"),
        ({"checkpoint": {"name": "demo", "dtype": "float16", "sha256": "1" * 64}}, "checkpoint 000000000000 and 11"),
        ({"tokens": 32}, "tokens 16 and 32"),
        ({"threads": 2}, "threads 1 and 2"),
        ({"picture": "cat.jpg"}, "picture a drawn scene and cat.jpg"),
    ],
)  # fmt: skip
def test_other_machines_checkpoints_and_settings_are_refused(change, said, runs):
    with pytest.raises(UserError, match=f"not comparable: .*{said}"):
        diff.compare(runs[0], changed(runs[1], **change))


def test_another_resolution_is_refused_and_other_runners_are_left_out(runs):
    other = changed(runs[1])
    other["points"][0]["resolution"] = 512
    with pytest.raises(UserError, match=r"resolution and prompt demo, 256 × 256 .* and demo, 512 × 512"):
        diff.compare(runs[0], other)
    other = changed(runs[1])
    other["points"][0]["runners"][1]["settings"]["dtype"] = "bfloat16"
    found = diff.compare(runs[0], other)
    assert {row["runner"] for row in found["rows"]} == {"fp16/executor-as-typed"}
    assert found["left_out"] == ["transformers-cpu: dtype float32 and bfloat16"]
    other["points"][0]["runners"][0] = {"name": "fp16/executor-as-typed", "error": "killed"}
    with pytest.raises(UserError, match=r"nothing to compare: .*not measured in both"):
        diff.compare(runs[0], other)


def test_the_command_says_what_changed(tmp_path, runs, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, one in zip(paths, (runs[0], document(100, {"decode": 1.3}))):
        path.write_text(json.dumps(one))
    arguments = ["ttft", "diff", *map(str, paths)]
    assert run(command.build_parser, arguments) == 0
    said = capsys.readouterr().out
    assert "decode" in said and "slower" in said and "NEW was slowed on purpose: decode=x1.3" in said
    assert run(command.build_parser, [*arguments, "--fail-on-slower", "--json"]) == 1
    assert {row["stage"] for row in json.loads(capsys.readouterr().out)["changes"]} == {"decode"}
    paths[1].write_text("{}")
    assert run(command.build_parser, arguments) == 2
    assert "not a run of `benchmarks ttft`" in capsys.readouterr().err


def test_students_quantiles():
    """Against the tables of Student's t (two-sided 5 % and 0.1 %)."""
    for freedom, usual, rare in ((6, 2.447, 5.959), (12, 2.179, 4.318), (30, 2.042, 3.646)):
        assert diff.student(0.975, freedom) == pytest.approx(usual, rel=0.01)
        assert diff.student(0.9995, freedom) == pytest.approx(rare, rel=0.02)


def test_repeatability_counts_false_calls_and_misses(monkeypatch):
    """With made-up runs in which the delay is (or isn't) heeded."""
    import os

    seeds = iter(range(200, 300))

    def measure():
        text = os.environ.get(DELAY, "")
        slowed = {text.split("=x")[0]: float(text.split("=x")[1])} if text else {}
        return document(next(seeds), slowed)

    found = repeat.repeat(measure, 3, ["encode", "decode"])
    assert found["passed"] and found["false"] == 0 and not found["slowed"]["encode"]["missed"]
    assert DELAY not in os.environ
    deaf = repeat.repeat(lambda: document(next(seeds)), 1, ["encode"])
    assert not deaf["passed"] and len(deaf["slowed"]["encode"]["missed"]) == 2

    def failing():
        one = measure()
        one["points"][0]["runners"][1] = {"name": "transformers-cpu", "kind": "checkpoint", "error": "killed"}
        return one

    failed = repeat.repeat(failing, 1, ["encode"])
    assert failed["slowed"]["encode"]["missed"] == ["transformers-cpu"] and not failed["passed"]
    quiet = repeat.repeat(failing, 1, [])
    assert quiet["left_out"] == ["transformers-cpu: not measured in both"] and not quiet["passed"]
    restless = iter([1.0, 1.5] * 4)
    found = repeat.repeat(lambda: document(next(seeds), {"prefill": next(restless)}), 2, [])
    assert found["false"] == 2 and not found["passed"]
