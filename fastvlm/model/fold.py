"""Fold FastViT's training-time branches, BatchNorms and layer scales into plain convolutions, and prove the fold.

Everything folded here is linear at inference time, so the folded network is the same function (sources: RepVGG,
arXiv 2101.03697, for branches and BatchNorm; FastViT, arXiv 2303.14189, for RepMixer and the position encoding).
Unlike timm's and Apple's re-parameterization it also folds the BatchNorm in each ConvFFN and every layer scale.
The price: below 1e-2 a layer scale pushes fc2's weights into float16's subnormals (rounding error of that branch 2e-4
relative at 1e-2, 8e-4 at 1e-3, 9e-3 at 1e-4; a processor that flushes subnormals loses 8 % of it at 1e-2).
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timm.layers import ConvNormAct
from timm.models.fastvit import (
    AttentionBlock,
    LayerScale2d,
    MobileOneBlock,
    ReparamLargeKernelConv,
    RepConditionalPosEnc,
    RepMixer,
    RepMixerBlock,
)
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastvlm.common.errors import CheckFailed
from fastvlm.model.depthwise import DepthwiseByTaps

# Float64 carries 1e-16 and some hundred layers in a row lose two or three digits (2e-14 measured on the real shape);
# a real fault, such as one statistic off by a millionth, shows at 1e-7 or more.
FOLD_TOLERANCE = 1e-10
# Pixels, side of the proof's image: the smallest at which every tap of the 7x7 kernels in the last stage (side / 64
# = 4 pixels, so offsets up to 3) meets a real pixel. Smaller images would leave taps that only ever see padding;
# larger ones cost float64 time (16 times as much at 1024) and test nothing more.
PROOF_SIZE = 256

_BRANCHED = (MobileOneBlock, ReparamLargeKernelConv, RepMixer, RepConditionalPosEnc)
Visit = Callable[[str, nn.Module], object]  # with a unit's name and the unit
# What is folded and cast in one go, so that a float64 copy of the whole encoder (1 GB) never exists.
_UNITS = (*_BRANCHED, RepMixerBlock, AttentionBlock, ConvNormAct)


def fold(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A folded deep copy of `model` (timm's FastViT, or any module that contains one), in eval mode, without gradients.

    Works on the training form and on timm's folded form (`inference_mode=True`), where the ConvFFN's BatchNorms and
    the layer scales are what is left to do. Names of surviving tensors stay those of timm's folded form, plus a bias
    in `mlp.conv.conv`; `layer_scale*` modules become identities.

    All arithmetic is float64 on the stored values; the result is cast once, to `dtype` or else to the dtype of
    `model`. Use `dtype=torch.float64` for a fold that `prove` can check, or `fold_and_prove` for both.

    Raises CheckFailed with the list of BatchNorms, branches and layer scales left, or if a weight does not fit `dtype`.
    """
    target = dtype or next(model.parameters()).dtype
    folded = _shallow_copy(model).eval()
    for name, unit in _units(folded):
        _fold_unit(name, unit)
        _cast(name, unit, target)
    return _finish(folded, target)


