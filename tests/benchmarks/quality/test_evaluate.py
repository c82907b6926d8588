"""The verb `evaluate`: what it refuses, what it loads, what it prints; and one run from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import evaluate, job, text_model
from benchmarks.quality.job import Job
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.data import scenes
from model_export.artefact import write_manifest
from tests.helpers import with_tensors

pytestmark = pytest.mark.slow

TEXT = "Where is the red circle? The red circle is at the top left. " * 20
IDS = np.array([[5, 9, 300, 17, 17, 250, 3, 88]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random text model as Transformers writes it, with the demo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "model"
    config = LlamaConfig(
        vocab_size=448, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 300.0, "rope_type": "default"}, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(scenes.CHECKPOINT / name, folder)
    # mlx-lm reads it here; Transformers 5 writes it in rope_parameters only
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"rope_theta": 300.0}))
    return folder


@pytest.fixture(scope="module", params=["affine", "mxfp4"])
def quantized(request, llama, tmp_path_factory) -> Path:
    """What mlx_lm.convert makes of it."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("mlx") / request.param
    convert(str(llama), str(folder), quantize=True, q_mode=request.param)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(TEXT)
    return path


def test_any_mlx_folder_in_pytorch_is_what_mlx_computes(quantized):
    ours, theirs = (text_model.load(quantized, llm=llm) for llm in ("torch", "mlx"))
    a, b = (model.language.logits(model.language.embed(IDS)) for model in (ours, theirs))
    assert a.shape == (1, 8, 448) == b.shape
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())
    kind = {"affine": "int4", "mxfp4": "mxfp4"}[quantized.name]
    assert f"over {kind} tensors" in ours.language.name and f"over {kind} tensors" in theirs.language.name
    tokens = [list(model.language.stream(model.language.embed(IDS), 5)) for model in (ours, theirs)]
    assert len(tokens[0]) == len(tokens[1]) == 5


def test_quantization_of_a_text_model_shows(llama, quantized, text_file, tmp_path):
    common = {"results": str(tmp_path / "results.zip"), "text": str(text_file), "samples": job.TEXT_ONLY}
    reference = job.evaluate(Job(str(llama), is_reference=True, llm="torch", **common))
    same = job.evaluate(Job(str(llama), llm="mlx", **common))["figures"]
    worse = job.evaluate(Job(str(quantized), llm="torch", **common))["figures"]
    assert same["text_kl_mean"] < 1e-5 < worse["text_kl_mean"]
    assert same["text_top1"] == pytest.approx(1, abs=0.01)
    assert same["perplexity"] == pytest.approx(reference["figures"]["perplexity"], rel=1e-3)
    assert worse["bytes_language"] < same["bytes_language"] == (llama / "model.safetensors").stat().st_size


