"""Every kind of fine-tune on a tiny checkpoint: what changes, what is written, and that it is what was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.finetune import run as running
from fastvlm.finetune.model import Pictures, Trainee
from fastvlm.finetune.plan import plan
from fastvlm.finetune.training import train
from fastvlm.model.build import build
from tests.fastvlm.finetune import finetunes
from tests.helpers import contents

pytestmark = pytest.mark.slow

VISION, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
LANGUAGE = ("model.language_model.", "lm_head.")
KINDS = {  # settings, and what they train in full
    "projector": ({"train": "projector", "learning_rate": 0.05}, (PROJECTOR,)),
    "llm": ({"projector_learning_rate": 0.01}, (PROJECTOR,)),
    "llm full": ({"full": True, "learning_rate": 0.002}, (PROJECTOR, *LANGUAGE)),
    "all": ({"train": "all", "projector_learning_rate": 0.001, "learning_rate": 0.003}, (PROJECTOR, VISION)),
    "all full": ({"train": "all", "full": True, "learning_rate": 0.001}, (PROJECTOR, *LANGUAGE, VISION)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return finetunes.write_records(tmp_path_factory.mktemp("records") / "data")[0].parent


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_written(kind, tiny_llava_training, tiny_fast_vlm_training, data, tmp_path):
    """The base stays; only the stage's weights change, BatchNorm's statistics never; the loss falls; and the written
    weights, through the reader of checkpoints and adapters, have Trainer's own evaluation loss: of single records in
    plain PyTorch, so that padding, labels, kept features and the cut logits are right as well."""
    base = tiny_llava_training if "full" in kind else tiny_fast_vlm_training
    others, whole = KINDS[kind]
    before, output = contents(base), tmp_path / "out"
    given = finetunes.settings(
        str(base), str(data), str(output), evaluation_data=data / "held.json", batch_size=4, **others
    )
    planned = plan(given)
    document = running.run(planned)
    assert contents(base) == before and not (tmp_path / ".out.resume").exists()
    assert document["losses"][-1]["loss"] < 0.9 * document["losses"][0]["loss"]

    if document["kind"] == "checkpoint":
        trained = open_checkpoint(output)
        assert trained.layout == "llava_qwen2"
    else:
        trained = open_checkpoint(base, adapter=output)
    original = open_checkpoint(base)
    changed = {name for name in original.tensors if not torch.equal(original.read(name), trained.read(name))}
    statistics = {name for name in original.tensors if name.endswith((".running_mean", ".running_var"))}
    expected = {name for name in original.tensors if name.startswith(whole)} - statistics
    if document["kind"] == "adapter":
        expected |= {name for name in original.tensors if name.endswith("_proj.weight") and LANGUAGE[0] in name}
    assert statistics and changed <= expected and len(changed) > 0.9 * len(expected), expected - changed

    model = build(trained)
    real = sum(parameter.numel() for parameter in Trainee(planned, "cpu", "float32").parameters().values())
    assert document["parameters"]["trained"] == real
    rows = json.loads((output / "evaluation.json").read_text())
    losses = [_losses(model, trained, row) for row in rows]
    assert np.mean(np.concatenate(losses)) == pytest.approx(document["evaluation_losses"][-1]["loss"], rel=1e-4)
    control = [_losses(build(original), original, row) for row in rows]
    assert abs(np.mean(np.concatenate(control)) - document["evaluation_losses"][-1]["loss"]) > 0.01
    assert {"page.html", "loss.png", "tokenizer_config.json", "LICENSE", "training_pictures.json"} <= contents(
        output
    ).keys()


def _losses(model, checkpoint, row) -> np.ndarray:
    """The cross entropies of a record's answer, its <|im_end|> and the newline behind that."""
    tokenizer, token = checkpoint.tokenizer(), checkpoint.image_token_id
    (_, question), (_, answer) = (turn.values() for turn in row["conversations"])
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = f"{question.removeprefix('<image>')}<|im_end|>\n<|im_start|>assistant\n"
    first, second, learnt = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (head, tail, f"{answer}<|im_end|>\n")
    )
    ids = torch.tensor([[*first, *[token] * 4, *second, *learnt]])
    pixels = torch.from_numpy(checkpoint.preprocessor(Image.open(row["image"])))
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    places = logits[-1 - len(learnt) : -1].log_softmax(-1)
    return -places[range(len(learnt)), learnt].numpy()


def test_checkpointing_changes_nothing_and_bfloat16_is_near(tiny_fast_vlm_training, data, tmp_path):
    """Activations that are computed again give the same weights; bfloat16 other ones, near them."""
    trained = {}
    for name, others in {
        "plain": {},
        "again": {"gradient_checkpointing": True},
        "short": {"dtype": "bfloat16"},
        "accumulated": {"batch_size": 1, "gradient_accumulation": 3},
    }.items():
        given = finetunes.settings(
            str(tiny_fast_vlm_training),
            str(data),
            "nowhere",
            evaluation_split=0.0,
            epochs=2,
            learning_rate=0.001,
            **others,
        )
        dtype = given.dtype.replace("auto", "float32")
        trainee = Trainee(plan(given), "cpu", dtype)
        train(trainee, Pictures(trainee), tmp_path / name, dtype)
        trained[name] = {name: parameter.detach() for name, parameter in trainee.parameters().items()}
    base = trained["plain"]
    assert all(value.dtype == torch.float32 for values in trained.values() for value in values.values())

    def apart(name: str) -> float:
        return max(float((base[key] - trained[name][key]).abs().max()) for key in base)

    moved = max(float(value.abs().max()) for key, value in base.items() if "lora_B" in key)  # it starts at 0
    assert apart("again") < 1e-5 and apart("accumulated") < 0.02 * moved
    assert 1e-6 < apart("short") < moved


def test_the_split_keeps_pictures_apart(data, tiny_fast_vlm):
    planned = plan(finetunes.settings(str(tiny_fast_vlm), str(data), "nowhere", evaluation_split=0.3, seed=1))
    training, evaluation = ({*part.pictures} for part in (planned.training, planned.evaluation))
    assert 3 <= len(planned.evaluation.records) <= 6 and not training & evaluation
    other = plan(finetunes.settings(str(tiny_fast_vlm), str(data), "nowhere", evaluation_split=0.3, seed=2))
    assert other.evaluation.records != planned.evaluation.records