def fold_and_prove(
    model: nn.Module, image_size: int = PROOF_SIZE, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """Fold `model`, prove that very fold in float64, cast it: (folded in `dtype` or model's, errors as in `measure`).

    Each unit is folded to float64 when the forward pass reaches it and cast when the pass has left it.
    Raises CheckFailed as `fold` does, or naming the first module out of FOLD_TOLERANCE.
    """
    target = dtype or next(model.parameters()).dtype
    reference = _outputs(model, image_size, seed)
    folded = _shallow_copy(model).eval()
    errors = _errors(reference, folded, image_size, seed, _fold_unit, partial(_cast, dtype=target))
    broken = [name for name, error in errors.items() if not error <= FOLD_TOLERANCE]
    if broken:
        raise CheckFailed(
            f"the folded encoder differs from the original: first at {broken[0]}, relative error"
            f" {errors[broken[0]]:.1e}, tolerance {FOLD_TOLERANCE:.0e} ({len(broken)} of {len(errors)} outputs)"
        )
    return _finish(folded, target), errors


def prove(original: nn.Module, folded: nn.Module, image_size: int = PROOF_SIZE, seed: int = 0) -> float:
    """The largest relative error of a float64 fold: over the encoder's features and every compared module's output.

    `folded` must be float64 (see `fold`): after a cast the comparison would measure the cast. Random pixels in [0, 1),
    (1, 3, image_size, image_size). A NaN or infinity anywhere counts as infinite error. To be held to FOLD_TOLERANCE.
    """
    return max(measure(original, folded, image_size, seed).values())


def measure(original: nn.Module, folded: nn.Module, image_size: int = PROOF_SIZE, seed: int = 0) -> dict[str, float]:
    """As `prove`, but max|a - b| / max|a| by module name in order of execution; `forward_features` is the whole."""
    if next(folded.parameters()).dtype != torch.float64:
        raise ValueError("prove needs the float64 fold: fold(model, dtype=torch.float64), or fold_and_prove")
    return _errors(_outputs(original, image_size, seed), _shallow_copy(folded).eval(), image_size, seed, _widen, _drop)


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of _UNITS, by name."""
    if isinstance(module, _UNITS):
        yield prefix, module
    else:
        for name, child in module.named_children():
            yield from _units(child, f"{prefix}.{name}".lstrip("."))


def _parts(unit: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The places inside a block at which it is compared: foldable modules, and layer scales, which end as identities.

    Not its FFN or attention as a whole: they take in the layer scale that follows. Nor what is inside a branch.
    """
    if not isinstance(unit, (*_BRANCHED, ConvNormAct)):
        for name, child in unit.named_children():
            if isinstance(child, _UNITS) or name.startswith("layer_scale"):
                yield f"{prefix}.{name}", child
            else:
                yield from _parts(child, f"{prefix}.{name}")


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules that shares the tensors (which nothing here writes into)."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())})


def _own(module: nn.Module, dtype: torch.dtype) -> None:
    """Give `module` (not its children) tensors of its own, in `dtype`, without gradients."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = _parameter(parameter.detach().to(dtype, copy=True))
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(dtype if buffer.is_floating_point() else buffer.dtype, copy=True)


def _widen(name: str, unit: nn.Module) -> None:
    for module in unit.modules():
        _own(module, torch.float64)


def _drop(name: str, unit: nn.Module) -> None:
    """Free the memory of a unit in a temporary copy."""
    unit.to("meta")


def _fold_unit(name: str, unit: nn.Module) -> None:
    """Fold everything in `unit`, in place; its tensors become new float64 ones."""
    _widen(name, unit)
    for module in list(unit.modules()):  # parents come first: RepMixer folds the MobileOneBlocks inside it
        if isinstance(module, _BRANCHED) and module.reparam_conv is None:
            module.reparameterize()  # timm's arithmetic, on float64 tensors; the proof does not use it
            module.eval().requires_grad_(False)
        elif isinstance(module, RepMixerBlock):
            _fold_layer_scale(module, "layer_scale", module.mlp.fc2)
        elif isinstance(module, AttentionBlock):
            _fold_layer_scale(module, "layer_scale_1", module.token_mixer.proj)
            _fold_layer_scale(module, "layer_scale_2", module.mlp.fc2)
    for module in unit.modules():  # those inside branches are gone by now: left are the ConvFFN's
        if isinstance(module, ConvNormAct):
            _fold_conv_norm(module)


def _cast(name: str, unit: nn.Module, dtype: torch.dtype) -> None:
    """Cast a folded unit's tensors, in place; CheckFailed when a value does not fit."""
    unit.to(dtype)
    for tensor_name, tensor in unit.named_parameters(prefix=name):
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise CheckFailed(f"{tensor_name}, folded, is not finite in {dtype}: damaged, or too large for it")


def _finish(folded: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy what is outside the units (a classifier head, say), and refuse what should have been folded and was not."""
    inside = {id(module) for _, unit in _units(folded) for module in unit.modules()}
    for module in folded.modules():
        if id(module) not in inside:
            _own(module, dtype)
    left = [
        f"{name} ({type(module).__name__})"
        for name, module in folded.named_modules()
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, LayerScale2d))
        or (isinstance(module, _BRANCHED) and module.reparam_conv is None)
    ]
    if left:
        raise CheckFailed(f"left unfolded: {', '.join(left)}")
    return folded


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _scale_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm at inference is x * scale + shift per channel, (C,) each."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _fold_conv_norm(module: ConvNormAct) -> None:
    """Convolution + BatchNorm without activation becomes the convolution, with a bias, and an identity named `bn`."""
    if isinstance(module.bn, nn.BatchNorm2d) and isinstance(getattr(module.bn, "act", nn.Identity()), nn.Identity):
        scale, shift = _scale_shift(module.bn)
        bias = shift if module.conv.bias is None else shift + module.conv.bias * scale
        module.conv.weight = _parameter(module.conv.weight * scale.view(-1, 1, 1, 1))
        module.conv.bias = _parameter(bias)
        module.bn = nn.Identity()


def _fold_layer_scale(block: nn.Module, name: str, producer: nn.Conv2d | nn.Linear) -> None:
    """Multiply the rows of the projection that feeds a layer scale by it: one operation a branch less in the graph."""
    layer_scale = getattr(block, name)
    if isinstance(layer_scale, LayerScale2d):
        scale = layer_scale.gamma.flatten()
        producer.weight.mul_(scale.view(-1, *[1] * (producer.weight.ndim - 1)))  # in place: these are a block's largest
        if producer.bias is not None:
            producer.bias.mul_(scale)
        setattr(block, name, nn.Identity())


def _outputs(model: nn.Module, image_size: int, seed: int) -> dict[str, Tensor]:
    """The outputs of a float64 copy of `model`, by name (see `_run`)."""
    outputs: dict[str, Tensor] = {}
    _run(_shallow_copy(model).eval(), image_size, seed, _widen, _drop, outputs.__setitem__)
    return outputs


def _errors(
    reference: dict[str, Tensor], model: nn.Module, image_size: int, seed: int, enter: Visit, leave: Visit
) -> dict[str, float]:
    """Relative errors of `model`'s outputs by name; empties `reference`. CheckFailed if one was not compared."""
    errors: dict[str, float] = {}

    def compare(name: str, output: Tensor) -> None:
        if name in reference:
            errors[name] = _relative_error(reference.pop(name), output)

    _run(model, image_size, seed, enter, leave, compare)
    missing = [*reference, *(name for name, _ in _units(model) if name not in errors)]
    if missing:
        raise CheckFailed(f"the fold is not proved: nothing to compare at {', '.join(missing)}")
    return errors


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    if not expected.any() and not actual.any():
        return 0.0  # a dead output that stayed dead
    return float(torch.nan_to_num((actual - expected).abs().max() / expected.abs().max(), nan=torch.inf))


@torch.no_grad()
def _run(
    model: nn.Module, image_size: int, seed: int, enter: Visit, leave: Visit, record: Callable[[str, Tensor], object]
) -> None:
    """Run `forward_features` in float64 and `record` the outputs of units, of their `_parts`, and of the whole.

    `enter(name, unit)` runs when the forward pass reaches a unit, `leave(name, unit)` when it has left it.
    """
    hooks: list[RemovableHandle] = []

    def part(_module: nn.Module, _inputs: object, output: Tensor, name: str) -> None:
        record(name, output)

    def before(unit: nn.Module, _inputs: object, name: str) -> None:
        enter(name, unit)  # may replace what is inside, so only now can that be hooked
        hooks.extend(module.register_forward_hook(partial(part, name=inner)) for inner, module in _parts(unit, name))

    def after(unit: nn.Module, _inputs: object, output: Tensor, name: str) -> None:
        record(name, output)
        leave(name, unit)

    for name, unit in _units(model):
        hooks.append(unit.register_forward_pre_hook(partial(before, name=name)))
        hooks.append(unit.register_forward_hook(partial(after, name=name)))
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 3, image_size, image_size, dtype=torch.float64, generator=generator)
    with DepthwiseByTaps():
        record("forward_features", model.forward_features(pixels))  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
