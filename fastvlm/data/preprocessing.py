"""Picture -> pixel tensor: one contract for both `image_strategy` values, equal to the references to the last bit.

`pad` is apple/ml-fastvlm's predict.py: pad to a square with the mean colour, resize to S x S. `center_crop` is
Transformers' CLIPImageProcessor (and the demo app): shortest edge to S, crop the S x S centre. Both resample with
Pillow's bicubic filter on 8-bit RGB. Where this module departs from predict.py, on purpose:

- the EXIF orientation is applied (predict.py shows the model a phone's portrait lying on its side);
- 16-bit grey is scaled to 8 bit (`convert("RGB")` clips it: everything above 255 turns white).

As predict.py does: an alpha channel or transparent palette entry is dropped, leaving the colour stored beneath it
(Transformers 5 composites on white instead); colour profiles are ignored; of an animation the first frame is taken.

The demo app's pixels are not these to the bit, and by how much they differ only a Mac can tell: Core Image's
bicubicScaleTransform computes in floating point in a colour-managed space and is not rounded to 8 bit, its filter is
not Pillow's (which widens when it shrinks a picture), and the app neither truncates the longer side nor rounds the
crop's corner, so the centre may lie up to a pixel aside.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvlm.common.documents import shown
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding, Steps, collect, errors
from fastvlm.common.image_tokens import PATCH_SIZE
from fastvlm.common.settings import read_settings
from fastvlm.data.images import as_rgb

STRATEGIES = ("pad", "center_crop")

# The fourth stage attends over (S / 32)^2 positions, so its memory grows with S^4: 2048 needs 16 times that of 1024.
MAX_IMAGE_SIZE = 2048

_CHANNELS = 3
_LLAVA = "llava_qwen2"  # the model_type of the layout whose config.json speaks of pictures
_CHOOSE = "choose with predict's --image-strategy, or correct the file"


@dataclass(frozen=True)
class Preprocessor:
    """Turns a picture into the encoder's input. `image_size` S in pixels; `mean`, `std` per RGB channel, on 0…1."""

    image_size: int
    image_strategy: str
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.image_strategy not in STRATEGIES:
            raise UserError(f"image strategy {self.image_strategy!r}: expected {' or '.join(STRATEGIES)}")
        if self.image_size < 1:
            raise UserError(f"image size {self.image_size}: expected a number of pixels")
        if len(self.mean) != _CHANNELS or not all(0 <= value <= 1 for value in self.mean):
            raise UserError(f"image_mean {list(self.mean)}: expected three numbers from 0 to 1")
        if len(self.std) != _CHANNELS or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise UserError(f"image_std {list(self.std)}: expected three positive numbers")

    def __call__(self, image: Image.Image | np.ndarray | str | os.PathLike[str]) -> np.ndarray:
        """The pixel values of a picture, (value / 255 - mean) / std.

        Args:
            image: a path, a PIL image, or an array (height, width, 3) uint8, RGB.

        Returns:
            (1, 3, S, S) float32, channels in the order RGB.

        Raises:
            UserError: the picture can't be used.
        """
        square = self.square(image)
        # Transformers' order of operations and of dtypes, which fixes the last bit
        pixels: np.ndarray = (np.asarray(square, dtype=np.float64) * (1 / 255)).astype(np.float32)
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def square(self, image: Image.Image | np.ndarray | str | os.PathLike[str]) -> Image.Image:
        """The S x S RGB picture that the model sees, before it becomes numbers."""
        rgb = as_rgb(image)
        if self.image_strategy == "pad":
            return _resize(_pad_to_square(rgb, self.mean), self.image_size, self.image_size)
        return _center_crop(rgb, self.image_size)


def _pad_to_square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Centre the picture on a square of the mean colour, cut to 8 bit; an odd pixel goes below or to the right."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _center_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` (the longer one truncated, not rounded), then the centre; an odd pixel is cut below or
    to the right."""
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    image = _resize(image, size, long) if width <= height else _resize(image, long, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def read_preprocessor(folder: str | os.PathLike[str], image_strategy: str | None = None) -> Preprocessor:
    """Read the preprocessing from a checkpoint's or an artefact's own files.

    Args:
        folder: the checkpoint or artefact.
        image_strategy: "pad" or "center_crop" in place of the files' own.

    Raises:
        UserError: a file can't be read, or `preprocessor_of` refuses its settings; all findings in one line.
    """

    def steps() -> Steps[Preprocessor | None]:
        config = yield from read_settings(Path(folder) / "config.json")
        processor = yield from read_image_processor(Path(folder))
        return (yield from preprocessor_of(config, processor, image_strategy))

    preprocessor, findings = collect(steps())
    if preprocessor is None or errors(findings):
        raise UserError(f"{folder}: {'; '.join(map(str, errors(findings)))}")
    return preprocessor


def read_image_processor(folder: Path) -> Steps[dict[str, Any]]:
    """preprocessor_config.json's settings, or those in processor_config.json, where Transformers 5 nests them."""
    own = yield from read_settings(folder / "preprocessor_config.json")
    nested = {} if own else (yield from read_settings(folder / "processor_config.json"))
    return own or nested.get("image_processor", {})


