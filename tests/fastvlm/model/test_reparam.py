"""The fold is exact on non-trivial statistics, leaves nothing behind, and its proof notices every kind of error."""

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.fastvit import MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from torch import nn

from fastvlm.common.errors import CheckFailed
from fastvlm.model import fold
from fastvlm.model.depthwise import depthwise
from tests.helpers import relative

pytestmark = pytest.mark.slow

TINY = {"layers": (1, 2, 1, 1, 1), "embed_dims": (8, 16, 32, 64, 128), "num_classes": 0}
SMALL = 128  # pixels: enough for tests that do not ask whether every kernel tap is seen


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorms, biases and layer scales values under which no term of the fold is negligible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            draw(module.running_mean, -0.5, 0.5)
            draw(module.running_var, 0.3, 2.0)
            draw(module.weight, -1.5, 1.5)
            draw(module.bias, -0.5, 0.5)
        elif type(module).__name__ == "LayerScale2d":
            draw(module.gamma, -1.0, 1.0)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            draw(module.weight, -((3 / fan_in) ** 0.5), (3 / fan_in) ** 0.5)
            if module.bias is not None:
                draw(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.LayerNorm):
            draw(module.weight, 0.5, 1.5)
            draw(module.bias, -0.5, 0.5)
    return model.eval()


def encoder(inference_mode: bool = False, seed: int = 0) -> nn.Module:
    return randomize(timm.create_model("fastvit_mci3", inference_mode=inference_mode, **TINY), seed)


@pytest.fixture(scope="module", params=["training", "folded"])
def original(request: pytest.FixtureRequest) -> nn.Module:
    return encoder(inference_mode=request.param == "folded")


@torch.no_grad()
def features(model: nn.Module, size: int = SMALL) -> torch.Tensor:
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model.forward_features(pixels.to(next(model.parameters()).dtype)).double()


def test_the_fold_is_exact_and_the_original_untouched(original: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    folded, errors = fold.fold_and_prove(original)
    assert max(errors.values()) <= fold.FOLD_TOLERANCE
    parts = {"stem.0", "stages.1.blocks.1.mlp.conv", "stages.4.pos_emb", "stages.3.blocks.0.layer_scale_1"}
    assert parts <= set(errors)
    assert list(errors)[-1] == "forward_features"
    assert fold.prove(original, fold.fold(original, torch.float64)) <= fold.FOLD_TOLERANCE
    after = original.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not {t.data_ptr() for t in original.parameters()} & {t.data_ptr() for t in folded.parameters()}
    # said once more without the module's own machinery: plain PyTorch, in float64
    wide = fold.fold(original, torch.float64)
    assert relative(features(wide), features(copy.deepcopy(original).double())) < 1e-12
    assert relative(features(folded), features(original)) < 1e-5
    assert {t.dtype for t in folded.parameters()} == {torch.float32} and not folded.training


def test_fold_and_prove_returns_the_fold(original: nn.Module) -> None:
    proved, _ = fold.fold_and_prove(original, SMALL)
    plain = fold.fold(original)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in proved.state_dict().items())


def test_nothing_unfolded_is_left_and_names_are_timms(original: nn.Module) -> None:
    folded = fold.fold(original)
    kinds = {type(module).__name__ for module in folded.modules()}
    assert not [kind for kind in kinds if "BatchNorm" in kind] and "LayerScale2d" not in kinds
    expected = {
        name for name in encoder(inference_mode=True).state_dict() if ".bn." not in name and "layer_scale" not in name
    }
    added = set(folded.state_dict()) - expected
    assert expected <= set(folded.state_dict()) and all(name.endswith("mlp.conv.conv.bias") for name in added)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_kernels_equal_timms_own_reparameterization() -> None:
    original = encoder().double()
    theirs = timm.utils.model.reparameterize_model(original).state_dict()
    ours = fold.fold(original).state_dict()
    shared = [name for name in theirs if "reparam_conv" in name]
    assert len(shared) > 30
    assert all(relative(ours[name], theirs[name]) < 1e-13 for name in shared)


