"""Small FastViTs with random, non-trivial weights, hot ones, and plain figures, for the tests of an export."""

import hashlib
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
from safetensors.torch import load_file, save_file
from timm.models import fastvit
from torch import Tensor, nn

from benchmarks.parity.encoders import compare_operations
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.model.build import encoder
from fastvlm.model.fold import fold
from fastvlm.model.surface import TorchVision
from model_export import runtime
from model_export.artefact import read_whole

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


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def relative(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|, 0 for two silent ones; infinite for NaN anywhere."""
    assert actual.shape == expected.shape
    if not expected.any() and not actual.any():
        return 0.0
    return float(torch.nan_to_num((actual - expected).abs().max() / expected.abs().max(), nan=torch.inf))


def snr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    """-inf for what is not finite."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    assert expected.shape == actual.shape
    if not np.isfinite(actual).all():
        return -np.inf
    return float(10 * np.log10(np.sum(expected**2) / max(np.sum((expected - actual) ** 2), 1e-300)))


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


def constant_of(package: Path, operation: Any, parameter: str, function: str = "main") -> Any:
    """The value of an operation's parameter that is a constant of the program."""
    import coremltools as ct

    program = ct.utils.load_spec(str(package)).mlProgram.functions[function]
    name = operation.inputs[parameter].arguments[0].name
    for one in program.block_specializations[program.opset].operations:
        if one.type == "const" and one.outputs[0].name == name:
            return one.attributes["val"].immediateValue.tensor
    raise KeyError(name)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, gains: Mapping[str, float]) -> Path:
    """A copy of a checkpoint with the encoder's tensors that fully match a pattern multiplied; each must match one."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for pattern, gain in gains.items():
        matching = [name for name in tensors if re.fullmatch(pattern, name.removeprefix(VISION))]
        assert matching, pattern
        for name in matching:
            tensors[name] = tensors[name].float() * gain
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def heated(source: Path, target: Path, factors: Mapping[int, float]) -> Path:
    """A folded checkpoint's copy: the same function up to LayerNorm's eps, a stage's stream so many times as large."""
    gains = {}
    for stage, factor in factors.items():
        after = "final_conv" if stage == 4 else rf"stages\.{stage + 1}\.downsample\.proj\.0"
        gains[rf"stages\.{stage}\.pos_emb\.reparam_conv\.(weight|bias)"] = factor
        gains[rf"stages\.{stage}\.blocks\.\d+\.layer_scale_[12]\.gamma"] = factor
        gains[rf"stages\.{stage}\.blocks\.\d+\.mlp\.conv\.conv\.weight"] = 1 / factor
        gains[rf"{after}\.reparam_conv\.weight"] = 1 / factor
    return rewritten(source, target, gains)


def compared_operations(
    checkpoint: Path, artefact: Path, pixels: np.ndarray, resolution: int | None = None
) -> dict[str, Any]:
    """What parity says of the operations and layers of this artefact's package."""
    function = runtime.function_for(read_whole(artefact), artefact, resolution)
    reference = TorchVision(encoder(open_checkpoint(checkpoint)), "PyTorch", "")
    candidate = runtime.ExecutorVision(artefact, function=function)
    return compare_operations(artefact, reference, candidate, pixels)[0]
