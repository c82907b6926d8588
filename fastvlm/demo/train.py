"""Train the demo checkpoint from nothing: tokenizer, a reduced FastViT-MCi3, a projector and a small Qwen2.

`fastvlm demo --train` runs it. The schedule, the data and the initial weights are functions of the seed.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Tokenizer

from fastvlm.common.cli import log
from fastvlm.common.image_tokens import PATCH_SIZE, tokens_per_image
from fastvlm.common.staging import staged
from fastvlm.data import scenes as demo
from fastvlm.data.preprocessing import processor_files
from fastvlm.data.prompt import CHAT_TEMPLATE
from fastvlm.demo.batches import IGNORED, PHASES, Batches, image_token_of, phase_of

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")  # Qwen2's order, then the image token
VOCABULARY = 512 - len(SPECIALS)  # at most; the sentences run out of merges before
# Every stage of FastViTHD with its own mixer; layer scales start large enough that no block is idle.
VISION: dict[str, Any] = {
    "layers": [1, 1, 2, 1, 1],
    "embed_dims": [8, 16, 32, 96, 192],
    "layer_scale_init_value": 0.5,
    "inference_mode": False,
}
TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


# Steps in which the encoder's residual branches grow to a good part of their stream (`growth`).
WAKE, WOKEN = 8000, 8300
SHARE, WAKE_RATE = 0.5, 5e-4
STEPS = PHASES[-1].until
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1.5e-3, 0.05, 200
GRID = demo.SIZE // PATCH_SIZE  # image tokens a side


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE over the demo's own sentences with Qwen2's normalization, splitting and special tokens."""
    rng = np.random.default_rng(0)
    corpus = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 200
    for _ in range(3000):
        scene = demo.make_scene(rng)
        for kind in ("count", "name", "locate", "describe"):
            corpus += demo.ask(rng, kind, scene)
        corpus += demo.ask_digit(rng, int(rng.integers(10)))
    untrained = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokens = model["vocab"] | {token: len(model["vocab"]) + index for index, token in enumerate(SPECIALS)}
    merges: Any = [tuple(merge) for merge in model["merges"]]  # pairs, whatever the annotation says
    tokenizer = Qwen2Tokenizer(
        vocab=tokens,
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS], special_tokens=True)
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> FastVlmForConditionalGeneration:
    """The untrained model in training form."""
    width = 2 * VISION["embed_dims"][-1]
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": width,
            "num_labels": 0,
            "model_args": VISION,
        },
        text_config={**TEXT, "vocab_size": -(-len(tokenizer) // 64) * 64, "eos_token_id": tokenizer.eos_token_id},
        image_token_index=image_token_of(tokenizer),
        image_seq_length=tokens_per_image(demo.SIZE),
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return FastVlmForConditionalGeneration(config)


class Guide(torch.nn.Module):
    """Linear read-outs of the image embeddings, for training only: each quarter's shape and colour, and the digit.

    They give the encoder a direct gradient. Without them it learns colours and places in 500 steps but still calls
    every shape a star after 1,000 (docs/LOG.md).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.quarter = torch.nn.Linear(width, 1 + len(demo.SHAPES) + 1 + len(demo.COLOURS))
        self.digit = torch.nn.Linear(width, 10)

    def forward(self, embeddings: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropies; embeddings (P, N, H), shown (P, 9): four shapes, four colours, the digit."""
        loss = torch.nn.functional.cross_entropy
        grid = embeddings.transpose(1, 2).unflatten(2, (GRID, GRID))
        quarters = torch.nn.functional.avg_pool2d(grid, GRID // 2).flatten(2).transpose(1, 2)
        shape, colour = self.quarter(quarters).split([1 + len(demo.SHAPES), 1 + len(demo.COLOURS)], dim=2)
        read = loss(self.digit(embeddings.mean(1)), shown[:, 8], ignore_index=IGNORED)
        seen = loss(shape.transpose(1, 2), shown[:, :4], ignore_index=IGNORED)
        return read + seen + loss(colour.transpose(1, 2), shown[:, 4:8], ignore_index=IGNORED)


def growth(model: FastVlmForConditionalGeneration, pixels: torch.Tensor) -> list[tuple[Any, float]]:
    """The last layer of each of the encoder's residual branches, and the factor a step by which it is to grow.

    timm starts these layers at 0.02 and this task never asked for more: with the sign of a whole branch turned, 200 of
    200 answers stayed. So that an error there shows, the branches grow in steps `WAKE` to `WOKEN` to `SHARE` or more of
    the stream that they are added to (root mean square over `pixels`), while training goes on.
    """
    encoder = model.model.vision_tower.timm_model
    branches = []  # (block, layer scale, last layer)
    for block in (block for stage in encoder.stages for block in stage.blocks):
        if hasattr(block, "layer_scale_1"):  # an attention block has a branch more
            branches.append((block, block.layer_scale_1, block.token_mixer.proj))
            branches.append((block, block.layer_scale_2, block.mlp.fc2))
        else:
            branches.append((block, block.layer_scale, block.mlp.fc2))
    sizes: dict[Any, tuple[float, float]] = {}  # root mean squares of input and output

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        sizes[module] = (inputs[0].square().mean().sqrt().item(), output.square().mean().sqrt().item())

    hooks = [module.register_forward_hook(note) for block, scale, _ in branches for module in (block, scale)]
    with torch.no_grad():
        encoder.eval().forward_features(pixels)
    encoder.train()
    for hook in hooks:
        hook.remove()
    shares = {layer: sizes[scale][1] / sizes[block][0] for block, scale, layer in branches}
    return [(layer, max(1.0, SHARE / share) ** (1 / (WOKEN - WAKE))) for layer, share in shares.items()]


@torch.no_grad()
def grow(factors: list[tuple[Any, float]]) -> None:
    """One step's growth of every layer that `growth` named."""
    for layer, factor in factors:
        for parameter in layer.parameters():
            parameter.mul_(factor)


def rate(step: int) -> float:
    """The learning rate: warm-up and cosine until `WAKE`, then a line to nothing."""
    if step >= WAKE:
        return WAKE_RATE * min((step - WAKE + 1) / 50, (STEPS - step) / (STEPS - WOKEN), 1)
    return LEARNING_RATE * min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / WAKE) + 1e-3)


def loss_of(
    model: FastVlmForConditionalGeneration, guide: Guide, batch: dict[str, torch.Tensor], image_token: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers' mean cross-entropy and the guide's; each picture is encoded once for all its questions."""
    vision = model.model.vision_tower.timm_model.forward_features(batch["pixels"])
    embeddings = model.model.multi_modal_projector(vision.flatten(2).transpose(1, 2))
    embeds = model.get_input_embeddings()(batch["ids"])
    places = (batch["ids"] == image_token).unsqueeze(-1)
    embeds = embeds.masked_scatter(places, embeddings[batch["picture"]].to(embeds.dtype))
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["mask"]).last_hidden_state
    answered = batch["labels"][:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][answered])
    answers = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][answered])
    return answers, guide(embeddings, batch["shown"])


def train(
    seed: int = 0, advance: Callable[[], None] = lambda: None
) -> tuple[FastVlmForConditionalGeneration, Qwen2Tokenizer]:
    """Train from nothing and return the model (eval mode) and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model, guide = make_model(tokenizer).train(), Guide(TEXT["hidden_size"])
    named = [*model.named_parameters(), *guide.named_parameters()]
    matrices = {name for name, parameter in named if parameter.ndim > 1 and "gamma" not in name}
    groups = [
        {"params": [p for n, p in named if n in matrices], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named if n not in matrices], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    batches, average, started = Batches(tokenizer, seed), None, time.monotonic()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        if step == WAKE:
            factors = growth(model, batches(step)["pixels"])
        answers, guided = loss_of(model, guide, batches(step), batches.image_token)
        optimizer.zero_grad(set_to_none=True)
        (answers + phase_of(step).guide * guided).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if WAKE <= step < WOKEN:
            grow(factors)
        now = np.array([answers.item(), guided.item()])
        average = now if average is None else 0.98 * average + 0.02 * now
        if step % 100 == 99:
            pace = (time.monotonic() - started) / (step + 1)
            log(f"step {step + 1}/{STEPS}: loss {average[0]:.4f} (guide {average[1]:.4f}), {pace:.2f} s a step")
        advance()
    return model.eval(), tokenizer


def save(model: FastVlmForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the checkpoint in the Transformers layout, float16, to `folder`, whole; an old one is replaced."""
    with staged(folder, replace=True) as staging:
        model.half().save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for name, document in processor_files(demo.SIZE).items():
            (staging / name).write_text(json.dumps(document, indent=2) + "\n")
        (staging / "LICENSE").write_bytes((demo.CHECKPOINT / "LICENSE").read_bytes())  # the same data, the same terms
