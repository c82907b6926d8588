"""The contract of a bundle with Apple's Swift engine: files, names, shapes, dtypes, keys. Imports nothing of ours.

Source: `CoreAIVisionLanguageModel` and `ModelBundle` of apple/coreai-models at 86b363d, read for their behaviour, and
what coreai-core 1.0.0b3 writes. Anything that differs from this ends in an error or in wrong answers on the device.
"""

from dataclasses import dataclass
from importlib.metadata import version

# Files of a bundle
NAME = "fastvlm"  # of the bundle in metadata.json, whatever its folder is called: two exports have the same bytes
METADATA = "metadata.json"
TOKENIZER = "tokenizer"  # a folder, as Transformers writes it
SUFFIX = ".aimodel"
ASSETS = {"main": f"{NAME}{SUFFIX}", "embedding": f"embed{SUFFIX}", "vision": f"vision{SUFFIX}"}  # role -> folder

# Files of an asset
PROGRAM, PROGRAM_HASH = "main.mlirb", "main.hash"  # the hash is the 32 bytes of the sha256
ASSET_VERSION = "2.0"

# metadata.json
METADATA_VERSION, KIND = "0.2", "vlm"
PATCH_SIZE = 64
IMAGE_STRATEGIES = ("center_crop", "pad", "stretch")
RESCALE_FACTOR = 1.0  # the engine has divided by 255 already

FUNCTION = "main"
# The engine takes these instead of `main` where an asset has them; the decoder's is the first of function_map's "main".
ENCODE, PROJECT, EMBED = "encode_image", "project", "embed_tokens"
# The engine goes by the order of inputs, outputs and states and takes any names; these are the export's.
STATES = ("k_cache", "v_cache")
GROWS_FROM = 256  # positions that a growing cache begins with
DEFAULT_CONTEXT = 4096
ANSWER = 512  # tokens of an answer at most, unless the app asks for another number
OPEN = -1  # an axis of any length in a descriptor
END_OF_TURN = "<|im_end|>"  # the engine stops at it and at the tokenizer's eos


@dataclass(frozen=True)
class Tensor:
    """One input, output or state: name, dtype, shape (`OPEN` for an axis of any length)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """The interface of an asset's function `main`; the order counts."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Shape:
    """The sizes that decide all interfaces: pictures in pixels, their tokens, widths, layers, and the context."""

    image_size: int
    image_tokens: int
    hidden: int
    vocabulary: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int
    grows: bool = False

    @property
    def cache(self) -> tuple[int, int, int, int, int]:
        """The shape of each of the two states."""
        return (self.layers, 1, self.kv_heads, OPEN if self.grows else self.context, self.head_dim)


def interfaces(shape: Shape, dtype: str = "float16") -> dict[str, Function]:
    """Role -> interface. `dtype` is what the programs compute in: float16, or float32 for a twin that proves them."""
    pixels = Tensor("images", "float32", (1, 3, shape.image_size, shape.image_size))
    embeds = (1, OPEN, shape.hidden)
    return {
        "vision": Function(
            (pixels,), (Tensor("image_embeddings", dtype, (1, shape.image_tokens, shape.hidden)),)
        ),
        "embedding": Function(
            (Tensor("input_ids", "int32", (1, OPEN)),), (Tensor("embeddings", dtype, embeds),)
        ),
        "main": Function(
            (Tensor("inputs_embeds", dtype, embeds), Tensor("position_ids", "int32", (1, OPEN))),
            (Tensor("logits", dtype, (1, OPEN, shape.vocabulary)),),
            tuple(Tensor(name, dtype, shape.cache) for name in STATES),
        ),
    }  # fmt: skip


def capacity(positions: int, context: int) -> int:
    """The positions of a growing cache when so many of at most `context` are used: 256, doubled until they suffice.

    The engine makes new states of that size for every open axis, and copies the old ones into them block by block: it
    takes the last axis but one for the context. While it copies, both are there.
    """
    size = min(GROWS_FROM, context)
    while size < positions:
        size *= 2
    return min(size, context)


def producer() -> str:
    """What coreai-core signs an asset with."""
    return f"coreai-core {version('coreai-core')}"
