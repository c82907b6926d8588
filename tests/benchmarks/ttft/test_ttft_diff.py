"""`ttft diff`: calls nothing between runs of the same on a noisy machine, names what was slowed, refuses the rest."""

import itertools
import json
import os

import numpy as np
import pytest
from ttft_documents import BASE, ENVIRONMENT, changed, document

from benchmarks.ttft import diff, repeat
from benchmarks.ttft.runner import DELAY, TOTALS
from fastvlm.common.errors import UserError

STAGES = 18  # stages and totals of two runners


@pytest.fixture(scope="module")
def runs():
    return [document(seed) for seed in range(21)]


def samples(rng, count, spread, tail=None):
    """Log seconds of eight processes for each of `count` stages; by `tail` from Student's t with so many degrees of
    freedom."""
    shape = (200, count, 8)
    return spread * (rng.standard_t(tail, shape) if tail else rng.standard_normal(shape))


def called(old, new, comparisons):
    change, threshold = diff.welch(old, new, comparisons)
    return abs(change) > threshold


@pytest.mark.parametrize("spreads, tail", [((0.1, 0.1), None), ((0.1, 0.3), None), ((0.1, 0.1), 3)])
def test_equal_samples_are_called_different_in_at_most_one_comparison_of_twenty(spreads, tail):
    """The whole comparison counts, and the spread is so large that the least change called protects nothing."""
    rng = np.random.default_rng(0)
    old, new = (samples(rng, STAGES, spread, tail) for spread in spreads)
    assert called(old, new, STAGES).any(1).mean() <= 0.08  # 0.05 and two standard deviations of 200 comparisons
    assert called(old, new, 1).any(1).mean() > 0.3  # the control: without the correction


def test_a_change_of_fifteen_percent_is_named_and_one_of_four_is_not_however_quiet_it_is():
    rng = np.random.default_rng(1)
    old, new = samples(rng, 1, 0.03), samples(rng, 1, 0.03) + np.log(1.15)
    assert called(old, new, STAGES).mean() >= 0.95
    assert diff.welch(old, new, STAGES)[0].mean() == pytest.approx(np.log(1.15), abs=0.01)
    quiet = np.linspace(0, 1e-6, 8)
    assert [bool(called(quiet, quiet + np.log(factor), STAGES)) for factor in (1.04, 1.06, 0.94)] == [0, 1, 1]


def altered(one, **values):
    """The run with other values in each round."""
    one = changed(one)
    for runner in one["points"][0]["runners"]:
        for launch in runner["launches"]:
            launch["rounds"] = [round_ | values for round_ in launch["rounds"]]
    return one


@pytest.mark.slow
def test_equal_runs_are_not_called_different_if_the_yardstick_counts(runs):
    calls = [bool(diff.compare(old, new)["changes"]) for old, new in itertools.pairwise(runs)]
    assert sum(calls) <= 1
    without = [altered(one, yardstick_s=0.006) for one in runs[:6]]
    blind = [bool(diff.compare(old, new)["changes"]) for old, new in itertools.pairwise(without)]
    assert sum(blind) >= 3  # the control: the machine's speed differs from run to run


@pytest.mark.parametrize("stage", BASE)
def test_a_slowed_stage_is_named_and_nothing_else_if_waiting_is_taken_out(stage, runs):
    within = {stage, *(total for total, parts in TOTALS.items() if stage in parts)}
    named = blind = 0
    for seed in range(3):
        pair = runs[seed], document(100 + seed, {stage: 1.15})
        slower = [(row["runner"], row["stage"]) for row in diff.compare(*pair)["changes"]]
        assert {name for _, name in slower} <= within
        named += sum(name == stage for _, name in slower)
        crowded = [altered(one, waited=dict.fromkeys(BASE, 0.0)) for one in pair]
        blind += sum(row["stage"] == stage for row in diff.compare(*crowded)["changes"])
    assert named == 6  # two runners in three runs
    assert blind <= 1  # the control: what is made up here is noise indeed


