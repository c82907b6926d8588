"""Preprocessing equals its references to the last bit on real photographs stored in many ways, and refuses the rest."""

import hashlib
import importlib.util
import io
import json
import struct
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvlm.common.errors import UserError
from fastvlm.data import preprocessing
from fastvlm.data.images import as_rgb, open_image
from fastvlm.data.preprocessing import STRATEGIES, Preprocessor, read_preprocessor

GOLDEN = Path(__file__).parents[2] / "golden" / "preprocessing"
_spec = importlib.util.spec_from_file_location("golden_preprocessing", GOLDEN / "make.py")
assert _spec and _spec.loader
make: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

EXPECTED = json.loads((GOLDEN / "golden.json").read_text())
NAMES = sorted(EXPECTED)


def source(name: str) -> Any:
    """A path, or the picture that is not stored."""
    return make.huge() if name == "huge" else GOLDEN / name


def is_golden(pixels: np.ndarray, name: str, strategy: str) -> bool:
    """Whether (1, 3, 256, 256) values are the stored ones: by hash, or near enough for another JPEG decoder."""
    golden = EXPECTED[name][strategy]
    if name != "huge" and not name.endswith(".jpg"):
        return hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest() == golden["sha256"]
    got = make.summary(pixels)
    places = [np.subtract(got["pixels"][place], value) for place, value in golden["pixels"].items()]
    return bool(
        np.abs(np.subtract(got["block_means"], golden["block_means"])).max() < 0.5 / 255
        and np.abs(places).max() < 4 / 255
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_photographs(name: str, strategy: str) -> None:
    pixels = Preprocessor(256, strategy)(source(name))
    assert pixels.shape == (1, 3, 256, 256) and pixels.dtype == np.float32 and pixels.flags.c_contiguous
    assert is_golden(pixels, name, strategy)
    # negative controls: the other strategy, the mirrored picture, red and blue exchanged, one level brighter
    other = "pad" if strategy == "center_crop" else "center_crop"
    assert not is_golden(pixels, name, other)
    assert not is_golden(pixels[:, :, :, ::-1], name, strategy)
    assert "grey" in name or not is_golden(pixels[:, ::-1], name, strategy)
    assert not is_golden(pixels + np.float32(1 / 255), name, strategy)


def test_golden_pictures_show_what_predict_py_gets_wrong() -> None:
    """Negative control: without the EXIF orientation, and with 16 bit clipped, the result is another."""
    for name in ("exif_rotated.jpg", "grey16.png"):
        with Image.open(GOLDEN / name) as image:
            plain = np.asarray(image.convert("RGB"))
        for strategy in STRATEGIES:
            assert not is_golden(Preprocessor(256, strategy)(plain), name, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in NAMES for size in (256, 225) if (name, size) != ("huge", 225)]
)
def test_equal_to_transformers_to_the_last_bit(name: str, size: int, strategy: str) -> None:
    expected = make.reference(make.load(name), strategy, size)
    pixels = Preprocessor(size, strategy)(source(name))
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mean_and_deviation_to_the_last_bit(strategy: str) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    expected = make.reference(make.load("landscape.jpg"), strategy, 256, mean, std)
    assert np.array_equal(Preprocessor(256, strategy, mean, std)(GOLDEN / "landscape.jpg"), expected)
    assert not np.array_equal(Preprocessor(256, strategy, mean[::-1], std)(GOLDEN / "landscape.jpg"), expected)


@settings(max_examples=40)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    size=st.sampled_from([16, 33]),
    strategy=st.sampled_from(STRATEGIES),
)
def test_any_shape_equals_transformers(width: int, height: int, size: int, strategy: str) -> None:
    array = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), np.uint8)
    mean = (0.5, 0.25, 0.999)
    pixels = Preprocessor(size, strategy, mean)(array)
    assert np.array_equal(pixels, make.reference(Image.fromarray(array), strategy, size, mean))


def test_one_changed_pixel_changes_the_result() -> None:
    array = np.asarray(open_image(GOLDEN / "tiny.png")).copy()
    for strategy in STRATEGIES:
        before = Preprocessor(64, strategy)(array)
        array[8, 11, 1] ^= 4
        assert not np.array_equal(Preprocessor(64, strategy)(array), before)


