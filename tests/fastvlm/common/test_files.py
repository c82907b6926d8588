"""What a command refuses to write over, and what it refuses to read whole."""

import argparse
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvlm.common import cli, files
from fastvlm.common.files import Output, output_faults
from quantization.recipe import load_recipe

DOORS = ("fastvlm", "quantization", "model_export", "benchmarks", "app_bridge")
WRITES = ("output", "output_dir", "save", "plot", "report", "parity_report", "work_dir")


def verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from verbs(child)


@pytest.mark.parametrize("door", DOORS)
def test_every_flag_that_names_an_output_is_checked(door):
    """Two say so themselves: `download`, which reads no folder, and `demo`, whose training reads no checkpoint."""
    parser = importlib.import_module(f"{door}.__main__").build_parser()
    plain = {
        (verb.prog.split()[-1], action.dest)
        for verb in verbs(parser)
        for action in verb._actions
        if action.dest in WRITES and not isinstance(action.type, Output)
    }
    assert plain == ({("download", "output_dir"), ("demo", "output_dir")} if door == "fastvlm" else set())


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A checkpoint, names for it and its files, and a page of ours."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "page.html").symlink_to(folder / "config.json")
    os.link(folder / "model.safetensors", tmp_path / "hard.html")
    (tmp_path / "recipe.json").write_text(json.dumps(load_recipe("int4").to_json()))
    (tmp_path / "saved.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = "model_export all --checkpoint checkpoint --output-dir out"
REFUSED = (
    f"{ALL} --parity-report checkpoint/model.safetensors",
    f"{ALL} --parity-report link/new.html",
    f"{ALL} --parity-report page.html",
    f"{ALL} --parity-report hard.html",
    f"{ALL} --parity-report recipe.json --quant recipe.json",
    f"{ALL} --parity-report out/page.html",
    "model_export llm --checkpoint checkpoint --output-dir link/out --overwrite",
    "model_export llm --checkpoint checkpoint --output-dir . --overwrite",
    "model_export llm --checkpoint checkpoint --output-dir out --calibration-data out/pictures",
    "model_export ranges --checkpoint link --plot checkpoint/plot.svg",
    "benchmarks parity --reference checkpoint --candidate other --output checkpoint/page.html",
    "benchmarks parity --reference other --candidate link --output checkpoint/new.html",
    "benchmarks ttft --checkpoint checkpoint --save checkpoint/config.json",
    "benchmarks ttft --checkpoint checkpoint --work-dir checkpoint/work",
    "benchmarks ttft --output same.html --save same.html",
    "benchmarks ttft show saved.json --output saved.json",
    "benchmarks mac-report --checkpoint checkpoint --output link/config.json",
    "quantization sweep --checkpoint checkpoint --report checkpoint",
    "quantization sweep --checkpoint checkpoint --work-dir link",
    "app_bridge card checkpoint --output checkpoint/README.md",
    "app_bridge bundle checkpoint --output-dir checkpoint/app",
    "app_bridge bundle checkpoint --app checkpoint/app",
    "fastvlm demo --model-path checkpoint --output-dir checkpoint",
)


@pytest.mark.parametrize("command", REFUSED)
def test_no_command_writes_over_what_it_reads(command, place, capsys):
    (place / "out" / "pictures").mkdir(parents=True)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    door, *flags = command.split()
    assert cli.run(importlib.import_module(f"{door}.__main__").build_parser, flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another" in said
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "output, kind",
    [
        ("page.svg", Output()),
        ("beside/hard.html", Output()),
        (".", Output(files=("index.html",))),
        (".", Output()),  # a working folder may hold the checkpoint
        ("beside", Output(whole=True)),
    ],
)
def test_what_is_elsewhere_is_written(output, kind, place):
    """The negative control: beside the inputs, around them where nothing is replaced, over a link that leaves them."""
    (place / "beside").mkdir()
    (place / "beside" / "hard.html").write_text("a page")
    os.link(place / "beside" / "hard.html", place / "second.html")
    (place / "page.svg").symlink_to(place / "second.html")
    assert output_faults({"--out": (Path(output), kind)}, [("--checkpoint", place / "link")]) == []


def test_only_plain_files_of_bounded_size_are_read(tmp_path):
    plain, pipe = tmp_path / "plain", tmp_path / "pipe"
    plain.write_bytes(b"12345678")
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("plain")
    assert files.read_small(plain, 8) == files.read_small(tmp_path / "link", 8) == b"12345678"
    for path, limit, why in (
        (plain, 7, "8 bytes, expected at most 7"),
        (pipe, 8, "a pipe"),
        (tmp_path, 8, "Is a directory"),
        (Path("/dev/zero"), 8, "a device"),
    ):
        with pytest.raises(OSError, match=why):
            files.read_small(path, limit)


def test_links_stay_inside_the_folder_or_the_hubs_cache(tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    for folder in (snapshot, cache / "blobs", tmp_path / "blobs"):
        folder.mkdir(parents=True)
    for target in (cache / "blobs" / "a", tmp_path / "blobs" / "a", snapshot / "a", cache / "a"):
        target.write_text("")
    links = {
        "inside": "a",
        "cache": "../../blobs/a",
        "other": "../../../blobs/a",
        "above": "../../a",
        "root": "/etc/passwd",
        "chain": "root",
    }
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    assert [name for name in links if files.stays_inside(snapshot / name)] == ["inside", "cache"]
