"""Train the demo checkpoint from nothing: tokenizer, a reduced FastViT-MCi3, a projector and a small Qwen2.

`python -m fastvlm demo --train` runs it. The schedule, the data and the initial weights are functions of the seed.
"""

import ctypes
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from fastvlm.data.prompt import CHAT_TEMPLATE, encode_prompt

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


@dataclass(frozen=True)
class Phase:
    """What the steps before `until` train on: pictures of each sort, the guide's weight, and the questions about each
    scene, one tuple a step in turn."""

    until: int
    scenes: int
    digits: int
    guide: float
    kinds: tuple[tuple[str, ...], ...]


PHASES = (  # first what each quarter shows, then what must be searched for; descriptions are long, so they become rare
    Phase(3000, 14, 8, 0.5, (("count", "name", "locate", "describe"),)),
    Phase(4000, 11, 6, 0.0, (("count", "count", "name", "locate", "locate", "describe"),)),
    Phase(8000, 12, 5, 0.0, (("describe", "name"), *[("count", "count", "name", "locate", "locate")] * 5)),
    Phase(8900, 11, 10, 0.0, (("describe", "name"), ("count", "name", "locate"), ("count", "name", "locate"))),
)
WAKE, WOKEN = (
    8000,
    8300,
)  # steps in which the encoder's residual branches grow to a good part of their stream (`growth`)
SHARE, WAKE_RATE = 0.5, 5e-4
STEPS = PHASES[-1].until
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1.5e-3, 0.05, 200
GRID = demo.SIZE // PATCH_SIZE  # image tokens a side
IGNORED = -100  # the label that the loss skips


def phase_of(step: int) -> Phase:
    """The phase that a step belongs to."""
    return next(phase for phase in PHASES if step < phase.until)


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE over the demo's own sentences with Qwen2's normalization, splitting and special tokens."""
    rng = np.random.default_rng(0)
    corpus = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 200
    for _ in range(3000):
        things = demo.make_scene(rng)
        for kind in ("count", "name", "locate", "describe"):
            corpus += demo.ask(rng, kind, things)
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


def image_token_of(tokenizer: Qwen2Tokenizer) -> int:
    """The id of `<image>`."""
    return tokenizer.get_vocab()["<image>"]


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


class Batches:
    """The training data: `batch(step)` depends on the seed and the step alone, so a run can resume anywhere."""

    def __init__(self, tokenizer: Qwen2Tokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.image_token = image_token_of(tokenizer)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Return pixels (P, 3, S, S), what they show (see `Guide`), and ids, labels, mask (Q, T) with `picture` (Q,)
        saying whose question it is."""
        rng = np.random.default_rng([self.seed, demo._STREAM["train"], step])
        phase = phase_of(step)
        images, rows, owners = [], [], []
        shown = torch.full((phase.scenes + phase.digits, 9), IGNORED)
        for _ in range(phase.scenes):
            things = demo.make_scene(rng)
            images.append(demo.draw_scene(rng, things))
            shown[len(images) - 1, :8] = 0
            for thing in things:
                place = demo.PLACES.index(thing.place)
                shown[len(images) - 1, place] = 1 + demo.SHAPES.index(thing.shape)
                shown[len(images) - 1, 4 + place] = 1 + list(demo.COLOURS).index(thing.colour)
            for kind in phase.kinds[step % len(phase.kinds)]:
                rows.append(self._encode(*demo.ask(rng, kind, things)))
                owners.append(len(images) - 1)
        for _ in range(phase.digits):
            image, digit = demo.draw_digit(rng, int(rng.integers(len(demo.digit_scans("train")[0]))), "train")
            images.append(image)
            shown[len(images) - 1, 8] = digit
            rows.append(self._encode(*demo.ask_digit(rng, digit)))
            owners.append(len(images) - 1)
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, (tokens, asked) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, asked : len(tokens)] = torch.tensor(tokens[asked:])
            mask[row, : len(tokens)] = 1
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
        return {
            "pixels": pixels,
            "ids": ids,
            "labels": labels,
            "mask": mask,
            "picture": torch.tensor(owners),
            "shown": shown,
        }

    def _encode(self, question: str, answer: str) -> tuple[list[int], int]:
        prompt = encode_prompt(self.tokenizer, question, self.image_token, tokens_per_image(demo.SIZE))[0].tolist()
        reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *reply, self.tokenizer.eos_token_id], len(prompt)


class Guide(torch.nn.Module):
    """Linear read-outs of the image embeddings, for training only: what each quarter shows, and which digit.

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
    found = []  # (block, layer scale, last layer)
    for block in (block for stage in encoder.stages for block in stage.blocks):
        if hasattr(block, "layer_scale_1"):  # an attention block has a branch more
            found.append((block, block.layer_scale_1, block.token_mixer.proj))
            found.append((block, block.layer_scale_2, block.mlp.fc2))
        else:
            found.append((block, block.layer_scale, block.mlp.fc2))
    sizes: dict[Any, tuple[float, float]] = {}  # root mean squares of input and output

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        sizes[module] = (inputs[0].square().mean().sqrt().item(), output.square().mean().sqrt().item())

    hooks = [module.register_forward_hook(note) for block, scale, _ in found for module in (block, scale)]
    with torch.no_grad():
        encoder.eval().forward_features(pixels)
    encoder.train()
    for hook in hooks:
        hook.remove()
    shares = {layer: sizes[scale][1] / sizes[block][0] for block, scale, layer in found}
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
    _keep_freed_buffers()
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


def _keep_freed_buffers() -> None:
    """Let glibc reuse large buffers instead of faulting them in again: an eighth of the time a step (docs/LOG.md).

    For the life of the process; `model_export.mil.allocator` does it for a block, and imports go the other way.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX, malloc.h: nothing by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim


def save(model: FastVlmForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the checkpoint in the Transformers layout, float16, to `folder`, whole; an old one is replaced."""
    with staged(folder, replace=True) as staging:
        model.half().save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for name, document in _processors().items():
            (staging / name).write_text(json.dumps(document, indent=2) + "\n")
        (staging / "LICENSE").write_bytes((demo.CHECKPOINT / "LICENSE").read_bytes())  # the same data, the same terms


def _processors() -> dict[str, dict]:
    square = {"height": demo.SIZE, "width": demo.SIZE}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": demo.SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": 64,
    }
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}
