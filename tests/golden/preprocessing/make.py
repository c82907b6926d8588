"""Make the photographs and golden.json of this folder: `python tests/golden/preprocessing/make.py`.

The expected pixels come from Transformers' CLIPImageProcessorPil and from NumPy, and share no code with
fastvlm.data.preprocessing. The photographs are scikit-learn's two samples, cut, shrunk and stored in many ways.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE = 256
STRATEGIES = ("pad", "center_crop")
HUGE_FACTOR = 10
PLACES = ((5, 9), (128, 128), (250, 77))
# The EXIF orientation as NumPy sees (height, width, channel): (quarter turns counter-clockwise, mirrored before them).
ORIENTATIONS = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (3, 0), 7: (3, 1), 8: (1, 0)}


def upright(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8 as a viewer shows it; 16-bit grey scaled to 8."""
    if image.mode.startswith("I;16"):
        grey = np.rint(np.asarray(image).astype(np.float64) / 65535 * 255).astype(np.uint8)
        rgb = np.stack([grey] * 3, axis=2)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on dropping a palette's transparency, which predict.py does
            rgb = np.asarray(image.convert("RGB"))
    turns, mirrored = ORIENTATIONS[image.getexif().get(0x0112, 1)]
    return np.rot90(rgb[:, ::-1] if mirrored else rgb, turns)


def reference(image: Image.Image, strategy: str, size: int, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> np.ndarray:
    """(1, 3, size, size) float32, as predict.py ("pad") or Transformers ("center_crop") gets it from an RGB picture."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rgb = upright(image)
    if strategy == "pad":
        height, width, _ = rgb.shape
        side = max(height, width)
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = np.floor(np.multiply(mean, 255)).astype(np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = rgb
        rgb = canvas
    processor = CLIPImageProcessorPil(
        crop_size={"height": size, "width": size}, size={"shortest_edge": size}, image_mean=mean, image_std=std
    )
    return processor.preprocess(Image.fromarray(np.ascontiguousarray(rgb)), return_tensors="np")["pixel_values"]


def huge() -> Image.Image:
    """15 megapixels, not stored: landscape.jpg with every pixel repeated."""
    with Image.open(HERE / "landscape.jpg") as image:
        return image.resize((image.width * HUGE_FACTOR, image.height * HUGE_FACTOR), Image.Resampling.NEAREST)


def load(name: str) -> Image.Image:
    return huge() if name == "huge" else Image.open(HERE / name)


def summary(pixels: np.ndarray) -> dict:
    """What golden.json keeps of (1, 3, S, S) pixel values: a hash, 8 x 8 block means and three pixels."""
    blocks = pixels.reshape(3, 8, SIZE // 8, 8, SIZE // 8).mean(axis=(2, 4), dtype=np.float64)
    return {
        "sha256": hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest(),
        "block_means": np.round(blocks, 6).tolist(),
        "pixels": {f"{row},{column}": pixels[0, :, row, column].tolist() for row, column in PLACES},
    }


def write_photographs() -> None:
    from sklearn.datasets import load_sample_images

    china, flower = (Image.fromarray(array) for array in load_sample_images().images)
    shrink = Image.Resampling.LANCZOS
    china.resize((481, 321), shrink).save(HERE / "landscape.jpg", quality=85)
    portrait = flower.crop((150, 0, 451, 427)).resize((251, 357), shrink)
    portrait.save(HERE / "portrait.jpg", quality=85)
    flower.resize((23, 17), shrink).save(HERE / "tiny.png")
    small = china.resize((161, 108), shrink)
    small.convert("L").save(HERE / "grey.jpg", quality=85)
    small.convert("CMYK").save(HERE / "cmyk.jpg", quality=85)
    with_alpha = flower.resize((140, 93), shrink).convert("RGBA")
    with_alpha.putalpha(Image.linear_gradient("L").resize((140, 93)))
    with_alpha.save(HERE / "rgba.png")
    palette = small.quantize(64)
    palette.save(HERE / "palette.png", transparency=bytes(range(0, 256, 4)))
    blocks = np.asarray(china.convert("L"), np.float64)[:424].reshape(106, 4, 160, 4).mean(axis=(1, 3))
    Image.fromarray(np.rint(blocks * 257).astype(np.uint16)).save(HERE / "grey16.png")  # means of 16: 12 bit and more
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise, as phones held upright write it
    portrait.rotate(90, expand=True).save(HERE / "exif_rotated.jpg", quality=85, exif=exif)


def main() -> None:
    if "--keep-photographs" not in sys.argv:
        write_photographs()
    names = sorted(path.name for path in HERE.iterdir() if path.suffix in (".jpg", ".png"))
    lines = []
    for name in [*names, "huge"]:
        expected = {strategy: summary(reference(load(name), strategy, SIZE)) for strategy in STRATEGIES}
        lines.append(f"{json.dumps(name)}: {json.dumps(expected)}")
    (HERE / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
