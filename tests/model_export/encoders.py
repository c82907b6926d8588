"""Small FastViTs with random, non-trivial weights, hot ones, packages, and plain figures, for tests of an export."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from timm.models import fastvit
from torch import Tensor, nn

from benchmarks.parity.encoders import compare_operations
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from fastvlm.model.build import encoder
from fastvlm.model.fold import fold
from fastvlm.model.torch_parts import TorchVision
from fastvlm.synthetic.heat import heat
from model_export import contract, mil, runtime
from model_export.artefact import read_whole
from model_export.config import ExportConfig
from model_export.encoder import vision
from model_export.encoder.channel_first import Encoder
from tests.helpers import with_tensors

VISION = "model.vision_tower.timm_model."
WIDTHS = (4, 8, 8, 32, 64)
REAL_DEPTHS = (2, 12, 24, 4, 2)  # of FastViTHD: the numbers of operations depend on these, on widths nothing does


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Weights under which no bias, gamma, beta, BatchNorm or layer scale is negligible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.3, 2.0)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.5, 0.5)
        elif type(module).__name__ == "LayerScale2d":
            draw(module.gamma, 0.2, 1.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            side = (6 / module.weight[0].numel()) ** 0.5
            draw(module.weight, -side, side)
            if module.bias is not None:
                draw(module.bias, -0.3, 0.3)
    return model.eval().requires_grad_(False)


def folded(
    seed: int = 0,
    depths: Sequence[int] = (1, 1, 1, 1, 1),
    widths: Sequence[int] = WIDTHS,
    head_dim: int = 32,
    qkv_bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A folded FastViT of these sizes."""
    attention = partial(fastvit.Attention, head_dim=head_dim, qkv_bias=qkv_bias)
    with mock.patch.object(fastvit, "Attention", attention):  # timm builds no heads but of 32 channels, without a bias
        model = timm.create_model(
            "fastvit_mci3", inference_mode=True, num_classes=0, layers=tuple(depths), embed_dims=tuple(widths)
        )
    return fold(randomize(model, seed), dtype).requires_grad_(False)


def pixels_of(height: int, width: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, height, width or height, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def outputs_of(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """What every module puts out, by name; `NAME<` is what it takes; `features` the whole."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, output.clone())
            seen.setdefault(f"{name}<", inputs[0].clone())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    seen["features"] = model.forward_features(pixels)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def float64_features(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    """The oracle: features (1, N, C) of a checkpoint's encoder as it is stored, in float64."""
    model = encoder(open_checkpoint(checkpoint), torch.float32).double()
    return model.forward_features(torch.from_numpy(pixels).double()).flatten(2).transpose(1, 2).numpy()


# -- packages ---------------------------------------------------------------------------------------------------------


def exported(
    folder: Path, target: Path, source: str = "", output: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """`export_vision` of a checkpoint folder to the package `target`, measured on the drawn pictures: what it says."""
    config = ExportConfig(folder, output or target.with_name("out"), **settings)
    drawn = partial(pictures.pixels, read_preprocessor(folder))
    return vision.export_vision(open_checkpoint(folder), config, target, drawn, source)


def decomposed(encoder: nn.Module, size: int) -> torch.export.ExportedProgram:
    """The graph as coremltools asks for it."""
    with torch.no_grad():
        return torch.export.export(encoder.eval(), (torch.zeros(1, 3, size, size),)).run_decompositions({})


def save_encoder(fastvit: nn.Module, size: int, target: Path) -> Path:
    """An encoder, prepared or not, as a package, by the export's own conversion."""
    config = ExportConfig(target / "no-checkpoint", target / "out")
    vision._convert(decomposed(Encoder(fastvit), size), config, size, target, set(), {})
    return target


def computed(package: Path, pixels: np.ndarray, compute: str = "as-typed", function: str | None = None) -> np.ndarray:
    """What the executor makes of a package's bytes."""
    return mil.load(package, function, compute).predict({contract.INPUT: pixels})[contract.OUTPUT]


def forms_recipe(path: Path, rules: Mapping[str, str]) -> str:
    """Write a recipe of rules {glob over the encoder's layers: form}; its path."""
    schemes = [
        {"pattern": f"vision_encoder.{glob}", "scheme": {"mode": "coreml", "form": form}}
        for glob, form in rules.items()
    ]
    others = {"pattern": "*", "scheme": {"dtype": "float16"}}
    path.write_text(json.dumps({"name": "rules", "version": 2, "rules": [*schemes, others]}))
    return str(path)


# -- saved programs, by coremltools' own protobuf -----------------------------------------------------------------


def operations_of(package: Path, function: str = "main") -> Iterator[Any]:
    """The operations of a saved function that compute something, as protobuf has them."""
    import coremltools as ct

    program = ct.utils.load_spec(str(package)).mlProgram.functions[function]
    for operation in program.block_specializations[program.opset].operations:
        if operation.type != "const" and not operation.type.startswith("constexpr_"):
            yield operation


def counts_of(package: Path, function: str = "main") -> dict[str, int]:
    return dict(Counter(operation.type for operation in operations_of(package, function)))


def largest_rank(package: Path, function: str = "main") -> int:
    return max(
        len(output.type.tensorType.dimensions)
        for operation in operations_of(package, function)
        for output in operation.outputs
    )


def constant_of(package: Path, operation: Any, parameter: str) -> Any:
    """The value of an operation's parameter that is a constant of the program."""
    import coremltools as ct

    program = ct.utils.load_spec(str(package)).mlProgram.functions["main"]
    name = operation.inputs[parameter].arguments[0].name
    for one in program.block_specializations[program.opset].operations:
        if one.type == "const" and one.outputs[0].name == name:
            return one.attributes["val"].immediateValue.tensor
    raise KeyError(name)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, gains: Mapping[str, float]) -> Path:
    """A copy of a checkpoint with the encoder's tensors that fully match a pattern multiplied; each must match one."""

    def multiply(tensors: dict[str, Tensor]) -> None:
        for pattern, gain in gains.items():
            matching = [name for name in tensors if re.fullmatch(pattern, name.removeprefix(VISION))]
            assert matching, pattern
            for name in matching:
                tensors[name] = tensors[name].float() * gain

    return with_tensors(source, target, multiply)


def heated(source: Path, target: Path, factors: Mapping[int, float]) -> Path:
    """A folded checkpoint's copy: the same function up to LayerNorm's eps, a stage's stream so many times as large."""
    return heat(Path(shutil.copytree(source, target)), factors)


def compared_operations(
    checkpoint: Path, artefact: Path, pixels: np.ndarray, resolution: int | None = None
) -> dict[str, Any]:
    """What parity says of the operations and layers of this artefact's package."""
    function = runtime.function_for(read_whole(artefact), artefact, resolution)
    reference = TorchVision(encoder(open_checkpoint(checkpoint)), "PyTorch", "")
    candidate = runtime.ExecutorVision(artefact, function=function)
    return compare_operations(artefact, reference, candidate, pixels)[0]
