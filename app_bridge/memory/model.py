"""How much memory the app takes for an answer: each part with how it was obtained, as a range.

What MLX allocates follows from the graph of the app's prefill (apple/ml-fastvlm FastVLM.swift over mlx-swift-examples
2.21.2) and from how far MLX allocates ahead of what is computed; what Core ML and the system add is not known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from app_bridge.memory.limits import MIB
from benchmarks.estimate.estimate import facts
from benchmarks.estimate.work import LanguageModel, fastvit

CACHE_STEP = 256  # positions that a KV cache grows by: KVCacheSimple.step, mlx-swift-examples 2.21.2 and mlx-lm 0.32.2
FLOAT = 4  # bytes of a float32
# Operations whose buffers exist before the first of them has run and its inputs can be freed.
# mlx 0.21.0, the app's: 12 command buffers (MAX_BUFFERS_PER_QUEUE, backend/metal/device.cpp) of 10 operations
# (max_ops_per_buffer, utils.h).
APP_AHEAD = 12 * 10
# For each pixel in the app: RGBA, planar, and MLX's copy, all float32 (MediaProcessingExtensions.swift).
PICTURE_VALUES = 4 + 3 + 3
_NETWORK = ("depths", "widths", "ratio", "attention", "se")  # `fastvit`'s arguments


@dataclass(frozen=True)
class Part:
    """Bytes that something takes, from `low` to `high`, and how that is known."""

    name: str
    low: int
    high: int
    how: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self).copy()


@dataclass(frozen=True)
class Model:
    """What of a model decides its memory.

    `features`: channels of the encoder's output. `language`, `projector`: bytes of the weights as stored; `encoder`: as
    decoded. `itemsize`, `encoder_itemsize`: bytes of a value that the language model, the encoder computes with.
    `quantized`: the projector's matrices are. `image_size`: pixels.
    """

    sizes: LanguageModel
    features: int
    language: int
    projector: int
    encoder: int
    itemsize: int = 2
    encoder_itemsize: int = 2
    quantized: bool = False
    image_size: int = 1024
    picture_tokens: int = 256


class Tape:
    """The buffers of a graph in the order of its operations: which operation makes each, and which reads it last."""

    def __init__(self) -> None:
        self.operations = 0
        self.buffers: list[list[int]] = []  # size, first operation, last operation

    def run(self, size: int, *read: int, into: int | None = None) -> int:
        """An operation that reads buffers and fills a new one of `size` bytes, or one that it was given: `into`."""
        for one in (*read, *([] if into is None else [into])):
            self.buffers[one][2] = self.operations
        if into is None:
            self.buffers.append([size, self.operations, self.operations])
            into = len(self.buffers) - 1
        self.operations += 1
        return into

    def views(self, count: int) -> None:
        """Operations that allocate nothing: reshapes, transposes, slices."""
        self.operations += count

    def peak(self, ahead: int) -> int:
        """The most bytes that exist at once when buffers are made up to `ahead` operations before they are filled."""
        change = [0] * (self.operations + 1)
        for size, first, last in self.buffers:
            change[max(0, first - ahead)] += size
            change[last + 1] -= size
        return max(accumulate(change))


def cache_bytes(sizes: LanguageModel, tokens: int, itemsize: int) -> int:
    """Keys and values of all layers for so many positions, in whole steps."""
    steps = -(-tokens // CACHE_STEP)
    return 2 * sizes.layers * sizes.kv_heads * sizes.head * steps * CACHE_STEP * itemsize


def logits_bytes(sizes: LanguageModel, tokens: int, itemsize: int) -> int:
    """The vocabulary's logits, which the app computes for every position of the prompt."""
    return tokens * sizes.vocab * itemsize


def prefill(model: Model, tokens: int, picture: bool = True) -> Tape:
    """The graph from the encoder's features (or, without a `picture`, from embeddings) to the first token."""
    tape, sizes, width = Tape(), model.sizes, model.itemsize
    hidden = tokens * sizes.hidden * width
    stream = _merged(tape, model, tokens) if picture else tape.run(hidden)
    mask = tape.run(tokens * tokens * FLOAT)  # additive, made in float32 (createAdditiveCausalMask)
    mask = tape.run(tokens * tokens * width, mask)
    for _ in range(sizes.layers):
        stream = _layer(tape, sizes, tokens, width, stream, mask)
    normed = tape.run(hidden, stream)
    tape.views(1)
    logits = tape.run(logits_bytes(sizes, tokens, width), normed)
    tape.views(2)
    tape.run(FLOAT, logits)
    return tape