def test_a_half_precision_checkpoint_is_folded_from_its_stored_values() -> None:
    original = encoder().half()
    folded, errors = fold.fold_and_prove(original, SMALL)
    assert max(errors.values()) <= fold.FOLD_TOLERANCE
    exact = fold.fold(copy.deepcopy(original).double()).state_dict()
    assert all(torch.equal(tensor, exact[name].half()) for name, tensor in folded.state_dict().items())
    wide, _ = fold.fold_and_prove(original, SMALL, dtype=torch.float32)
    assert all(torch.equal(tensor, exact[name].float()) for name, tensor in wide.state_dict().items())


def tamper(model: nn.Module, what: str) -> str:
    """Spoil one thing; returns the name of the first module whose output changes."""
    if what == "BatchNorm mean":
        model.stages[2].blocks[0].mlp.conv.bn.running_mean[3] *= 1 + 1e-6
        return "stages.2.blocks.0.mlp.conv"
    if what == "BatchNorm variance":
        model.stages[3].blocks[0].mlp.conv.bn.running_var[3] *= 1 + 1e-6
        return "stages.3.blocks.0.mlp.conv"
    if what == "branch":
        model.final_conv.conv_scale = None
        return "final_conv"
    if what == "skip of the position encoding":
        model.stages[3].pos_emb.pos_enc.weight.data[:, :, 3, 3] -= 1
        return "stages.3.pos_emb"
    if what == "layer scale":
        model.stages[4].blocks[0].layer_scale_2.gamma.data[5] *= 1 + 1e-6
        return "stages.4.blocks.0.layer_scale_2"
    model.stages[4].blocks[0].token_mixer.proj.weight.data[0, 0] += 1e-6
    return "stages.4.blocks.0.layer_scale_1"


@pytest.mark.parametrize(
    "what",
    ["BatchNorm mean", "BatchNorm variance", "branch", "skip of the position encoding", "layer scale", "one weight"],
)
def test_the_proof_notices_and_names_one_wrong_value(what: str) -> None:
    original = encoder().double()
    spoiled = copy.deepcopy(original)
    first = tamper(spoiled, what)
    errors = fold.measure(original, fold.fold(spoiled), SMALL)
    broken = [name for name, error in errors.items() if error > fold.FOLD_TOLERANCE]
    assert broken[0] == first and "forward_features" in broken
    assert fold.prove(original, fold.fold(spoiled), SMALL) > fold.FOLD_TOLERANCE


def test_fold_and_prove_refuses_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(module: RepConditionalPosEnc) -> None:
        """What is easily forgotten: the skip connection."""
        module.reparam_conv = module.pos_enc
        del module.pos_enc

    monkeypatch.setattr(RepConditionalPosEnc, "reparameterize", forgetful)
    with pytest.raises(CheckFailed, match=r"first at stages\.3\.pos_emb, relative error"):
        fold.fold_and_prove(encoder(), SMALL)


@pytest.mark.parametrize(
    ("where", "function", "left"),
    [
        (RepConditionalPosEnc, "reparameterize", r"stages\.3\.pos_emb \(RepConditionalPosEnc\), stages\.4\.pos_emb"),
        (fold, "_fold_conv_norm", r"stages\.0\.blocks\.0\.mlp\.conv\.bn \(BatchNormAct2d\)"),
        (ReparamLargeKernelConv, "reparameterize", r"stages\.1\.downsample\.proj\.0 \(ReparamLargeKernelConv\)"),
        (fold, "_fold_layer_scale", r"stages\.0\.blocks\.0\.layer_scale \(LayerScale2d\)"),
    ],
)
def test_a_branch_left_unfolded_is_refused_with_the_list(
    monkeypatch: pytest.MonkeyPatch, where: Any, function: str, left: str
) -> None:
    monkeypatch.setattr(where, function, lambda *arguments: None)
    with pytest.raises(CheckFailed, match=left):
        fold.fold(encoder())
    with pytest.raises(CheckFailed, match=left):
        fold.fold_and_prove(encoder(), SMALL)