def test_pad_is_the_mean_colour_and_an_odd_pixel_goes_last() -> None:
    square = Preprocessor(5, "pad", (0.5, 0.0, 1.0)).square(np.full((2, 5, 3), 9, np.uint8))
    mean, picture = [127, 0, 255], [9, 9, 9]
    assert [row[0] for row in np.asarray(square).tolist()] == [mean, picture, picture, mean, mean]


def test_the_path_the_picture_and_the_array_are_one() -> None:
    """Also a photograph opened by the user with its EXIF orientation still to be applied."""
    for name in ("portrait.jpg", "exif_rotated.jpg", "grey16.png", "palette.png"):
        process = Preprocessor(96, "center_crop")
        from_path = process(GOLDEN / name)
        assert np.array_equal(process(str(GOLDEN / name)), from_path)
        with Image.open(GOLDEN / name) as image:
            assert np.array_equal(process(image), from_path)
        assert np.array_equal(process(np.asarray(open_image(GOLDEN / name))), from_path)


def test_a_rotated_photograph_is_upright() -> None:
    upright, rotated = open_image(GOLDEN / "portrait.jpg"), open_image(GOLDEN / "exif_rotated.jpg")
    difference = np.abs(np.asarray(upright, np.int16) - np.asarray(rotated, np.int16))
    assert rotated.size == upright.size and difference.mean() < 5  # a second JPEG compression apart
    assert np.abs(np.asarray(upright.rotate(180), np.int16) - np.asarray(rotated, np.int16)).mean() > 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(GOLDEN / "tiny.png")
    for suffix in ("png", "webp", "tiff"):
        path = tmp_path / f"picture.{suffix}"
        stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        expected = np.asarray(stored)
        turns, mirrored = make.ORIENTATIONS[orientation]
        expected = np.rot90(expected[:, ::-1] if mirrored else expected, turns)
        assert np.array_equal(np.asarray(open_image(path)), expected), suffix


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16"])
def test_modes_become_rgb(mode: str) -> None:
    photograph = open_image(GOLDEN / "tiny.png")
    if mode == "I;16":
        grey = np.asarray(photograph.convert("L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = np.stack([grey] * 3, axis=2)
    else:
        image = photograph.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(preprocessing.as_rgb(image)), expected)


def test_an_alpha_channel_is_dropped_as_predict_py_does() -> None:
    hidden = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert preprocessing.as_rgb(hidden).getpixel((1, 1)) == (200, 100, 50)


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"animation.{suffix}"
        lossless = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
        assert open_image(path).getpixel((3, 3)) == (255, 0, 0), suffix


def refusal(image: Any) -> str:
    with pytest.raises(UserError) as caught:
        Preprocessor(64, "pad")(image)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    return message


HEIC = "not a picture" if importlib.util.find_spec("pillow_heif") else "pip install pillow-heif"  # of a damaged one


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    drawn = Image.linear_gradient("L").convert("RGB").resize((64, 48))
    heif.from_pillow(drawn).save(tmp_path / "phone.heic", quality=-1)
    opened = open_image(tmp_path / "phone.heic")
    assert opened.size == (64, 48) and np.abs(np.asarray(opened, int) - np.asarray(drawn, int)).max() <= 4


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.jpg")
    assert "folder, expected a picture" in refusal(tmp_path)
    for name, content, said in [
        ("empty.jpg", b"", "an empty file"),
        ("text.png", b"hello\n" * 20, "not a picture, or a damaged one: expected JPEG"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        (
            "phone.heic",
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            HEIC,
        ),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert said in refusal(tmp_path / name) and name in refusal(tmp_path / name)
    for wrong in (None, 7, [1, 2], b"bytes"):
        assert "expected a path, a PIL image or a uint8 array" in refusal(wrong)
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        assert "expected uint8 (height, width, 3)" in refusal(array)
    assert "nothing to see" in refusal(np.zeros((0, 4, 3), np.uint8))
    assert "nothing to see" in refusal(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("name", ["landscape.jpg", "grey16.png", "palette.png"])
def test_truncated_anywhere_it_is_refused(name: str, tmp_path: Path) -> None:
    content = (GOLDEN / name).read_bytes()
    for part in (0.02, 0.3, 0.7, 0.95):
        (tmp_path / name).write_bytes(content[: int(len(content) * part)])
        assert str(tmp_path / name) in refusal(tmp_path / name)


@settings(max_examples=60)
@given(name=st.sampled_from(["tiny.png", "palette.png", "grey.jpg"]), at=st.floats(0, 1), value=st.integers(1, 255))
def test_a_damaged_file_is_read_or_refused_never_a_crash(name: str, at: float, value: int) -> None:
    content = bytearray((GOLDEN / name).read_bytes())
    content[int(at * (len(content) - 1))] ^= value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            assert np.isfinite(Preprocessor(64, "pad")(path)).all()
        except UserError as error:
            assert "\n" not in str(error)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 50)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (1, 60_000, "longer than 100 : 1"),
        (60_000, 1, "longer than 100 : 1"),
        (13_000, 13_900, "more than 178,956,970 pixels"),
        (20_001, 300, "limits are 20,000 a side"),
        (50_000, 50_000, "more than 178,956,970 pixels"),
        (2**31 - 1, 2**31 - 1, "more than 178,956,970 pixels"),
    ],
)
def test_absurd_pictures_are_refused_from_the_header(width: int, height: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "absurd.png").write_bytes(png_claiming(width, height))
    started = time.thread_time()  # of the processor: whatever else runs there does not count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert said in refusal(tmp_path / "absurd.png")
    assert time.thread_time() - started < 1


def test_the_limits_hold_even_if_pillows_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_claiming(13_000, 13_900))
    assert "limits are 20,000 a side and 178,956,970 in all" in refusal(tmp_path / "bomb.png")


