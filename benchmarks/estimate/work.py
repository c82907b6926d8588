"""The work of a model at float16: counts of published.json for encoders, a formula for language models.

No torch: `estimate` must answer at once. tests/benchmarks/estimate holds the counts against PyTorch's own.
"""

from dataclasses import dataclass

from benchmarks.estimate.devices import facts
from fastvlm.common.errors import UserError

HALF = 2  # bytes of a float16
TEXT_TOKENS = 18  # of Qwen2's template and "Describe the image."; with 256 of the picture 274


@dataclass(frozen=True)
class EncoderWork:
    """One pass of an encoder: multiply-accumulates, bytes of weights, and bytes of activations that are moved.

    `attention_macs` are products of two activations. `spilled`: bytes moved by operations with a tensor larger than
    64 MiB; one of 57 MB stays on the fast path of the M1 Max's Neural Engine and one of 101 MB does not (ConvNeXt-L at
    768 and at 1024, FastVLM paper, table 10: 1.8 times the pixels take 4.2 times as long).
    """

    macs: int
    weights: int
    attention_macs: int = 0
    activations: int = 0
    spilled: int = 0
    operations: int = 0


@dataclass(frozen=True)
class LanguageModel:
    """The sizes of a Llama-like decoder (Qwen2, Qwen3, Mistral, Vicuna): config.json's fields."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocab: int

    @property
    def matrices(self) -> int:
        """Values in the decoder layers' matrices: multiply-accumulates for each token."""
        attention = 2 * self.heads * self.head + 2 * self.kv_heads * self.head
        return self.layers * self.hidden * (attention + 3 * self.inner)

    @property
    def output(self) -> int:
        """Values in the matrix that turns the last position into logits."""
        return self.vocab * self.hidden

    def scores(self, tokens: int) -> int:
        """Values of attention's score matrices in all layers."""
        return self.layers * self.heads * tokens * tokens


def encoder_work(name: str, resolution: int | None = None) -> EncoderWork:
    """The work of an encoder of published.json on a square picture. UserError for a side that wasn't counted."""
    counts = {key: value for key, value in facts("published.json")["encoders"][name].items() if key != "source"}
    if sizes := counts.pop("sizes", None):
        if str(resolution) not in sizes:
            raise UserError(f"{name}: got {resolution} pixels, expected a multiple of 64 from 64 to 2048")
        counts |= sizes[str(resolution)]
    return EncoderWork(weights=HALF * counts.pop("parameters"), **counts)
