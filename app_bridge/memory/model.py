"""How much memory the app takes for an answer: each part with how it was obtained, as a range.

What MLX allocates follows from the graph of the app's prefill (apple/ml-fastvlm FastVLM.swift over mlx-swift-examples
2.21.2) and from how far MLX allocates ahead of what is computed; what Core ML and the system add is not known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app_bridge.memory.limits import MIB
from benchmarks.estimate.work import LanguageModel

CACHE_STEP = 256  # positions that a KV cache grows by: KVCacheSimple.step, mlx-swift-examples 2.21.2 and mlx-lm 0.32.2
FLOAT = 4  # bytes of a float32
# Operations whose buffers exist before the first of them has run and its inputs can be freed.
# mlx 0.21.0, the app's: 12 command buffers (MAX_BUFFERS_PER_QUEUE, backend/metal/device.cpp) of 10 operations
# (max_ops_per_buffer, utils.h).
APP_AHEAD = 12 * 10
LAYER_OPERATIONS = 49  # of a decoder layer of Qwen2 with unfused attention: mlx 0.21.0 has no fused one with a mask
# For each pixel in the app: RGBA, planar, and MLX's copy, all float32 (MediaProcessingExtensions.swift).
PICTURE_VALUES = 4 + 3 + 3

Part = dict[str, Any]  # "name", bytes from "low" to "high", and "how" they are known


@dataclass(frozen=True)
class Model:
    """The properties of a model that decide its memory.

    `language`, `projector`: bytes of the weights as stored; `encoder`: as decoded. `itemsize`, `encoder_itemsize`:
    bytes of a value that the language model, the encoder computes with. `image_size`: pixels.
    """

    sizes: LanguageModel
    language: int
    projector: int
    encoder: int
    itemsize: int = 2
    encoder_itemsize: int = 2
    image_size: int = 1024
    picture_tokens: int = 256


def cache_bytes(sizes: LanguageModel, tokens: int, itemsize: int) -> int:
    """Keys and values of all layers for so many positions, in whole steps."""
    steps = -(-tokens // CACHE_STEP)
    return 2 * sizes.layers * sizes.kv_heads * sizes.head * steps * CACHE_STEP * itemsize


def logits_bytes(sizes: LanguageModel, tokens: int, itemsize: int) -> int:
    """The vocabulary's logits, which the app computes for every position of the prompt."""
    return tokens * sizes.vocab * itemsize


def prefill_bytes(sizes: LanguageModel, tokens: int, itemsize: int, ahead: int) -> int:
    """The buffers beside the logits when these are made: the stream, the mask, and those of the layers before.

    Args:
        ahead: operations whose buffers exist before the first of them has run; 0: all are freed at once.
    """
    queries, keys = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    layer = 4 * sizes.hidden + 4 * queries + 3 * keys + sizes.heads * tokens + 2 * sizes.inner
    layers = min(ahead / LAYER_OPERATIONS, sizes.layers)
    return round(tokens * itemsize * (sizes.hidden + tokens + layers * layer))


def encoder_pair(model: Model) -> int:
    """`largest_pair` of a model's encoder."""
    return largest_pair(model.image_size, model.encoder_itemsize)


def largest_pair(side: int, itemsize: int) -> int:
    """Bytes of FastViTHD's largest input and output of an operation together: GELU in its stem, or attention."""
    return 2 * itemsize * max(96 * (side // 2) ** 2, 24 * (side // 32) ** 4)


def parts(
    model: Model, prompt: int, answer: int, cache_limit: int, overheads: Mapping[str, Mapping[str, Any]]
) -> list[Part]:
    """Everything that the app has in memory when it answers about a picture. `prompt`: tokens of text; `answer`: of it.

    `cache_limit`: bytes that MLX may keep of freed buffers; `overheads`: memory_limits.json's.
    """
    tokens, width = model.picture_tokens + prompt, model.itemsize
    encoder, computing, app = (overheads[name] for name in ("encoder", "encoder_computing", "app"))
    on_engine = model.encoder_itemsize == 2  # or may be: the Neural Engine runs no float32 program
    decoded = [round(part * model.encoder) for part in encoder["part"]]
    at_work = [pairs * encoder_pair(model) for pairs in computing["pairs"]]
    prefill = [prefill_bytes(model.sizes, tokens, width, ahead) for ahead in (0, APP_AHEAD)]
    positions = f"{tokens} positions of the prompt"
    cached = f"{positions} and {answer} of the answer, in steps of {CACHE_STEP}, {width} bytes a value"
    rows = [
        ("language model", [model.language], "weights as stored"),
        ("projector", [model.projector], "weights as stored"),
        ("encoder", [0 if on_engine else decoded[0], decoded[1]], encoder["how"]),
        ("encoder's activations", [0 if on_engine else at_work[0], at_work[1]], computing["how"]),
        ("KV cache", [cache_bytes(model.sizes, tokens + answer, width)], cached),
        ("logits", [logits_bytes(model.sizes, tokens, width)], f"of all {positions}, {width} bytes a value"),
        ("prefill", prefill, f"its other buffers, freed at once or {APP_AHEAD} operations behind"),
        ("MLX's cache", [0, cache_limit], "buffers that are kept when freed, up to the app's limit"),
        ("pictures", [PICTURE_VALUES * FLOAT * model.image_size**2], "RGBA, planar and MLX's copy in float32"),
        ("app", [size * MIB for size in app["mib"]], app["how"]),
    ]
    return [{"name": name, "low": size[0], "high": size[-1], "how": how} for name, size, how in rows]


def total(rows: list[Part]) -> tuple[int, int]:
    """The sum of all parts, from low to high."""
    return sum(part["low"] for part in rows), sum(part["high"] for part in rows)
