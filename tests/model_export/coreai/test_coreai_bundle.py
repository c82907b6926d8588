"""A Core AI bundle: its bytes, its interfaces, and what Apple's runtime computes with it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

import fastvlm
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.data import conversations, pictures, scenes
from model_export import runtime
from model_export.config import ExportConfig
from model_export.coreai import bundle, contract
from model_export.coreai.process import Runtime, RuntimeEnded
from model_export.coreai.programs import Programs
from model_export.export import export, plan
from tests.helpers import contents, snr_db

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference():
    return fastvlm.load(scenes.CHECKPOINT)


@pytest.fixture(scope="module")
def model(demo_bundle):
    return runtime.load(demo_bundle)


def test_another_process_with_another_hash_seed_writes_the_same_bytes(demo_bundle, tmp_path):
    code = (
        "import sys; from model_export.config import ExportConfig; from model_export.export import export, plan;"
        "export(plan(ExportConfig(sys.argv[1], sys.argv[2], format='coreai')))"
    )
    command = [sys.executable, "-c", code, str(scenes.CHECKPOINT), str(tmp_path / "other")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[3], check=True)
    ours, theirs = contents(demo_bundle), contents(tmp_path / "other")
    assert ours == theirs and len(ours) > 10


def test_an_export_that_was_stopped_is_taken_up_and_ends_with_the_same_bytes(
    tiny_fast_vlm, tmp_path, monkeypatch, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    export(plan(ExportConfig(tiny_fast_vlm, whole, format="coreai")))
    with monkeypatch.context() as broken:
        broken.setattr(Programs, "write_vision", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(plan(ExportConfig(tiny_fast_vlm, stopped, format="coreai")))
    assert not stopped.exists() and (tmp_path / ".stopped.assets").is_dir()
    capsys.readouterr()
    with monkeypatch.context() as finished:
        finished.setattr(Programs, "write_decoder", lambda *_: pytest.fail("converted again"))
        export(plan(ExportConfig(tiny_fast_vlm, stopped, format="coreai")))
    assert "fastvlm.aimodel: finished by the export before" in capsys.readouterr().err
    assert contents(stopped) == contents(whole) and {path.name for path in tmp_path.iterdir()} == {"whole", "stopped"}


def test_other_settings_begin_anew(tiny_fast_vlm, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Programs, "write_vision", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(plan(ExportConfig(tiny_fast_vlm, tmp_path / "b", format="coreai")))
    export(plan(ExportConfig(tiny_fast_vlm, tmp_path / "b", format="coreai", max_context_length=64)))
    export(plan(ExportConfig(tiny_fast_vlm, tmp_path / "other", format="coreai", max_context_length=64)))
    assert contents(tmp_path / "b") == contents(tmp_path / "other")


@pytest.mark.parametrize("grows", [False, True])
def test_the_programs_have_the_contracts_interfaces(demo_bundle, grows, tmp_path):
    checkpoint = open_checkpoint(scenes.CHECKPOINT)
    shape, folder = bundle.shape_of(checkpoint, 512 if grows else None, grows), demo_bundle
    child = Runtime()
    for role, expected in contract.interfaces(shape).items():
        asset = folder / contract.ASSETS[role]
        if grows and role == "main":
            asset = tmp_path / contract.ASSETS[role]
            Programs(checkpoint, shape).write_decoder(asset)
        assert child.load(role, asset) == (["main"], expected)
    if grows:  # the same answer with a cache that is just long enough, and with one that has grown
        rng = np.random.default_rng(0)
        inputs = {
            "inputs_embeds": rng.standard_normal((1, 20, shape.hidden)).astype(np.float16),
            "position_ids": np.arange(20, dtype=np.int32)[None],
        }
        states = expected_states(shape)
        short, long = (child.call("main", inputs, child.states(states, context)) for context in (20, 300))
        assert np.array_equal(short, long) and np.ptp(short) > 1


def expected_states(shape: contract.Shape) -> tuple[contract.Tensor, ...]:
    return contract.interfaces(shape)["main"].states


def test_answers_and_stages_are_pytorchs(model, reference):
    """Measured on the demo: 64.9 dB behind the projector, 54.6 dB for the logits (the interpreter sums products of
    matrices in float16)."""
    for count, sample in enumerate(conversations.demo_samples(6, "test")):
        picture = sample.image()
        assert model.generate(sample.question, picture) == reference.generate(sample.question, picture)
        if count == 0:
            pixels = model.preprocess(picture)
            ours = reference.project(reference.encode_image(pixels))
            assert snr_db(ours, model.encode_image(pixels)) > 58
            embeds = reference.embed(sample.question, picture)
            assert snr_db(reference.language.logits(embeds), model.language.logits(embeds)) > 48


def test_twins_in_float32_are_the_same_function_and_one_changed_weight_shows(tiny_fast_vlm, tmp_path):
    checkpoint = open_checkpoint(tiny_fast_vlm)
    programs = Programs(checkpoint, bundle.shape_of(checkpoint), "float32")
    assets = {role: tmp_path / name for role, name in contract.ASSETS.items()}
    programs.write_embedding(assets["embedding"])
    programs.write_decoder(assets["main"])
    programs.write_vision(assets["vision"], lambda: ())
    child, reference = Runtime(), fastvlm.load(tiny_fast_vlm)
    for role, asset in assets.items():
        child.load(role, asset)
    pixels = next(iter(pictures.pixels(checkpoint.preprocessor, checkpoint.image_size, None)))
    embeddings = child.call("vision", {"images": pixels})
    assert snr_db(reference.project(reference.encode_image(pixels)), embeddings) > 110
    embeds = reference.embed("What is it?", next(iter(conversations.demo_samples(1, "test"))).image())
    assert np.array_equal(
        child.call("embedding", {"input_ids": np.array([[3, 1, 4]], np.int32)}),
        reference.language.embed(np.array([[3, 1, 4]])),
    )
    expected = reference.language.logits(embeds)
    assert snr_db(expected, _in_pieces(child, programs, embeds)) > 110
    changed = embeds.copy()
    changed[0, 0, 0] += 0.05 * np.abs(embeds).max()
    assert snr_db(expected, _in_pieces(child, programs, changed)) < 80


def _in_pieces(child: Runtime, programs: Programs, embeds: np.ndarray) -> np.ndarray:
    """Logits of all positions, read in pieces of several lengths behind one cache."""
    states, logits, past = child.states(programs.interfaces["main"].states, programs.shape.context), [], 0
    while past < embeds.shape[1]:
        count = min(past + 1, embeds.shape[1] - past)
        order = np.arange(past + count, dtype=np.int32)[None]
        piece = {"inputs_embeds": embeds[:, past : past + count], "position_ids": order}
        logits.append(child.call("main", piece, states))
        past += count
    return np.concatenate(logits, axis=1)


def test_the_context_is_kept_to(model):
    embeds = np.zeros((1, model.language.context + 1, 128), np.float32)
    with pytest.raises(UserError, match=r"2049 tokens.* 2048 positions"):
        model.language.logits(embeds)


def test_bytes_that_crash_the_runtime_are_an_error_of_this_process(demo_bundle, tmp_path):
    asset = tmp_path / "x.aimodel"
    asset.mkdir()
    program = (demo_bundle / contract.ASSETS["embedding"] / contract.PROGRAM).read_bytes()
    for damaged in (b"", program[:1000], os.urandom(4096)):
        (asset / contract.PROGRAM).write_bytes(damaged)
        (asset / contract.PROGRAM_HASH).write_bytes(bytes(32))
        with pytest.raises(UserError, match=r"main\.mlirb: changed"):
            Runtime().load("embedding", asset)
        (asset / contract.PROGRAM_HASH).write_bytes(hashlib.sha256(damaged).digest())
        with pytest.raises((RuntimeEnded, UserError), match="Apple's runtime"):
            Runtime().load("embedding", asset)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"image_size"', '"image_sizf"', "no 'image_size'"),
        ('{\n  "metadata', '[\n  "metadata', "metadata.json"),
        ('"embed.aimodel"', '"../be.aimodel"', "assets outside the bundle"),
        ('"center_crop"', '"center_grap"', "image strategy"),
    ],
)
def test_a_damaged_metadata_is_one_line(demo_bundle, tmp_path, old, new, said):
    shutil.copytree(demo_bundle, tmp_path / "b")
    path = tmp_path / "b" / contract.METADATA
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert len(path.read_text()) == len(text) and path.read_text() != text  # as large as it was exported
    with pytest.raises(UserError, match=re.escape(said)):
        runtime.load(tmp_path / "b")


def test_the_child_and_its_folder_end_with_the_runtime(demo_bundle):
    child = Runtime()
    child.load("embedding", demo_bundle / contract.ASSETS["embedding"])
    process, folder = child._process, Path(child._folder.name)
    del child
    assert process.wait(10) == 0 and not folder.exists()


def test_what_the_engine_cannot_run_is_refused_before_anything_is_converted(tiny_fast_vlm, cli, tmp_path):
    checkpoint = open_checkpoint(tiny_fast_vlm)
    text = replace(checkpoint.model_config.text, use_sliding_window=True, hidden_act="gelu")
    changed = replace(checkpoint, model_config=replace(checkpoint.model_config, text=text))
    with pytest.raises(UserError, match=r"sliding-window attention.*activation"):
        bundle.check(changed)
    for flags, named in (
        (["--compute-units", "ALL", "--resolutions", "256"], ("--compute-units", "--resolutions")),
        (["--max-context-length", "9999999"], ("--max-context-length: got 9999999",)),
    ):
        answer = cli("export", tiny_fast_vlm, "--output-dir", tmp_path / "b", "--format", "coreai", *flags)
        assert answer.code == 2 and all(name in answer.err for name in named) and not (tmp_path / "b").exists()
    assert cli("export", tiny_fast_vlm, "--output-dir", tmp_path / "b", "--cache", "growing").code == 2


def test_without_the_packages_the_error_says_how_to_get_them(tiny_fast_vlm, monkeypatch):
    from model_export.coreai import packages

    monkeypatch.setattr(packages, "PACKAGES", ("coreai-core", "no-such-package"))
    with pytest.raises(UserError, match=r"no-such-package: not installed: `make setup EXTRAS=coreai`"):
        packages.check_installed()
    monkeypatch.setattr(packages.platform, "machine", lambda: "aarch64")
    assert "x86-64" in packages.remedy() and "aarch64" in packages.remedy()
