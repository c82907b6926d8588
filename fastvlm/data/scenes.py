"""The demo set: drawn pictures and handwritten digits with questions, and the score of a model's answers.

Everything is a function of a seed. Training and test pictures come from different random streams, and test digits
from scans that training never sees.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastvlm.common.documents import object_or_empty

CHECKPOINT = Path(__file__).parents[1] / "demo_checkpoint"
SIZE = 256  # pixels; 16 image tokens at 64 pixels a token
KINDS = ("count", "name", "locate", "describe", "digit")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
_STREAM = {"train": 0, "test": 1}
_TEST_SCANS = 360  # of scikit-learn's 1,797


# Printed where the demo checkpoint is asked about a picture: about others its answers are confident nonsense.
KNOWS = (
    "note: the demo checkpoint knows drawn scenes of coloured shapes and handwritten digits, and nothing else: about a"
    " photograph its answers mean nothing (`fastvlm download` gets a checkpoint that knows photographs)"
)


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its one right answer."""

    kind: str
    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class _Item:
    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def knows_demo(checkpoint: Path) -> bool:
    """Whether the checkpoint, or an artefact of it, speaks the demo's language: it has the demo checkpoint's tokens."""
    own, demos = (object_or_empty(folder / "tokenizer.json").get("model") for folder in (checkpoint, CHECKPOINT))
    return isinstance(own, dict) and isinstance(demos, dict) and own.get("vocab") == demos["vocab"]


def questions(count: int, seed: int = 0, split: str = "test") -> Iterator[Question]:
    """Yield `count` questions, the kinds of `KINDS` in turn, each about a picture of its own.

    `split` is "train" or "test": other random streams, other digit scans.
    """
    rng = np.random.default_rng([seed, _STREAM[split]])
    scans = rng.permutation(len(digit_scans(split)[0]))
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        if kind == "digit":
            scan = int(scans[(index // len(KINDS)) % len(scans)])
            image, digit = draw_digit(rng, scan, split)
            yield Question(kind, image, *ask_digit(rng, digit))
        else:
            scene = make_scene(rng)
            yield Question(kind, draw_scene(rng, scene), *ask(rng, kind, scene))


def make_scene(rng: np.random.Generator) -> list[_Item]:
    """Choose one to four items, at most one in each quarter of the picture, in reading order."""
    places = sorted(rng.permutation(4)[: rng.integers(1, 5)])
    colours, palette = list(COLOURS), rng.permutation(6)[:3]  # few colours, so that some repeat
    return [_Item(colours[palette[rng.integers(3)]], SHAPES[rng.integers(5)], PLACES[place]) for place in places]


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]


def ask(rng: np.random.Generator, kind: str, scene: list[_Item]) -> tuple[str, str]:
    """Return a question of `kind` about the scene and its answer."""
    return {"count": _count, "name": _name, "locate": _locate, "describe": _describe}[kind](rng, scene)


def _count(rng: np.random.Generator, scene: list[_Item]) -> tuple[str, str]:
    present = scene[rng.integers(len(scene))]
    by = rng.integers(3)
    if by == 0:
        noun, number = "shape", len(scene)
    elif by == 1:
        noun = present.shape if rng.random() < 0.75 else SHAPES[rng.integers(5)]
        number = sum(item.shape == noun for item in scene)
    else:
        colour = present.colour if rng.random() < 0.75 else list(COLOURS)[rng.integers(6)]
        noun, number = f"{colour} shape", sum(item.colour == colour for item in scene)
    plural = f"{noun}es" if noun.endswith("ss") else f"{noun}s"
    question = _pick(rng, f"How many {plural} are there?", f"Count the {plural}.")
    if number == 0:
        return question, f"There are no {plural}."
    return question, f"There is 1 {noun}." if number == 1 else f"There are {number} {plural}."


def _name(rng: np.random.Generator, scene: list[_Item]) -> tuple[str, str]:
    item = scene[rng.integers(len(scene))]
    alone = sum(other.shape == item.shape for other in scene) == 1
    if alone and rng.random() < 0.3:
        return _pick(
            rng, f"What colour is the {item.shape}?", f"Which colour has the {item.shape}?"
        ), f"The {item.shape} is {item.colour}."
    question = _pick(rng, f"What is at the {item.place}?", f"Name the shape at the {item.place}.")
    return question, f"It is a {item.name}."


def _locate(rng: np.random.Generator, scene: list[_Item]) -> tuple[str, str]:
    unique = [item for item in scene if sum(other.name == item.name for other in scene) == 1]
    if not unique:  # two or more of one kind and nothing else: name where they are
        item = scene[0]
        where = " and the ".join(other.place for other in scene)
        return f"Where are the {item.colour} shapes?", f"They are at the {where}."
    item = unique[rng.integers(len(unique))]
    return _pick(
        rng, f"Where is the {item.name}?", f"Locate the {item.name}."
    ), f"The {item.name} is at the {item.place}."


def _describe(rng: np.random.Generator, scene: list[_Item]) -> tuple[str, str]:
    text = ", ".join(f"a {item.name} at the {item.place}" for item in scene)
    return _pick(rng, "Describe the picture.", "Describe the image.", "What is in the picture?"), f"A{text[1:]}."


def ask_digit(rng: np.random.Generator, digit: int) -> tuple[str, str]:
    """Return a question about a handwritten digit and its answer."""
    return _pick(
        rng, "Which digit is this?", "Read the digit.", "What number is written here?"
    ), f"The digit is {digit}."


def paper(rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """A light background with a soft gradient."""
    corners = rng.integers(215, 256, size=(2, 2, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)


def draw_scene(rng: np.random.Generator, scene: list[_Item]) -> Image.Image:
    """Draw the items, 256 × 256 RGB; place, size, tilt and colour vary."""
    image = paper(rng, 2 * SIZE)  # drawn at twice the size and reduced: smooth edges
    draw = ImageDraw.Draw(image)
    for item in scene:
        row, column = divmod(PLACES.index(item.place), 2)
        centre = np.array([column, row]) * SIZE + SIZE / 2 + rng.uniform(-40, 40, size=2)
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[item.colour]) + rng.integers(-18, 19, size=3), 0, 255))
        _draw_shape(draw, item.shape, centre, rng.uniform(48, 84), rng.uniform(-0.25, 0.25), colour)
    return image.reduce(2)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, tilt: float, colour: tuple
) -> None:
    if shape == "circle":
        draw.ellipse([*(centre - radius), *(centre + radius)], fill=colour)
        return
    if shape == "cross":
        arm = 0.36
        outline = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        points = [*outline, *((-x, -y) for x, y in outline)]
    else:
        corners, inner = {"square": (4, 0), "triangle": (3, 0), "star": (5, 0.45)}[shape]
        start = math.pi / 4 if shape == "square" else -math.pi / 2
        steps = 2 * corners if inner else corners
        points = []
        for step in range(steps):
            angle = start + 2 * math.pi * step / steps
            reach = inner if inner and step % 2 else 1.15
            points.append((reach * math.cos(angle), reach * math.sin(angle)))
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    draw.polygon([tuple(centre + radius * (turn @ np.array(point))) for point in points], fill=colour)