def preprocessor_of(
    config: dict[str, Any], processor: dict[str, Any], image_strategy: str | None = None
) -> Steps[Preprocessor | None]:
    """The preprocessing that the checked settings of config.json and of the image processor ask for: the one decision.

    Strategy: `image_strategy`, given or the processor's (this project's key); else, in the LLaVA layout, config.json's
    `image_aspect_ratio` ("pad"; "square" or nothing is a crop); else `do_pad` or a crop. Size: mm_vision_tower's suffix
    in the LLaVA layout; else `crop_size`, `size`, or 64 * sqrt(image_seq_length). Mean 0 and standard deviation 1
    unless given. None after a finding about what is missing, contradictory or something else than these strategies.
    """
    (size, strategy), findings = collect(_size_and_strategy(config, processor, image_strategy))
    yield from findings
    if errors(findings):
        return None
    plain = not processor.get("do_normalize", True)
    mean, std = (0.0,) * _CHANNELS, (1.0,) * _CHANNELS
    return Preprocessor(
        size,
        strategy,
        mean if plain else tuple(processor.get("image_mean", mean)),
        std if plain else tuple(processor.get("image_std", std)),
    )


# What a CLIPImageProcessor may say without being another preprocessing than ours (3: bicubic).
_EXPECTED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 3}
_PROCESSOR = "preprocessor_config.json"


def _size_and_strategy(
    config: dict[str, Any], processor: dict[str, Any], image_strategy: str | None
) -> Steps[tuple[int, str]]:
    for key, expected in _EXPECTED.items():
        value = processor.get(key)
        if value is not None and not math.isclose(value, expected, rel_tol=1e-6):
            yield Finding("preprocessing-unsupported", f"{_PROCESSOR}: {key}", shown(value), shown(expected))
    size = yield from _image_size(config, processor)
    return size, image_strategy or (yield from _strategy(config, processor))


def size_in_config(config: dict[str, Any]) -> int | None:
    """The resolution in pixels that config.json implies, None if it says nothing usable."""
    tower = re.fullmatch(r".*mobileclip_l_([0-9]{1,5})", config.get("mm_vision_tower", ""), re.DOTALL)
    if tower or config.get("model_type") == _LLAVA:
        return int(tower.group(1)) if tower else None
    tokens = config.get("image_seq_length", 0)
    side = math.isqrt(tokens)
    return side * PATCH_SIZE if side and side * side == tokens else None


def _image_size(config: dict[str, Any], processor: dict[str, Any]) -> Steps[int]:
    """Side in pixels; 0 after an error."""
    crop, size, implied = processor.get("crop_size"), processor.get("size"), size_in_config(config)
    sides: dict[str, Any] = {}
    if config.get("model_type") == _LLAVA and implied is None:
        tower = shown(config.get("mm_vision_tower"))
        yield Finding("resolution-missing", "config.json: mm_vision_tower", tower, "mobileclip_l_<pixels>")
        return 0
    if "mm_vision_tower" in config and implied is not None:
        sides["mm_vision_tower"] = implied
    if crop is not None:
        both = {crop.get("height"), crop.get("width")} if isinstance(crop, dict) else {crop}
        sides["crop_size"] = both.pop() if len(both) == 1 else crop
    if size is not None:
        sides["size"] = size.get("shortest_edge", size) if isinstance(size, dict) else size
    if not sides and implied is not None:
        sides["image_seq_length"] = implied
    if not sides:
        expected = "preprocessor_config.json's crop_size or config.json's image_seq_length"
        yield Finding("resolution-missing", _PROCESSOR, "no resolution", expected)
        return 0
    first = next(iter(sides.values()))
    if any(type(side) is not int or side != first for side in sides.values()):
        listed = ", ".join(f"{key} {shown(value)}" for key, value in sides.items())
        expected = "one resolution in pixels (square, by the shortest edge)"
        yield Finding("resolution-contradictory", _PROCESSOR, listed, expected)
        return 0
    if first % PATCH_SIZE or not PATCH_SIZE <= first <= MAX_IMAGE_SIZE:
        expected = f"a multiple of {PATCH_SIZE} pixels, at most {MAX_IMAGE_SIZE}"
        yield Finding("resolution-unsupported", next(iter(sides)), str(first), expected)
    elif implied not in (None, first):
        got, used = f"{implied} pixels", f"{first}, the image processor's, which is used"
        yield Finding("resolution-contradictory", "config.json: image_seq_length", got, used, severity="warning")
    return int(first)


def _strategy(config: dict[str, Any], processor: dict[str, Any]) -> Steps[str]:
    if "image_strategy" in processor:
        return str(processor["image_strategy"])
    if config.get("model_type") == _LLAVA:
        aspect = config.get("image_aspect_ratio", "square")
        if aspect not in ("pad", "square"):
            expected = '"pad" or "square"'
            yield Finding("image-strategy-unknown", "config.json: image_aspect_ratio", shown(aspect), expected, _CHOOSE)
        return "pad" if aspect == "pad" else "center_crop"
    if processor.get("do_pad"):
        return "pad"
    if processor.get("do_center_crop") is False:
        yield Finding("image-strategy-unknown", _PROCESSOR, "neither", "do_pad or do_center_crop", _CHOOSE)
    return "center_crop"


def processor_files(image_size: int) -> dict[str, dict[str, Any]]:
    """Transformers' files about a centre crop of `image_size` pixels without normalization: name -> document."""
    size = {"height": image_size, "width": image_size}
    image_processor = {
        "crop_size": size,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full",
    }
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}
