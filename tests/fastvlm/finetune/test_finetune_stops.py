"""A fine-tune that is killed, again and again, ends with the weights of one that never was; and what is refused."""

import json
from pathlib import Path

import pytest

from fastvlm.finetune.training import newest
from tests.fastvlm.finetune import finetunes
from tests.helpers import contents
from tests.killing import stopper

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return finetunes.write_records(tmp_path_factory.mktemp("records") / "data")[0].parent


def test_killed_again_and_again_the_weights_are_the_same(tiny_fast_vlm, data, tmp_path):
    """To the bit, as have two runs of one seed in two processes; test_finetune has runs that differ."""
    with stopper("tests.fastvlm.finetune.finetunes:finetune") as stopped:
        whole = tmp_path / "whole"
        assert not stopped(tiny_fast_vlm, data, whole, step=0)
        reached = []
        for step in (25, 40):  # the second comes while the result is written
            assert stopped(tiny_fast_vlm, data, tmp_path / "out", step=step) and not (tmp_path / "out").exists()
            states = tmp_path / ".out.resume/states"
            reached.append(int(Path(newest(states) or "-0").name.partition("-")[2]))
            (states / "checkpoint-99").mkdir(exist_ok=True)  # as of a kill while it is written
        assert reached == sorted(reached) and 0 < reached[0] < 8 == reached[-1]
        assert not stopped(tiny_fast_vlm, data, tmp_path / "out", step=0)
    names = ("adapter_model.safetensors", "adapter_config.json", "evaluation.json", "loss.png")
    ours, theirs = contents(tmp_path / "out"), contents(whole)
    assert ours.keys() == theirs.keys() and [name for name in names if ours[name] != theirs[name]] == []
    one, two = (json.loads(files["finetune.json"]) for files in (ours, theirs))
    assert one["losses"] == two["losses"] and one["accuracy"] == two["accuracy"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_stopped_it_goes_on_with_the_same_flags_alone(cli, tiny_fast_vlm, data, tmp_path, monkeypatch):
    output, words = tmp_path / "out", ("--evaluation-split", 0, "--epochs", 1, "--device", "cpu", "--json")
    command = ("finetune", tiny_fast_vlm, "--data", data / "train.json", "--output-dir", output, *words)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastvlm.finetune.result.write", interrupted)
        assert cli(*command).code == 130 and not output.exists()
    other = cli(*command, "--seed", 3)
    assert other.code == 2 and "settings.seed: was 0, is 3" in other.err and "delete that folder" in other.err
    done = cli(*command)
    assert done.code == 0 and "goes on from step 2" in done.err and "step 1/" not in done.err
    assert done.document["kind"] == "adapter" and (output / "finetune.json").is_file()
    again = cli(*command)
    assert again.code == 2 and again.err.count("\n") == 1 and "--overwrite" in again.err
    assert cli(*command, "--overwrite", "--train", "projector").document["kind"] == "projector"
    assert {"mm_projector.safetensors"} == {path.name for path in output.glob("*.safetensors")}


def test_every_fault_at_once_and_a_dry_run(cli, tiny_fast_vlm, data, tmp_path):
    faulty = tmp_path / "faulty.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    long = [turns[0], {"from": "gpt", "value": "a" * 40_000}]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    faulty.write_text(json.dumps([{"image": "broken.png", "conversations": turns}, {"conversations": long}]))
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"image": "none.png", "conversations": turns}, {"conversations": turns[1:]}]))
    command = ("finetune", tiny_fast_vlm, "--output-dir", tmp_path / "out", "--dry-run", "--json")
    got = cli(*command, "--data", faulty, "--evaluation-data", bad)
    assert got.code == 2 and got.document["error"].count("--evaluation-data: ") == 1
    for word in ("none.png", "broken.png", "record 2: 4"):
        assert word in got.err, word
    flags = cli(*command, "--data", data / "train.json", "--train", "projector", "--full", "--lora-alpha", 3)
    assert flags.code == 2 and flags.err.count("leave it out") == 2
    both = cli(*command, "--data", faulty, "--evaluation-data", bad, "--evaluation-split", 0.1)
    assert both.code == 2 and "leave one out" in both.err
    far = cli(
        *[word for word in command if word != "--dry-run"], "--data", data / "train.json", "--learning-rate", 1e30
    )
    assert far.code == 1 and "a smaller --learning-rate" in far.err
    assert not [*tmp_path.glob("*out*")]
    planned = cli(*command, "--data", data / "train.json", "--batch-size", 5, "--evaluation-split", 0)
    assert planned.code == 0 and planned.document["steps"] == 3 * 3 and not (tmp_path / "out").exists()
    assert planned.document["training"]["records"] == 12
