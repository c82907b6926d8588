"""What the memory model counts, against hand-computed cases, MLX's own cache, and MLX's peak on a tiny model."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app_bridge.memory import fit
from app_bridge.memory import model as memory
from app_bridge.memory.limits import MIB
from app_bridge.memory.model import Model, cache_bytes, logits_bytes, prefill_bytes
from benchmarks.estimate.work import LanguageModel

SMALL = LanguageModel(24, 896, 14, 2, 64, 4864, 151936)  # Qwen2 0.5B
TINY = LanguageModel(layers=2, hidden=8, heads=2, kv_heads=1, head=4, inner=16, vocab=32)
MODEL = Model(SMALL, language=988_000_000, projector=7_000_000, encoder=245_000_000)
OVERHEADS = {
    "encoder": {"part": [1, 1], "how": "x"},
    "encoder_computing": {"pairs": [1, 2], "how": "x"},
    "app": {"mib": [10, 20], "how": "x"},
}


def parts(model: Model = MODEL, prompt: int = 18) -> dict[str, tuple[int, int]]:
    found = memory.parts(model, prompt, 240, 20 * MIB, OVERHEADS)
    return {part["name"]: (part["low"], part["high"]) for part in found}


def test_the_cache_is_as_large_as_mlx_makes_it() -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import KVCache

    cache: Any = KVCache()
    for tokens in (274, *[1] * 240):
        cache.update_and_fetch(*2 * [mx.zeros((1, 1, tokens, 4), mx.float16)])
        if tokens > 1:  # after the prompt alone: two steps of 256
            assert cache_bytes(replace(TINY, layers=1), tokens, 2) == cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(TINY, 514, 2) == 2 * (cache.keys.nbytes + cache.values.nbytes)


def test_a_prefill_by_hand() -> None:
    """Two tokens of a model small enough to add up; buffers freed at once, and all of both layers'."""
    hidden, queries, keys, inner, scores = 2 * 8 * 2, 2 * 8 * 2, 2 * 4 * 2, 2 * 16 * 2, 2 * 2 * 2 * 2
    layer = [hidden, queries, keys, keys, queries, keys, scores, queries, queries, hidden, hidden, inner, inner, hidden]
    mask = 2 * 2 * 2
    assert prefill_bytes(TINY, 2, 2, 0) == hidden + mask
    assert prefill_bytes(TINY, 2, 2, 49) == hidden + mask + sum(layer)
    assert prefill_bytes(TINY, 2, 2, 98) == prefill_bytes(TINY, 2, 2, 10_000) == hidden + mask + 2 * sum(layer)


@pytest.mark.parametrize(
    ("layers", "tokens", "measured"), [(24, 8, 6.0), (24, 32, 14.7), (24, 274, 107.5), (6, 600, 231.5)]
)
def test_what_mlx_took_beside_the_weights(layers: int, tokens: int, measured: float) -> None:
    """Of the 0.5B shape on a CPU (docs/APP.md), where MLX gets 73 operations ahead: within 2 %."""
    sizes = replace(SMALL, layers=layers)
    beside = prefill_bytes(sizes, tokens, 2, 73) + logits_bytes(sizes, tokens, 2) + cache_bytes(sizes, tokens, 2)
    assert beside / 1e6 == pytest.approx(measured, rel=0.02)


def test_parts_are_exact_where_they_are_known() -> None:
    found = parts()
    low, high = found.pop("prefill")
    assert 0 < low < high
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
    assert float32["encoder"][0] == 245_000_000
    assert float32["encoder's activations"][0] == 2 * 96 * 512 * 512 * 4
    short, long = (sum(low for low, _ in parts(prompt=prompt).values()) for prompt in (18, 1000))
    assert long > short + 982 * 151_936 * 2


@pytest.mark.parametrize(("side", "largest"), [(256, 3145728), (1024, 50331648), (2048, 805306368)])
def test_the_encoders_largest_operation(side: int, largest: int) -> None:
    """Values read and written, as counted over every operation of the network."""
    assert memory.encoder_pair(replace(MODEL, image_size=side)) == 2 * largest


def test_mlx_peaks_between_the_bounds(app_artefact: Path) -> None:
    """The artefact's language model over random embeddings, as the app runs it, beside what `plan` says of it.

    How far MLX gets ahead depends on the machine's load, so that a tiny model's peak is held to the bounds alone.
    """
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import KVCache

    from model_export.runtime.mlx_language import mlx_language

    gc.collect()  # MLX counts what another test holds, too
    stored, _ = fit.stored(app_artefact)
    text: Any = mlx_language(app_artefact)[0].text
    mx.set_cache_limit(20 * MIB)
    stream = mx.random.normal((1, 274, 64)).astype(mx.float16)
    places = mx.arange(274)
    mask = ((places[:, None] < places) * mx.array(-1e9, mx.float32)).astype(mx.float16)
    mx.eval(mask, stream)
    before = mx.get_active_memory() - mask.nbytes - stream.nbytes
    mx.reset_peak_memory()
    for layer in text.model.layers:
        stream = layer(stream, mask, KVCache())
    mx.eval(mx.argmax(text.model.embed_tokens.as_linear(text.model.norm(stream)), axis=-1))
    beside = mx.get_peak_memory() - before
    least, most = (prefill_bytes(stored.sizes, 274, 2, ahead) for ahead in (0, 10_000))
    both = logits_bytes(stored.sizes, 274, 2) + cache_bytes(stored.sizes, 274, 2)
    assert stored.language <= before + 16_000  # the file's header
    assert 0.9 * (least + both) < beside < 1.1 * (most + both)