def test_a_text_model_that_is_not_whole(llama, tmp_path):
    def rename(tensors):
        tensors["extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    folder = with_tensors(llama, tmp_path / "model", rename)
    weights = folder / "model.safetensors"

    def refused(llm, message):
        with pytest.raises(UserError, match=message):
            text_model.load(folder, llm=llm)

    refused("torch", r"2 tensors are not .* llama has \(extra.weight, model.layers.1")
    refused("mlx", "mlx-lm refuses it")
    weights.write_bytes(b"x")
    refused("torch", "not a readable safetensors file")
    weights.unlink()
    refused("torch", "no model")


def test_kinds(llama, tmp_path):
    assert text_model.kind(llama) == "text" and text_model.kind(scenes.CHECKPOINT) == "checkpoint"
    write_manifest(tmp_path, {"parts": ["llm"], "files": {}, "config": {"layout": "app"}})
    assert text_model.kind(tmp_path) == "text"  # a language model that was exported alone
    write_manifest(tmp_path, {"parts": ["llm"], "files": {}, "config": {"layout": "mlx-vlm"}})
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for folder, message in (
        (tmp_path, "exported for mlx-vlm"),
        (tmp_path / "gone", "no such folder"),
        (tmp_path / "list", "expected a JSON object"),
    ):
        with pytest.raises(UserError, match=message):
            text_model.kind(folder)


@pytest.fixture
def other(llama, tmp_path):
    """The text model with another vocabulary and tokenizer."""
    folder = tmp_path / "other"
    shutil.copytree(llama, folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"vocab_size": 500}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (a, first), (b, second) = list(vocabulary.items())[:2]
    vocabulary[a], vocabulary[b] = second, first
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_all_faults_at_once_before_any_work(cli, llama, other, tmp_path, text_file, monkeypatch):
    monkeypatch.setattr(evaluate, "measured", lambda job: pytest.fail("work started"))
    demo, pictures = scenes.CHECKPOINT, tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        (pictures / name).write_bytes(b"no picture")
    for words, parts in (
        (("--model", demo, "--reference", demo, "--count", 0, "--min-agreement", 1.5),
         ("--count: got 0", "--min-agreement: got 1.5")),
        (("--model", tmp_path / "gone", demo, "--reference", demo, "--text", tmp_path / "no.txt"),
         ("no.txt: no such file", "gone: no such folder")),
        (("--model", demo, "--reference", llama, "--samples", "demo"),
         ("expected --text FILE", "--samples: a text model", "compare like with like")),
        (("--model", other, "--reference", llama, "--text", text_file),
         ("a vocabulary of 500 tokens, the reference's has 448", "its tokenizer is not the reference's")),
        (("--model", demo, "--reference", demo, "--samples", pictures), ("a.png", "b.png")),
    ):  # fmt: skip
        answer = cli("evaluate", *words)
        assert answer.code == 2 and answer.out == ""
        (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
        assert not [part for part in parts if part not in line]


def test_sizes_by_part(tmp_path):
    files = {
        "model-00001.safetensors": 10, "multi_modal_projector.safetensors": 5, "config.json": 2, "export.json": 7,
        "fastvithd.mlpackage/Data/weights/weight.bin": 20, "fastvithd.mlpackage/Manifest.json": 3,
    }  # fmt: skip
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    parts = {"bytes_vision": 23, "bytes_language": 10, "bytes_projector": 5}
    assert job.sizes(tmp_path) == {"bytes": 40} | parts


@pytest.fixture
def canned(monkeypatch):
    """Results without models: the second candidate says something else once in four times."""

    def measured(job):
        about = {"runners": {"language": "fake"}, "text": "a text", "rows": 9, "rows_kept": 4}
        if job.is_reference:
            return {"figures": {"perplexity": 2.0, "exact": 1.0}, "timings": {"load_s": 1.0}, "about": about}
        figures = {"same_answers": 0.75, "answer_kl_mean": 0.5, "perplexity": 2.5, "bytes": 2_000_000}
        answer = {"name": "1", "question": "Which\none?", "expected": "This.", "reference": "This.", "kl": 0.1}
        answers = [answer | {"candidate": "That [bold].", "same": False}, answer | {"candidate": "This.", "same": True}]
        return {"figures": figures, "timings": {"peak_gb": 1.5}, "answers": answers, "about": about}

    monkeypatch.setattr(evaluate, "measured", measured)


@pytest.mark.parametrize(("least", "code"), [((), 0), (("--min-agreement", 0.7), 0), (("--min-agreement", 0.8), 1)])
def test_agreement_makes_the_exit_code(canned, cli, least, code):
    answer = cli("evaluate", "--model", scenes.CHECKPOINT, "--reference", scenes.CHECKPOINT, "--count", 1, *least)
    out, err = answer.out, answer.err
    assert answer.code == code
    for shown in ("75.00%", "0.5", "2.00", "perplexity of a text; KL over 4 of 9 rows", "Which one? (expected: This.)"):
        assert shown in out
    assert "candidate: That [bold]." in out and "1 of 2 answers differ" in out
    assert ("below 0.8" in err) == (code == 1)


def test_a_candidate_that_fails_is_a_line_and_the_others_are_measured(canned, monkeypatch, cli, tmp_path):
    measured, hot = evaluate.measured, tmp_path / "hot"
    shutil.copytree(scenes.CHECKPOINT, hot)

    def failing(job):
        if job.model == str(hot):
            raise CheckFailed("vision encoder: features: 1 of 2 values are NaN or infinite (fake): mend it")
        return measured(job)

    def asked(model, reference, *flags):
        return cli("evaluate", "--model", *model, "--reference", reference, "--count", 1, *flags)

    monkeypatch.setattr(evaluate, "measured", failing)
    both = ([hot, scenes.CHECKPOINT], scenes.CHECKPOINT, "--min-agreement", 0.5)
    answer = asked(*both, "--json")
    failed, sound = answer.document["candidates"]
    assert answer.code == 1 and answer.err.splitlines()[-1] == f"error: hot: {failed['failed']}"
    assert answer.document["passed"] is False and sound["figures"]["same_answers"] == 0.75
    assert asked(*both).code == 1 and "75.00%" in asked(*both).out
    assert asked([hot], scenes.CHECKPOINT).code == 1  # nothing is left to show
    answer = asked([scenes.CHECKPOINT], hot)
    assert answer.code == 1 and "error: vision encoder" in answer.err


def test_end_to_end_with_a_file_of_questions(cli, tmp_path, hot_demo):
    """Three processes; the checkpoint is as good as itself, and one whose values leave float32 is an error."""
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nDescribe the picture."}]
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "mine", "image": "a.png", "conversations": turns}))
    flags = ("--samples", tmp_path / "q.jsonl", "--min-agreement", 1, "--json")
    answer = cli("evaluate", "--model", scenes.CHECKPOINT, hot_demo, "--reference", scenes.CHECKPOINT, *flags)
    candidate, hot = answer.document["candidates"]
    assert answer.code == 1 and answer.document["passed"] is False
    assert hot["failed"].startswith("projector: embeddings of a picture: ") and "fastvlm doctor" in hot["failed"]
    assert candidate["figures"]["same_answers"] == 1 and candidate["figures"]["answer_kl_mean"] == 0
    assert candidate["answers"][0]["name"] == "mine" and candidate["answers"][0]["candidate"]
    assert candidate["timings"]["peak_gb"] > 0.1 and candidate["timings"]["load_s"] > 0
    assert candidate["figures"]["bytes"] == sum(f.stat().st_size for f in scenes.CHECKPOINT.iterdir())
