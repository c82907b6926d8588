"""The pictures of a parity run: the demo set for the demo checkpoint, drawn ones for another, and the user's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastvlm.data import pictures, scenes
from fastvlm.data.images import open_image

LIMIT = 40  # demo questions; the whole held-out set is 500
COREAI_LIMIT = 8  # of a Core AI bundle, whose interpreter takes two seconds for each
PROMPT = "Describe the image."
_DRAWN = 4  # pictures for a checkpoint that was not trained on them: their answers say little, their features all


@dataclass(frozen=True)
class Picture:
    """One picture and its question; `truth` where the answer is known. `source` is "demo", "drawn" or "yours"."""

    name: str
    image: Image.Image
    question: str
    truth: str | None
    source: str


def choose(checkpoint: Path, images: Path | None, limit: int) -> list["Picture | Path"]:
    """The pictures of a run: at most `limit` demo questions (a few drawn pictures if the checkpoint does not know the
    demo's language), then at most `limit` of the files in `images`, not yet opened.

    Raises UserError for a folder without pictures: nothing compared is no comparison.
    """
    chosen: list[Picture | Path] = [*(_demo(limit) if scenes.knows_demo(checkpoint) else _drawn(min(limit, _DRAWN)))]
    return [*chosen, *pictures.files(images)[:limit]] if images else chosen


def opened(chosen: list["Picture | Path"]) -> Iterator[Picture]:
    """Each chosen picture, the user's files opened one at a time. UserError for a file that is no picture."""
    for item in chosen:
        yield item if isinstance(item, Picture) else Picture(item.name, open_image(item), PROMPT, None, "yours")


def check(chosen: list["Picture | Path"]) -> None:
    """Open every file once before the work starts. Raises UserError naming all that are no usable pictures."""
    pictures.check(item for item in chosen if isinstance(item, Path))


def _demo(count: int) -> Iterator[Picture]:
    for number, question in enumerate(scenes.questions(count, seed=0, split="test")):
        yield Picture(f"{question.kind} {number}", question.image, question.question, question.answer, "demo")


def _drawn(count: int) -> Iterator[Picture]:
    for number, image in enumerate(pictures.drawn(count)):
        yield Picture(f"drawn {number}", image, PROMPT, None, "drawn")