def test_the_limits_themselves_are_allowed() -> None:
    assert Preprocessor(64, "center_crop")(np.zeros((1, 100, 3), np.uint8)).shape == (1, 3, 64, 64)
    assert "longer than 100" in refusal(np.zeros((1, 101, 3), np.uint8))


def test_other_pixels_than_8_or_16_bit_are_refused() -> None:
    assert "floating-point" in refusal(Image.fromarray(np.ones((4, 4), np.float32)))
    assert "values from -1 to 7" in refusal(Image.fromarray(np.array([[-1, 7]], np.int32)))
    assert "values from 0 to 65536" in refusal(Image.fromarray(np.array([[0, 65536]], np.int32)))
    plain = io.BytesIO(b"P5 2 1 65535\n" + np.array([0, 65535], ">u2").tobytes())
    assert [value[0] for value in preprocessing.as_rgb(Image.open(plain)).get_flattened_data()] == [0, 255]


def test_pillow_is_kept_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in set(NAMES) - {"huge"}:
            preprocessing.as_rgb(source(name))
    assert capfd.readouterr() == ("", "")


CLIP = {
    "crop_size": {"height": 512, "width": 512},
    "do_center_crop": True,
    "do_rescale": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 512},
}
LLAVA = {"model_type": "llava_qwen2", "mm_vision_tower": "mobileclip_l_512", "image_aspect_ratio": "pad"}
HF = {"model_type": "fast_vlm", "image_seq_length": 64}


def folder_with(path: Path, config: Any = None, processor: Any = None, nested: Any = None) -> Path:
    for name, document in [
        ("config.json", config),
        ("preprocessor_config.json", processor),
        ("processor_config.json", nested and {"image_processor": nested}),
    ]:
        if document is not None:
            (path / name).write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("config", "processor", "strategy"),
    [
        (LLAVA, None, "pad"),
        (LLAVA, CLIP, "pad"),  # as Apple's export leaves a checkpoint
        (LLAVA | {"image_aspect_ratio": "square"}, None, "center_crop"),
        ({k: v for k, v in LLAVA.items() if k != "image_aspect_ratio"}, CLIP, "center_crop"),
        (HF, CLIP, "center_crop"),
        (HF, None, "center_crop"),
        (HF, CLIP | {"do_center_crop": False, "do_pad": True}, "pad"),
        (None, CLIP, "center_crop"),
        (LLAVA, CLIP | {"image_strategy": "center_crop"}, "center_crop"),
        (HF, CLIP | {"image_strategy": "pad"}, "pad"),
    ],
)
def test_the_checkpoints_own_strategy(config: Any, processor: Any, strategy: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config, processor)
    assert read_preprocessor(folder) == Preprocessor(512, strategy)
    for chosen in STRATEGIES:
        assert read_preprocessor(folder, chosen).image_strategy == chosen


