"""What the memory model counts, against hand-computed cases, MLX's own cache, and MLX's peak on a tiny model."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app_bridge.memory import fit, measure
from app_bridge.memory import model as memory
from app_bridge.memory.limits import MIB
from app_bridge.memory.model import Model, Part, Tape, cache_bytes, logits_bytes, prefill
from benchmarks.estimate.work import LanguageModel

SMALL = LanguageModel(24, 896, 14, 2, 64, 4864, 151936)  # Qwen2 0.5B
TINY = LanguageModel(layers=2, hidden=8, heads=2, kv_heads=1, head=4, inner=16, vocab=32)
MODEL = Model(SMALL, 3072, language=988_000_000, projector=7_000_000, encoder=245_000_000)
OVERHEADS = {
    "encoder": {"part": [1, 1], "how": "x"},
    "encoder_computing": {"pairs": [1, 2], "how": "x"},
    "app": {"mib": [10, 20], "how": "x"},
}


def parts(model: Model = MODEL, prompt: int = 18) -> dict[str, Part]:
    return {part.name: part for part in memory.parts(model, prompt, 240, 20 * MIB, OVERHEADS)}


def allocated(tape: Tape) -> int:
    return sum(size for size, _, _ in tape.buffers)


@pytest.mark.parametrize(
    ("tokens", "positions"), [(1, 256), (256, 256), (257, 512), (274, 512), (512, 512), (514, 768)]
)
def test_the_cache_grows_in_steps(tokens: int, positions: int) -> None:
    # keys and values, 24 layers, 2 heads of 64, 2 bytes
    assert cache_bytes(SMALL, tokens, 2) == 2 * 24 * 2 * 64 * 2 * positions


def test_the_cache_is_as_large_as_mlx_makes_it() -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import KVCache

    cache: Any = KVCache()
    for tokens in (274, *[1] * 240):
        cache.update_and_fetch(*2 * [mx.zeros((1, 1, tokens, 4), mx.float16)])
    one_layer = cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(replace(TINY, layers=1), 514, 2) == one_layer
    assert cache_bytes(TINY, 514, 2) == 2 * one_layer


def test_a_tape_counts_what_exists_at_once() -> None:
    tape = Tape()
    first = tape.run(100)
    second = tape.run(30, first)
    tape.run(5, second)
    assert tape.peak(0) == 130  # the first and the second, while the second is made
    assert tape.peak(1) == tape.peak(1000) == 135  # the third is made before the second has run
    tape = Tape()
    one = tape.run(100)
    assert tape.run(0, into=one) == one  # a buffer that is taken over costs nothing
    tape.views(3)
    tape.run(1, one)
    assert tape.peak(0) == tape.peak(50) == 101


def test_allocating_ahead_costs_more_and_at_most_everything() -> None:
    tape = prefill(MODEL, 274)
    peaks = [tape.peak(ahead) for ahead in (0, 10, 120, 10_000)]
    assert peaks == sorted(set(peaks)) and peaks[-1] <= allocated(tape)
    assert peaks[0] >= logits_bytes(SMALL, 274, 2) == 274 * 151_936 * 2


def test_a_prefill_by_hand() -> None:
    """Two tokens of a model small enough to add up; the most there is at once is inside the MLP."""
    tape = prefill(Model(TINY, 12, 0, 0, 0, picture_tokens=1), 2, picture=False)
    sizes = [size for size, _, _ in tape.buffers if size]
    hidden, queries, keys, inner, scores = 2 * 8 * 2, 2 * 8 * 2, 2 * 4 * 2, 2 * 16 * 2, 2 * 2 * 2 * 2
    layer = [hidden, queries, keys, keys, queries, keys, scores, queries, queries, hidden, hidden, inner, inner, hidden]
    logits = 2 * 32 * 2
    assert sizes == [hidden, 2 * 2 * 4, 2 * 2 * 2, *layer, *layer, hidden, logits, 4]
    mask = 2 * 2 * 2
    assert tape.peak(0) == mask + hidden + hidden + inner + inner > hidden + logits


def test_a_projector_stored_in_half_is_widened_and_a_quantized_one_is_not() -> None:
    plain, quantized = (prefill(replace(MODEL, quantized=flag), 274) for flag in (False, True))
    assert allocated(plain) - allocated(quantized) == (3072 * 896 + 896 * 896) * 4


def test_parts_are_exact_where_they_are_known() -> None:
    found = {name: (part.low, part.high) for name, part in parts().items()}
    prefilled = found.pop("prefill")
    assert 0 < prefilled[0] < prefilled[1]
    assert found == {
        "language model": (988_000_000, 988_000_000),
        "projector": (7_000_000, 7_000_000),
        "encoder": (0, 245_000_000),
        "encoder's activations": (0, 4 * 96 * 512 * 512 * 2),  # GELU of the stem: in and out, twice
        "KV cache": (9_437_184, 9_437_184),  # 768 positions
        "logits": (83_260_928, 83_260_928),
        "MLX's cache": (0, 20 * MIB),
        "pictures": (40 * 1024 * 1024, 40 * 1024 * 1024),
        "app": (10 * MIB, 20 * MIB),
    }
    float32 = parts(replace(MODEL, encoder_itemsize=4))  # the Neural Engine does not run it: the app holds it
    assert float32["encoder"].low == 245_000_000
    assert float32["encoder's activations"].low == 2 * 96 * 512 * 512 * 4
    short, long = (memory.total([*parts(prompt=prompt).values()]) for prompt in (18, 1000))
    assert long[0] > short[0] + 982 * 151_936 * 2 and long[1] > short[1]


def test_mlx_peaks_between_the_bounds(app_artefact: Path) -> None:
    """How far MLX gets ahead depends on the machine's load, so that a tiny model's peak is held to the bounds alone.

    With the 0.5B shape's real sizes the prediction was within 1 % of the whole and 7 % of what is beside the weights.
    """
    pytest.importorskip("mlx.core")
    gc.collect()  # MLX counts what another test holds, too
    stored, _ = fit.stored(app_artefact)
    found = measure.measure(app_artefact, stored, 274, 20 * MIB)
    tape = prefill(stored, 274, picture=False)
    cache = cache_bytes(stored.sizes, 276, 2)
    beside = found["measured"]["KV cache and prefill"]
    assert abs(found["measured"]["language model"] - stored.language) < 16_000  # the file's header
    assert 0.9 * (tape.peak(0) + cache) < beside < 1.1 * (tape.peak(10_000) + cache)
    assert found["peak"]["measured"] > found["measured"]["language model"]
    wrong = measure.measure(app_artefact, replace(stored, language=2 * stored.language), 8, 20 * MIB)
    assert not wrong["passed"]
