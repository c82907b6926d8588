"""Picture files of any format as upright 8-bit RGB; an absurd one is refused before it is decoded."""

import logging
import os
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

from fastvlm.common.documents import LFS_MAGIC
from fastvlm.common.errors import UserError

# What a picture's header may claim before a pixel is decoded. Pillow's own limit for a decompression bomb:
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 30  # of a file: three times what so many pixels take uncompressed
# Padding squares the longer side: 20,000 pixels make a 1.2 GB square.
MAX_SIDE = 20_000
# A decoder goes over the whole picture once for each scan of a progressive JPEG: libjpeg writes 10, mozjpeg up to 14.
MAX_SCANS = 50
_SEGMENT = re.compile(rb"\xff+([\x01-\xcf\xd9-\xfe])", re.DOTALL)
# At 100 : 1, padding leaves the picture 10 rows of 1024, and cropping shows a hundredth of it.
MAX_ASPECT = 100

# Formats that Pillow decodes itself. Not EPS, WMF and the like, which start other programs or need a renderer.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
_CHANNELS = 3


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file as upright 8-bit RGB.

    Raises:
        UserError: the file is missing, no picture, damaged, or beyond the limits above.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: a {'folder' if path.is_dir() else 'special file'}, expected a picture file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, the limit is {MAX_BYTES:,}: save the picture smaller")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    with stream, _quiet():
        head = stream.read(32)
        stream.seek(0)
        if _is_heic(head):
            _register_heic(path)
        try:
            image = Image.open(stream, formats=("HEIF",) if _is_heic(head) else FORMATS)
        except UnidentifiedImageError as error:
            raise UserError(f"{path}: {_what_is_it(head)}") from error
        except Image.DecompressionBombError as error:
            raise UserError(f"{path}: more than {MAX_PIXELS:,} pixels, the limit: scale the picture down") from error
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything on a file made to break it
            raise UserError(f"{path}: not a usable picture ({_reason(error)})") from error
        return _upright_rgb(image, str(path))


def as_rgb(image: Image.Image | np.ndarray | str | os.PathLike[str]) -> Image.Image:
    """Convert a picture to upright 8-bit RGB.

    Args:
        image: a path, a PIL image (treated as its file would be), or an array (height, width, 3) uint8, RGB.

    Raises:
        UserError: the picture can't be used, or the array is of another type or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        return open_image(image)
    if isinstance(image, Image.Image):
        with _quiet():
            return _upright_rgb(image, "picture")
    if not isinstance(image, np.ndarray):
        raise UserError(f"picture: got {type(image).__name__}, expected a path, a PIL image or a uint8 array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != _CHANNELS:
        raise UserError(f"picture: got a {image.dtype} array {image.shape}, expected uint8 (height, width, 3), RGB")
    _check_size(image.shape[1], image.shape[0], "picture")
    return Image.fromarray(np.ascontiguousarray(image))


def _upright_rgb(image: Image.Image, where: str) -> Image.Image:
    _check_size(*image.size, where)
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.fp is not None:  # not decoded yet
        image.fp.seek(0)
        _check_scans(image.fp.read(), where)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{where}: damaged or truncated ({_reason(error)})") from error
    try:
        upright = ImageOps.exif_transpose(image)
        return _to_8_bit(upright, where).convert("RGB")
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot become RGB from mode {image.mode} ({_reason(error)})") from error


def _check_size(width: int, height: int, where: str) -> None:
    """Raise UserError for sizes that must not be decoded."""
    size = f"{where}: {width} x {height} pixels"
    if width < 1 or height < 1:
        raise UserError(f"{size}: nothing to see")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(f"{size}: longer than {MAX_ASPECT} : 1, nothing would be left to see: crop the picture")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise UserError(f"{size}: limits are {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all: scale the picture down")


def _check_scans(jpeg: bytes, where: str) -> None:
    """Raise UserError for a JPEG of many scans: a few bytes each make the decoder go over all pixels again."""
    position = scans = 0
    # A marker, and the length of its segment (ITU-T T.81 B.1.1.4); in a scan's data, 00 or D0 to D7 follows FF.
    while (marker := _SEGMENT.search(jpeg, position)) and marker[1] != b"\xd9":  # the end of the picture
        scans += marker[1] == b"\xda"
        if scans > MAX_SCANS:
            raise UserError(f"{where}: a JPEG of more than {MAX_SCANS} scans, which no camera writes: save it anew")
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")


def _to_8_bit(image: Image.Image, where: str) -> Image.Image:
    """16-bit grey (Pillow's modes I;16* and, from some formats, I) scaled to 8 bit: 0…65535 -> 0…255, rounded."""
    if image.mode == "F":
        raise UserError(f"{where}: floating-point pixels have no defined white: save the picture with 8 or 16 bit")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{where}: values from {values.min()} to {values.max()}: expected 16 bit at most, unsigned")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Pillow's warnings about odd files: a file is either usable or refused."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS


def _register_heic(path: Path) -> None:
    """Let Pillow read HEIC, which iPhones write; UserError where the package for it is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        convert = f"`sips -s format jpeg {shlex.quote(path.name)} --out a.jpg`"
        raise UserError(
            f"{path}: an HEIC picture: `pip install pillow-heif` to read it, or convert it to JPEG (on a Mac {convert})"
        ) from None
    register_heif_opener()


def _what_is_it(head: bytes) -> str:
    if not head:
        return "an empty file, expected a picture"
    if head.startswith(LFS_MAGIC[: len(head)]):
        return "a Git-LFS pointer in place of the picture: run `git lfs pull`"
    return f"not a picture, or a damaged one: expected {', '.join(FORMATS)}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