def test_other_machines_checkpoints_and_settings_are_refused_all_at_once(runs):
    other = changed(runs[1], environment=ENVIRONMENT | {"cpu": "Another"}, tokens=32, threads=2, picture="cat.jpg")
    other["checkpoint"]["sha256"] = "1" * 64
    with pytest.raises(UserError, match="not comparable") as refused:
        diff.compare(runs[0], other)
    said = ("cpu A processor and Another", "checkpoint 000000000000 and 11", "tokens 16 and 32", "threads 1 and 2")
    assert not [one for one in (*said, "picture a drawn scene and cat.jpg") if one not in str(refused.value)]


def test_another_resolution_is_refused_and_other_runners_are_left_out(runs):
    other = changed(runs[1])
    other["points"][0]["resolution"] = 512
    with pytest.raises(UserError, match=r"resolution and prompt demo, 256 × 256 .* and demo, 512 × 512"):
        diff.compare(runs[0], other)
    other = changed(runs[1])
    other["points"][0]["runners"][1]["settings"]["dtype"] = "bfloat16"
    comparison = diff.compare(runs[0], other)
    assert {row["runner"] for row in comparison["rows"]} == {"fp16/executor-as-typed"}
    assert comparison["left_out"] == ["transformers-cpu: dtype float32 and bfloat16"]
    other["points"][0]["runners"][0] = {"name": "fp16/executor-as-typed", "error": "killed"}
    with pytest.raises(UserError, match=r"nothing to compare: .*not measured in both"):
        diff.compare(runs[0], other)
    with pytest.raises(UserError, match=r"nothing to compare: .*measured in one process"):
        diff.compare(runs[0], document(1, launches=1))


def test_the_command_says_what_changed(tmp_path, runs, cli):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, one in zip(paths, (document(100, {"decode": 1.3}), runs[0])):
        path.write_text(json.dumps(one))
    answer = cli("ttft", "diff", *paths, "--fail-on-slower")
    assert answer.code == 0 and "decode" in answer.out and "faster" in answer.out
    assert "OLD was slowed on purpose: decode=x1.3" in answer.out
    answer = cli("ttft", "diff", *reversed(paths))
    assert answer.code == 0 and "slower" in answer.out
    answer = cli("ttft", "diff", *reversed(paths), "--fail-on-slower", "--json")
    assert answer.code == 1 and {row["stage"] for row in answer.document["changes"]} == {"decode"}


def test_repeatability_counts_false_calls_and_misses():
    """With made-up runs in which the delay is (or isn't) heeded."""
    seeds = iter(range(200, 300))

    def measure():
        text = os.environ.get(DELAY, "")
        slowed = {text.split("=x")[0]: float(text.split("=x")[1])} if text else {}
        return document(next(seeds), slowed)

    result = repeat.repeat(measure, 3, ["encode", "decode"])
    assert result["passed"] and result["false"] == 0 and result["pairs"] == [[], [], []]
    assert [(one["stage"], one["missed"]) for one in result["slowed"]] == [
        ("encode", []),
        ("decode", []),
        ("encode", []),
    ]
    assert DELAY not in os.environ
    deaf = repeat.repeat(lambda: document(next(seeds)), 1, ["encode"])
    assert not deaf["passed"] and len(deaf["slowed"][0]["missed"]) == 2

    def failing():
        one = measure()
        one["points"][0]["runners"][1] = {"name": "transformers-cpu", "kind": "checkpoint", "error": "killed"}
        return one

    failed = repeat.repeat(failing, 1, ["encode"])
    assert failed["slowed"][0]["missed"] == ["transformers-cpu"] and not failed["passed"]
    quiet = repeat.repeat(failing, 1, [])
    assert quiet["left_out"] == ["transformers-cpu: not measured in both"] and not quiet["passed"]
    restless = iter([1.0, 1.5] * 4)
    result = repeat.repeat(lambda: document(next(seeds), {"prefill": next(restless)}), 2, [])
    assert result["false"] == 2 and not result["passed"]
