"""A checkpoint's three programs: its weights in the modules, converted to assets."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2ForCausalLM

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.cli import progress
from fastvlm.common.dtypes import torch_dtype
from fastvlm.common.errors import UserError
from model_export.coreai import contract
from model_export.coreai.compress import compress
from model_export.coreai.convert import save
from model_export.coreai.modules import ATTENTION, Decoder, Embedding, VisionEncoder
from model_export.encoder import fp16
from model_export.encoder.channel_first import Encoder, channel_first
from model_export.encoder.graph import folded_encoder
from model_export.encoder.vision import range_safe
from quantization.coreai.plan import DECODER, EMBEDDING, VISION, Plan

_TRACED = (8, 16)  # new positions and all positions of the example that the decoder is traced with
Pixels = Callable[[], Iterable[np.ndarray]]  # arrays (1, 3, S, S) float32, the same at every call


@dataclass(frozen=True)
class Programs:
    """What is converted: the checkpoint, the interfaces' sizes, the programs' dtype, the forms of their weights.

    `dtype` is "float16"; "float32" makes twins that prove the graphs and that the engine does not load.
    """

    checkpoint: Checkpoint
    shape: contract.Shape
    dtype: str = "float16"
    plan: Plan = field(default_factory=lambda: Plan({}, {}))

    @property
    def interfaces(self) -> dict[str, contract.Function]:
        """Role -> interface."""
        return contract.interfaces(self.shape, self.dtype)

    def write_embedding(self, target: Path) -> None:
        """Write embed.aimodel."""
        with progress("embedding"):
            module = Embedding(self._read(naming.EMBEDDINGS, target.parent))
            compress(module, self.plan.of(EMBEDDING))
            name = self.interfaces["embedding"].inputs[0].name
            inputs = {name: torch.zeros(1, _TRACED[0], dtype=torch.int32)}
            open_axes = {name: {1: _axis("count", self.shape.context)}}
            save(module, inputs, target, output=self._output("embedding"), dynamic=open_axes)
            del module
            self.checkpoint.unmap()

    def write_decoder(self, target: Path) -> None:
        """Write the decoder with its two states."""
        with progress("decoder"):
            new, total = _TRACED
            dtype, shape = torch_dtype(self.dtype), self.shape
            size = [shape.context if size == contract.OPEN else size for size in shape.cache]
            inputs = {
                "inputs_embeds": torch.zeros(1, new, shape.hidden, dtype=dtype),
                "position_ids": torch.arange(total, dtype=torch.int32)[None],
                **{name: torch.empty(size, dtype=dtype) for name in contract.STATES},  # never read, so never in memory
            }
            open_axes = {
                "inputs_embeds": {1: _axis("new", shape.context)},
                "position_ids": {1: _axis("total", shape.context)},
            }
            if shape.grows:
                context = _axis("context", shape.context)
                open_axes |= {name: {3: context} for name in contract.STATES}
            module = Decoder(self._language(target.parent))
            compress(module, self.plan.of(DECODER))
            save(module, inputs, target, output=self._output("main"), dynamic=open_axes, states=contract.STATES)
            del module
            self.checkpoint.unmap()

    def write_vision(self, target: Path, pixels: Pixels) -> dict[str, Any]:
        """Write vision.aimodel, with powers of two chosen on pictures where float16 needs them; returns the manifest's
        facts."""
        fastvit: Any
        fastvit, errors = folded_encoder(self.checkpoint)
        projector = self._projector()
        facts: dict[str, Any] = {}
        if self.dtype == "float16":
            peaks: list[float] = []  # before the projector's GELU, seen on the same encodings
            seen = fastvit.final_conv.register_forward_hook(lambda *call: peaks.append(_peak(projector[0], call[-1])))
            encoder, facts["fp16"] = range_safe(fastvit, pixels())
            seen.remove()
            exponent = facts["fp16"]["projector_exponent"] = _exponent(max(peaks))
        else:
            encoder, exponent = Encoder(channel_first(fastvit)), 0
        with progress("vision"):
            module = VisionEncoder(encoder, projector, exponent)
            module.to(torch_dtype(self.dtype))
            module.output_dtype = torch_dtype(self.dtype)
            _check_finite(module, "the vision encoder")
            compress(module, self.plan.of(VISION))
            size = self.shape.image_size
            inputs = {self.interfaces["vision"].inputs[0].name: torch.zeros(1, 3, size, size)}
            save(module, inputs, target, output=self._output("vision"))
        return {"compared_outputs": len(errors), **facts}

    def _output(self, role: str) -> str:
        return self.interfaces[role].outputs[0].name

    def _read(self, name: str, folder: Path) -> torch.Tensor:
        """A weight in `dtype`, in no memory of its own: mapped from the checkpoint, or, where that has another dtype,
        from a file without a name in `folder`, which the system can write to and drop."""
        dtype = torch_dtype(self.dtype)
        same = self.checkpoint.tensors[name].dtype == self.dtype
        value = self.checkpoint.read(name, mapped=same).to(dtype)
        if not all(math.isfinite(bound) for bound in value.aminmax()):
            raise UserError(
                f"{self.checkpoint.path}: {name}: has values beyond {self.dtype}, which Core AI computes in:"
                " export for Core ML and MLX with --quant bf16"
            )
        if same:
            return value
        with TemporaryFile(dir=folder) as file:
            mapped = np.memmap(file, value.numpy().dtype, "w+", shape=tuple(value.shape))
        mapped[:] = value.numpy()
        return torch.from_numpy(mapped)

    def _language(self, folder: Path) -> Qwen2ForCausalLM:
        config: Any = self.checkpoint.hf_config.text_config
        config._attn_implementation = ATTENTION
        with torch.device("meta"):
            language = Qwen2ForCausalLM(config)
        language.model.embed_tokens = None  # a program of its own
        sources = {name: naming.LANGUAGE + name.removeprefix("model.") for name in language.state_dict()}
        sources["lm_head.weight"] = naming.EMBEDDINGS if self.checkpoint.tied else naming.LM_HEAD
        state = {name: self._read(source, folder) for name, source in sources.items()}
        language.load_state_dict(state, strict=True, assign=True)
        rotary = language.model.rotary_emb
        language.model.rotary_emb = type(rotary)(config=config)  # computed, in float32, not stored
        return language.eval().requires_grad_(False)

    def _projector(self) -> tuple[nn.Linear, nn.Linear]:
        """In float32: a power of two may go into the weights."""
        layers = []
        for layer in ("linear_1", "linear_2"):
            weight, bias = (
                self.checkpoint.read(f"{naming.PROJECTOR}{layer}.{part}").float() for part in ("weight", "bias")
            )
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
            layers.append(linear)
        return layers[0], layers[1]


def _axis(name: str, most: int) -> Any:
    return torch.export.Dim(name, min=1, max=most)


def _peak(layer: nn.Linear, features: torch.Tensor) -> float:
    """The largest magnitude of what a layer makes of features (1, C, h, w)."""
    return float(layer(features.flatten(2).transpose(1, 2)).abs().max())


def _exponent(peak: float) -> int:
    """The smallest k >= 0 for which float16 holds peak / 2^k with the encoder's headroom."""
    exponent = 0
    while peak / 2**exponent * fp16.HEADROOM > fp16.LARGEST:
        exponent += 1
    return exponent


def _check_finite(module: nn.Module, what: str) -> None:
    names = [name for name, value in module.named_parameters() if not value.isfinite().all()]
    if names:
        raise UserError(f"{what}: weights beyond float16: {', '.join(names[:5])}: the checkpoint can't run on Core AI")