def test_a_batchnorm_that_cannot_be_folded_is_refused() -> None:
    model = encoder()
    model.stages[3].blocks[0].norm = nn.BatchNorm2d(64)  # as in FastViT variants whose attention is not after LayerNorm
    with pytest.raises(CheckFailed, match=r"left unfolded: stages\.3\.blocks\.0\.norm \(BatchNorm2d\)$"):
        fold.fold(model)


def test_values_that_do_not_fit_are_refused() -> None:
    model = encoder()
    model.stages[2].blocks[0].mlp.conv.bn.running_var[0] = 1e-20
    model.stages[2].blocks[0].mlp.conv.bn.eps = 0.0
    with pytest.raises(CheckFailed, match=r"^stages\.2\.blocks\.0\.mlp\.conv\.conv\.weight, folded, .*float16"):
        fold.fold(model, torch.float16)
    model.final_conv.conv_scale.conv.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(CheckFailed, match=r"^final_conv\.reparam_conv\.weight, folded, .*float32"):
        fold.fold_and_prove(model, SMALL)


def test_proving_a_cast_fold_is_refused() -> None:
    model = encoder()
    with pytest.raises(ValueError, match="float64 fold"):
        fold.prove(model, fold.fold(model), SMALL)


def test_a_unit_that_never_ran_is_not_proved() -> None:
    model = encoder()
    model.spare = MobileOneBlock(8, 8, 3)
    with pytest.raises(CheckFailed, match="nothing to compare at spare"):
        fold.fold_and_prove(model, SMALL)


@settings(max_examples=40)
@given(data=st.data())
def test_every_kind_of_branch_folds_exactly(data: st.DataObject) -> None:
    channels, kernel = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([1, 3, 5, 7]))
    kind = data.draw(st.sampled_from(["mobile one", "large kernel", "mixer", "position"]))
    module: nn.Module
    if kind == "mobile one":
        module = MobileOneBlock(
            channels,
            channels * data.draw(st.sampled_from([1, 2])),
            kernel,
            stride=data.draw(st.sampled_from([1, 2])),
            group_size=data.draw(st.sampled_from([0, 1, 2])),
            use_se=data.draw(st.booleans()),
            use_scale_branch=data.draw(st.booleans()),
            num_conv_branches=data.draw(st.integers(1, 3)),
        )
    elif kind == "large kernel":
        stride, act = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([None, nn.GELU]))
        module = ReparamLargeKernelConv(channels, 2 * channels, 7, stride, 1, small_kernel=3, act_layer=act)
    elif kind == "mixer":
        module = RepMixer(channels, kernel, layer_scale_init_value=data.draw(st.sampled_from([None, 1.0])))
    else:
        module = RepConditionalPosEnc(channels, spatial_shape=(kernel, kernel))
    module = randomize(module, data.draw(st.integers(0, 99))).double()
    folded = fold.fold(module)
    x = torch.rand(2, channels, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        assert relative(folded(x), module(x)) < 1e-12
        next(p for n, p in folded.named_parameters() if "reparam_conv" in n).data[0] += 1e-6
        assert relative(folded(x), module(x)) > 1e-10  # the comparison sees one kernel off by a millionth


@settings(max_examples=25)
@given(
    kernel=st.sampled_from([1, 3, 7]),
    stride=st.sampled_from([1, 2]),
    multiple=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_depthwise_by_taps_is_conv2d(kernel: int, stride: int, multiple: int, bias: bool) -> None:
    x, weight = torch.randn(2, 3, 8, 11, dtype=torch.float64), torch.randn(3 * multiple, 1, kernel, kernel).double()
    shift = torch.randn(3 * multiple, dtype=torch.float64) if bias else None
    arguments = (x, weight, shift, (stride, stride), (kernel // 2, kernel // 2), (1, 1), 3)
    assert torch.allclose(depthwise(*arguments), torch.conv2d(*arguments), rtol=0, atol=1e-13)


def test_the_real_shape() -> None:
    model = randomize(timm.create_model("fastvit_mci3", num_classes=0))
    _, errors = fold.fold_and_prove(model)
    assert max(errors.values()) <= fold.FOLD_TOLERANCE
