"""A task that the demo checkpoint doesn't know, to fine-tune it for: drawn bar charts, and questions about their bars.

Everything is a function of the seed; training and held-out charts come from different random streams. The answers'
words are among those that the checkpoint was trained to write: LoRA leaves the embeddings of others untrained.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from fastvlm.data.scenes import COLOURS, SIZE, Question, paper

KINDS = ("tallest", "shortest", "number")
_STREAM = {"train": 2, "test": 3}  # scenes has 0 and 1
_MOST = 4  # bars
_LOWEST, _APART = 0.3, 0.2  # of the chart's height: the lowest bar, and how much two bars differ at least


def questions(count: int, seed: int = 0, split: str = "test") -> Iterator[Question]:
    """Yield `count` questions, those of all `KINDS` about one chart, then about the next.

    `split` is "train" or "test": other random streams.
    """
    rng = np.random.default_rng([seed, _STREAM[split]])
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        if kind == KINDS[0]:
            colours, heights = _make(rng)
            image = _draw(rng, colours, heights)
        yield Question(kind, image, *_ask(kind, colours, heights))


def _make(rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Two to four colours and heights from 0 to 1, well apart, in the order of the bars."""
    count = int(rng.integers(2, _MOST + 1))
    colours = [[*COLOURS][index] for index in rng.permutation(len(COLOURS))[:count]]
    spare = 1 - _LOWEST - (count - 1) * _APART
    heights = np.sort(rng.uniform(0, spare, count)) + _LOWEST + _APART * np.arange(count)
    return colours, rng.permutation(heights)


def _ask(kind: str, colours: list[str], heights: np.ndarray) -> tuple[str, str]:
    if kind == "number":
        return "How many bars are there?", f"There are {len(colours)}."
    colour = colours[int(heights.argmax() if kind == "tallest" else heights.argmin())]
    return f"Which bar is the {kind}?", f"It is {colour}."


def _draw(rng: np.random.Generator, colours: list[str], heights: np.ndarray) -> Image.Image:
    """A chart of 256 x 256 pixels: bars of one width on a grey line."""
    image = paper(rng, 2 * SIZE)  # drawn at twice the size and reduced: smooth edges
    draw = ImageDraw.Draw(image)
    left, right, top, bottom = rng.uniform((30, 450, 30, 450), (60, 480, 60, 480))
    pitch, free = (right - left) / _MOST, _MOST - len(colours)
    start = left + pitch * rng.integers(0, free + 1)
    width = pitch * rng.uniform(0.55, 0.85)
    for index, (colour, height) in enumerate(zip(colours, heights)):
        x = start + pitch * (index + 0.5)
        tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, size=3), 0, 255)
        box = (x - width / 2, bottom - height * (bottom - top), x + width / 2, bottom)
        draw.rectangle(box, fill=tuple(int(value) for value in tint))
    draw.line((left - 12, bottom, right + 12, bottom), fill=(120, 120, 120), width=5)
    return image.reduce(2)