def test_transformers_5_nests_the_image_processor(tmp_path: Path) -> None:
    nested = CLIP | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.25]}
    folder = folder_with(tmp_path, HF, nested=nested)
    assert read_preprocessor(folder) == Preprocessor(512, "center_crop", (0.1, 0.2, 0.3), (0.5, 0.5, 0.25))


@pytest.mark.parametrize("layout", ["llava_qwen2", "fast_vlm"])
@pytest.mark.parametrize(
    "processor", [{}, {"image_strategy": "center_crop"}, {"image_strategy": "pad"}, {"do_pad": True}]
)
def test_a_checkpoint_is_read_the_same_way(layout: str, processor: dict[str, Any], tmp_path: Path) -> None:
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.synthetic.checkpoint import write_checkpoint

    folder = write_checkpoint(tmp_path / layout, layout=layout)
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": 128} | processor))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.preprocessor == read_preprocessor(folder)
    expected = "pad" if layout == "llava_qwen2" or "do_pad" in processor else "center_crop"
    assert checkpoint.image_strategy == processor.get("image_strategy", expected)


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        (None, None, "resolution-missing"),
        ({"model_type": "llava_qwen2"}, None, "resolution-missing: config.json: mm_vision_tower"),
        (LLAVA | {"image_aspect_ratio": "anyres"}, None, "image-strategy-unknown: config.json: image_aspect_ratio"),
        (LLAVA | {"mm_vision_tower": "mobileclip_l_1024"}, CLIP, "mm_vision_tower 1024, crop_size 512"),
        (HF, CLIP | {"size": {"shortest_edge": 560}}, "resolution-contradictory"),
        (HF, CLIP | {"size": {"height": 512, "width": 512}}, 'size {"height": 512'),
        (HF, CLIP | {"crop_size": {"height": 512, "width": 500}}, "crop_size {"),
        (
            HF,
            CLIP | {"resample": 2},
            "preprocessing-unsupported: preprocessor_config.json: resample: got 2",
        ),
        (HF, CLIP | {"do_resize": False, "rescale_factor": 1.0}, "do_resize: got false, expected true; preprocessing-"),
        (HF, CLIP | {"image_strategy": "stretch"}, "setting-invalid: preprocessor_config.json: image_strategy"),
        (HF, CLIP | {"do_center_crop": False}, "image-strategy-unknown"),
        (HF, CLIP | {"image_mean": "0"}, 'image_mean: got "0"'),
        (HF, CLIP | {"image_mean": [0.0, 0.0]}, "image_mean: got [0.0, 0.0], expected a list of 3 values"),
        (HF, CLIP | {"image_std": [1.0, 0.0, 1.0]}, "image_std: got [1.0, 0.0, 1.0]"),
        (HF, CLIP | {"crop_size": 100, "size": 100}, "resolution-unsupported"),
        (HF, CLIP | {"crop_size": 2**40, "size": 2**40}, "crop_size: got 1099511627776, expected a JSON object, or"),
        (HF, [1], "expected a JSON object"),
    ],
)
def test_other_preprocessing_is_refused(config: Any, processor: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_preprocessor(folder_with(tmp_path, config, processor))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"not-json: preprocessor_config\.json"):
        read_preprocessor(tmp_path)
    with pytest.raises(UserError, match="'stretch': expected pad or center_crop"):
        Preprocessor(256, "stretch")
    with pytest.raises(UserError, match="image size 0"):
        Preprocessor(0, "pad")


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A scan takes a few bytes and goes over all pixels. Scans in a comment or behind the picture don't count."""
    path, content = tmp_path / "a.jpg", io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(content, "JPEG", progressive=True, comment=b"\xff\xda" * 200)
    jpeg = content.getvalue()
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    for scans in (30, 60):
        path.write_bytes(jpeg[:end] + jpeg[last:end] * scans + jpeg[end:] + b"\xff\xda" * 200)
        for image in (path, Image.open(path)):
            if scans == 30:
                assert as_rgb(image).size == (64, 48)
            else:
                assert "a JPEG of more than 50 scans" in refusal(image)