def _merged(tape: Tape, model: Model, tokens: int) -> int:
    """The projector over float32 features, for which MLX makes its weights float32, and the merge into embeddings."""
    rows, hidden, width = model.picture_tokens, model.sizes.hidden, model.itemsize
    value = tape.run(rows * model.features * FLOAT)
    for inputs in (model.features, hidden):
        read = [value]
        if not model.quantized and width != FLOAT:
            read.append(tape.run(inputs * hidden * FLOAT))
        value = tape.run(rows * hidden * FLOAT, *read)
        value = tape.run(0, into=value)  # the bias, and GELU after the first
    embeddings = tape.run(tokens * hidden * width)
    cast = tape.run(rows * hidden * width, value)
    return tape.run(0, cast, into=embeddings)


def _layer(tape: Tape, sizes: LanguageModel, tokens: int, width: int, stream: int, mask: int) -> int:
    """A decoder layer of Qwen2 with unfused attention: mlx 0.21.0 has no fused one where a mask is given."""
    hidden, inner = tokens * sizes.hidden * width, tokens * sizes.inner * width
    queries, keys = (tokens * heads * sizes.head * width for heads in (sizes.heads, sizes.kv_heads))
    scores = sizes.heads * tokens * tokens * width
    normed = tape.run(hidden, stream)
    projected = []
    for size in (queries, keys, keys):
        tape.views(1)  # the transposed weight
        projected.append(tape.run(size, normed))
        tape.views(2)
    query, key = (tape.run(size, one) for size, one in zip((queries, keys), projected, strict=False))  # rotary
    tape.views(4)  # zeros that the cache keeps, and writing into them; the slice that is read
    tape.run(0, key, projected[2])
    tape.views(2)
    query = tape.run(0, into=query)  # scaled
    tape.views(4)
    attention = tape.run(scores, query)
    tape.views(2)
    attention = tape.run(0, mask, into=attention)
    attention = tape.run(0, into=attention)  # softmax
    mixed = tape.run(queries, attention)
    tape.views(2)
    mixed = tape.run(queries, mixed)  # heads side by side
    tape.views(1)
    stream = tape.run(0, stream, into=tape.run(hidden, mixed))
    normed = tape.run(hidden, stream)
    tape.views(1)
    gate = tape.run(0, into=tape.run(inner, normed))  # SiLU
    tape.views(1)
    product = tape.run(0, tape.run(inner, normed), into=gate)
    tape.views(1)
    return tape.run(0, stream, into=tape.run(hidden, product))


def encoder_pair(model: Model) -> int:
    """Bytes of FastViTHD's largest input and output of an operation together."""
    network = {key: value for key, value in facts("published.json")["encoders"]["fastvithd"].items() if key in _NETWORK}
    return model.encoder_itemsize * max(one.inputs + one.outputs for one in fastvit(model.image_size, **network))


def parts(
    model: Model, prompt: int, answer: int, cache_limit: int, overheads: Mapping[str, Mapping[str, Any]]
) -> list[Part]:
    """Everything that the app has in memory when it answers about a picture. `prompt`: tokens of text; `answer`: of it.

    `cache_limit`: bytes that MLX may keep of freed buffers; `overheads`: memory_limits.json's.
    """
    tokens, width, side = model.picture_tokens + prompt, model.itemsize, model.image_size
    tape, logits = prefill(model, tokens), logits_bytes(model.sizes, tokens, width)
    rest = [max(0, tape.peak(ahead) - logits) for ahead in (0, APP_AHEAD)]
    encoder, computing, app = (overheads[name] for name in ("encoder", "encoder_computing", "app"))
    on_engine = model.encoder_itemsize == 2  # or may be: the Neural Engine runs no float32 program
    decoded = [round(part * model.encoder) for part in encoder["part"]]
    at_work = [pairs * encoder_pair(model) for pairs in computing["pairs"]]
    positions = f"{tokens} positions of the prompt"
    cache, pictures = cache_bytes(model.sizes, tokens + answer, width), PICTURE_VALUES * FLOAT * side**2
    return [
        Part("language model", model.language, model.language, "weights as stored"),
        Part("projector", model.projector, model.projector, "weights as stored"),
        Part("encoder", 0 if on_engine else decoded[0], decoded[1], encoder["how"]),
        Part("encoder's activations", 0 if on_engine else at_work[0], at_work[1], computing["how"]),
        Part(
            "KV cache", cache, cache,
            f"{positions} and {answer} of the answer, in steps of {CACHE_STEP}, {width} bytes a value",
        ),
        Part("logits", logits, logits, f"of all {positions}, {width} bytes a value"),
        Part("prefill", rest[0], rest[1], f"its other buffers, freed at once or {APP_AHEAD} operations behind"),
        Part("MLX's cache", 0, cache_limit, "buffers that are kept when freed, up to the app's limit"),
        Part("pictures", pictures, pictures, "RGBA, planar and MLX's copy in float32"),
        Part("app", app["mib"][0] * MIB, app["mib"][1] * MIB, app["how"]),
    ]  # fmt: skip


def total(found: list[Part]) -> tuple[int, int]:
    """The sum of all parts, from low to high."""
    return sum(part.low for part in found), sum(part.high for part in found)
