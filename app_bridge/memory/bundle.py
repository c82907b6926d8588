"""The memory that Apple's Swift engine takes with a Core AI bundle: each part as a range, with how it is known.

What the engine itself allocates is read from its sources (apple/coreai-models at 86b363d); what the runtime adds to a
program is not known here and says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app_bridge.memory import limits
from app_bridge.memory.limits import MIB
from app_bridge.memory.model import Part, largest_pair
from benchmarks.estimate.estimate import stored_bytes
from benchmarks.estimate.work import encoder_work
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from model_export.contract import tokens_per_image
from model_export.coreai import contract
from model_export.coreai.process import Runtime
from quantization.recipe import load_recipe

if TYPE_CHECKING:  # torch
    from fastvlm.synthetic.checkpoint import Shape

_HALF = 2  # bytes of a float16
# For each pixel: RGBA8 drawn and drawn again, RGBA in float32, planes in float32, and the same in the encoder's input.
_PICTURE_BYTES = 4 + 4 + 16 + 12 + 12
_INNER = 6  # an MLP's width over the decoder's: 5.3 to 5.8 in Qwen2
_COPIES = (
    "as stored, once to twice: the runtime specializes a copy (an assumption; see docs/COREAI.md for others' figures)"
)


@dataclass(frozen=True)
class Bundle:
    """The properties of a bundle that decide its memory. weights: role -> bytes of the program as stored."""

    shape: contract.Shape
    weights: dict[str, int]


def planned(shape: "Shape") -> Bundle:
    """Return the bundle that an export of `shape` in float16 would be, with the default context."""
    size, table = stored_bytes(load_recipe("fp16"), shape), _HALF * shape.vocab * shape.hidden
    sizes = contract.Shape(
        image_size=shape.image_size, image_tokens=tokens_per_image(shape.image_size), hidden=shape.hidden,
        vocabulary=shape.vocab, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.hidden // shape.heads,
        context=contract.DEFAULT_CONTEXT,
    )  # fmt: skip
    decoder = round(size["language"] - size["projector"]) - (0 if shape.tied else table)
    vision = encoder_work("fastvithd", shape.image_size).weights + round(size["projector"])
    return Bundle(sizes, {"main": decoder, "embedding": table, "vision": vision})


def stored(bundle: Path) -> Bundle:
    """Return the bundle in a folder: sizes of its files, metadata.json's, and the decoder's states in Apple's runtime.

    Raises:
        UserError: it isn't what the engine loads, or Core AI's packages are missing.
        RuntimeEnded: Apple's runtime crashed on it.
    """
    try:
        metadata = load_object(bundle / contract.METADATA)
        language, vision, assets = (metadata[key] for key in ("language", "vision", "assets"))
        function = (language.get("function_map") or {}).get("main", [contract.FUNCTION])[0]
        _, decoder = Runtime().load("main", bundle / assets["main"], function)
        if decoder is None:
            raise KeyError(function)
        layers, _, heads, cached, width = (1, *decoder.states[0].shape)[-5:]
        shape = contract.Shape(
            image_size=vision["image_size"], image_tokens=vision["image_token_count"],
            hidden=decoder.inputs[0].shape[2], vocabulary=language["vocab_size"], layers=layers, kv_heads=heads,
            head_dim=width, context=language["max_context_length"], grows=cached == contract.OPEN,
        )  # fmt: skip
        weights = {role: (bundle / assets[role] / contract.PROGRAM).stat().st_size for role in contract.ASSETS}
    except (Unreadable, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise UserError(
            f"{bundle}: is not what Apple's engine loads ({error}): `fastvlm validate` says everything"
        ) from None
    return Bundle(shape, weights)


def parts(bundle: Bundle, prompt: int) -> list[Part]:
    """Everything in memory when the engine answers about a picture. `prompt`: tokens of text around it.

    Raises UserError where that is more than the bundle's context.
    """
    shape, overheads = bundle.shape, limits.table()["overheads"]
    tokens = shape.image_tokens + prompt
    if tokens >= shape.context:
        raise UserError(
            f"--prompt-length {prompt}: with the picture's {shape.image_tokens} tokens more than the bundle's context"
            f" of {shape.context}: take a shorter one, or export with a longer --max-context-length"
        )
    cache, how = _cache(shape, tokens)
    computing, app = overheads["encoder_computing"], overheads["app"]
    pair = computing["pairs"][-1] * largest_pair(shape.image_size, _HALF)
    whole = f"of all {tokens} positions of the prompt, float16"
    rows = [
        *((name, [bundle.weights[role], 2 * bundle.weights[role]], _COPIES)
          for name, role in (("decoder", "main"), ("embeddings", "embedding"), ("encoder", "vision"))),
        ("encoder's activations", [0, pair], computing["how"]),
        ("KV cache", cache, how),
        ("logits", [2 * tokens * shape.vocabulary * _HALF], f"{whole}; the runtime's and the engine's own array"),
        ("prompt", [(2 * tokens + shape.image_tokens) * shape.hidden * _HALF],
         "embeddings of the text, merged with the picture's"),
        ("prefill", _prefill(shape, tokens), f"a decoder layer's buffers {whole}: from the stream alone to all, with an"
         f" MLP of {_INNER} times the width (an assumption)"),
        ("pictures", [_PICTURE_BYTES * shape.image_size**2], f"{_PICTURE_BYTES} bytes a pixel, as the engine draws it"),
        ("app", [size * MIB for size in app["mib"]], app["how"]),
    ]  # fmt: skip
    return [{"name": name, "low": size[0], "high": size[-1], "how": how} for name, size, how in rows]


def _cache(shape: contract.Shape, tokens: int) -> tuple[list[int], str]:
    """Keys and values: all of a fixed cache at once; of a growing one the steps, the last of them beside the next."""
    one = 2 * shape.layers * shape.kv_heads * shape.head_dim * _HALF
    if not shape.grows:
        return [one * shape.context], f"all {shape.context} positions of the context at once, float16"
    used = min(tokens + contract.ANSWER, shape.context)
    last = contract.capacity(used, shape.context)
    before = contract.capacity(-(-last // 2), shape.context) if last > contract.GROWS_FROM else 0
    how = f"{tokens} positions of the prompt and at most {contract.ANSWER} of the answer, grown to {last}, float16"
    return [one * contract.capacity(tokens, shape.context), one * (last + before)], f"{how}; the last two while copying"


def _prefill(shape: contract.Shape, tokens: int) -> list[int]:
    keys = shape.kv_heads * shape.head_dim
    layer = 8 * shape.hidden + 3 * keys + shape.hidden // shape.head_dim * tokens + 2 * _INNER * shape.hidden
    return [_HALF * tokens * shape.hidden, _HALF * tokens * (shape.hidden + layer)]
