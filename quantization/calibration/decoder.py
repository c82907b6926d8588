"""A Transformers decoder (Qwen2, Llama and what is built like them) over calibration sequences, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantization.calibration.data import Calibration

# One decoder layer's matrices, and what feeds each: they share that input.
INPUTS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
EMBEDDINGS = "model.embed_tokens.weight"
MATRICES = tuple(name for names in INPUTS.values() for name in names)


@dataclass
class Call:
    """A layer's arguments: hidden states (B, T, H), and the rest, which is the same for every layer."""

    hidden: Tensor
    rest: dict[str, Any]

    def run(self, layer: nn.Module) -> Tensor:
        output = layer(self.hidden, **self.rest)
        return output[0] if isinstance(output, tuple) else output


def embed(model: Any, calibration: Calibration, ids: np.ndarray, table: Tensor | None = None) -> Tensor:
    """Ids (B, T) of a calibration -> embeddings (B, T, H), the pictures' rows in their places.

    `table` (V, H) takes the place of the model's own.
    """
    table = model.get_input_embeddings().weight if table is None else table
    numbers = torch.from_numpy(ids.astype(np.int64))
    text = nn.functional.embedding(numbers.clamp(max=calibration.vocabulary - 1), table)
    places = numbers >= calibration.vocabulary
    if not places.any():
        return text
    rows = torch.from_numpy(calibration.images)[numbers[places] - calibration.vocabulary]
    return text.masked_scatter(places[..., None], rows.to(text.dtype))


@torch.no_grad()
def layers(model: Any, batches: Sequence[Tensor]) -> Iterator[tuple[int, nn.Module, list[Call]]]:
    """Yield (number, layer, calls) for one layer after the other.

    The next layer reads what this one gives when the consumer comes back: changed weights change what follows.
    """
    calls = [_first_call(model, embeds) for embeds in batches]
    for number, layer in enumerate(model.model.layers):
        yield number, layer, calls
        for call in calls:
            call.hidden = call.run(layer)


class _Stop(Exception):
    pass


def _first_call(model: Any, embeds: Tensor) -> Call:
    """The model's own arguments for its first layer: positions and mask come from it, not from us."""
    calls: list[Call] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args[0], kwargs))
        raise _Stop

    with model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True), suppress(_Stop):
        model(inputs_embeds=embeds, use_cache=False)
    return calls[0]


def inputs_of(layer: nn.Module, calls: Sequence[Call], seen: Callable[[str, Tensor], None]) -> None:
    """Run the layer over all calls; `seen(matrix, x)` gets each matrix's input (B * T, I)."""
    with ExitStack() as hooks:
        for name in MATRICES:
            hooks.enter_context(
                layer.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, name=name: seen(name, args[0].flatten(0, -2))  # type: ignore[misc]
                )
            )
        for call in calls:
            call.run(layer)