@cache
def digit_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 8 × 8 scans (n, 8, 8) in 0…16 and their digits (n,); 360 of the 1,797 are the test's alone."""
    from sklearn.datasets import load_digits  # 1 s to import

    data = load_digits()
    order = np.random.default_rng(1797).permutation(len(data.target))
    chosen = order[:_TEST_SCANS] if split == "test" else order[_TEST_SCANS:]
    return data.images[chosen], data.target[chosen]


def draw_digit(rng: np.random.Generator, scan: int, split: str) -> tuple[Image.Image, int]:
    """Draw one scan as ink on paper, 256 × 256 RGB; returns the picture and its digit."""
    images, digits = digit_scans(split)
    side = int(rng.integers(150, 225))
    scanned = np.pad(images[scan] * (255 / 16), 1).astype(np.uint8)  # scans touch their edges; turning would clip them
    ink = Image.fromarray(scanned).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    image = paper(rng)
    colour = tuple(int(c) for c in rng.integers(0, 90, size=3))
    x, y = rng.integers(0, SIZE - side + 1, size=2)
    image.paste(colour, (int(x), int(y)), ink)
    return image, int(digits[scan])


def evaluate(answer: Callable[[Question], str], entries: Iterator[Question]) -> dict[str, tuple[int, int]]:
    """Ask every question; returns {kind: (exact answers, questions)}."""
    score = {kind: (0, 0) for kind in KINDS}
    for question in entries:
        right, total = score[question.kind]
        score[question.kind] = (right + (answer(question).strip() == question.answer), total + 1)
    return score
