"""The demo checkpoint's training data: pictures, and questions about them with their answers."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.data import scenes as demo
from fastvlm.data.prompt import encode_prompt

IGNORED = -100  # the label that the loss skips


class Phase(NamedTuple):
    """The training data of the steps before `until`: pictures of each sort, the guide's weight, and the questions about
    each scene, one tuple a step in turn."""

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


def phase_of(step: int) -> Phase:
    """The phase that a step belongs to."""
    return next(phase for phase in PHASES if step < phase.until)


def image_token_of(tokenizer: Qwen2Tokenizer) -> int:
    """The id of `<image>`."""
    return tokenizer.get_vocab()["<image>"]


class Batches:
    """The training data: `batch(step)` depends on the seed and the step alone, so a run can resume anywhere."""

    def __init__(self, tokenizer: Qwen2Tokenizer, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.image_token = image_token_of(tokenizer)

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Return pixels (P, 3, S, S), their content `shown` (see `Guide`), and ids, labels and mask (Q, T), with
        `picture` (Q,), the index of the picture that each question is about."""
        rng = np.random.default_rng([self.seed, demo._STREAM["train"], step])
        phase = phase_of(step)
        images, rows, owners = [], [], []
        shown = torch.full((phase.scenes + phase.digits, 9), IGNORED)
        for _ in range(phase.scenes):
            scene = demo.make_scene(rng)
            images.append(demo.draw_scene(rng, scene))
            shown[len(images) - 1, :8] = 0
            for item in scene:
                place = demo.PLACES.index(item.place)
                shown[len(images) - 1, place] = 1 + demo.SHAPES.index(item.shape)
                shown[len(images) - 1, 4 + place] = 1 + list(demo.COLOURS).index(item.colour)
            for kind in phase.kinds[step % len(phase.kinds)]:
                rows.append(self._encode(*demo.ask(rng, kind, scene)))
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
        for row, (tokens, prompt) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
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
        """The tokens of question and answer, and how many of them are the question's."""
        prompt = encode_prompt(self.tokenizer, question, self.image_token, tokens_per_image(demo.SIZE))[0].tolist()
        reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*prompt, *reply, self.tokenizer.eos_token_id], len(prompt)
