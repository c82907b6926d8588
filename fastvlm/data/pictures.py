"""Pictures to measure on: the user's folder, or else a drawn scene and noise."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastvlm.common.errors import UserError
from fastvlm.common.findings import several
from fastvlm.data import scenes
from fastvlm.data.images import open_image
from fastvlm.data.preprocessing import Preprocessor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


def files(folder: Path, flag: str = "--images") -> list[Path]:
    """The picture files of a folder, by name, unopened. Raises UserError, which names `flag`, where there are none."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: not a folder: expected one with pictures in it")
    pictures = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not pictures:
        raise UserError(f"{flag} {folder}: no pictures: expected files ending in {', '.join(SUFFIXES)}")
    return pictures


def check(chosen: Iterable[Path]) -> None:
    """Open every file once before the work starts; UserError that names all that can't be used."""
    faults = []
    for path in chosen:
        try:
            open_image(path)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(several(faults))


def drawn(count: int) -> Iterator[Image.Image]:
    """The first `count` of an endless series of drawn scenes, always the same."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield scenes.draw_scene(rng, scenes.make_scene(rng))


def pixels(
    preprocessor: Preprocessor, image_size: int, chosen: Iterable[Callable[[], Image.Image]] | None = None
) -> Iterator[np.ndarray]:
    """Pixels (1, 3, S, S) float32, S = image_size, of pictures, one at a time; None: a drawn scene, then `noise`."""
    prepare = replace(preprocessor, image_size=image_size)
    if chosen is not None:
        for image in chosen:
            yield prepare(image())
        return
    yield prepare(next(drawn(1)))
    yield noise(image_size)


def noise(image_size: int, seed: int = 0) -> np.ndarray:
    """N(0, 1) noise (1, 3, S, S) float32, the same for the same seed: harsher than pictures, which lie in [0, 1].

    fastvlm-coreai (scripts/probe_activations.py) measured the published weights' largest activations on such noise.
    """
    return np.random.default_rng(seed).standard_normal((1, 3, image_size, image_size), dtype=np.float32)
