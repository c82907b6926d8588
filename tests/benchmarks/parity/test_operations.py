"""One run as typed beside two others: each operation meets its own, each layer of PyTorch's its own, in order."""

import copy

import numpy as np
import pytest
import torch
from timm.models.fastvit import LayerScale2d
from torch import nn

from benchmarks.parity import operations
from benchmarks.parity.operations import Value, compare, layers_of
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.model.build import encoder
from fastvlm.model.fold import fold


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture
def pixels():
    return torch.from_numpy(np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32))


def layers(net, pixels):
    """A run of the module, as `compare` wants its reference."""

    def run(emit):
        with layers_of(net, emit):
            net(pixels)

    return run


def values(net, pixels, rounds=False):
    """A PyTorch module in the place of the saved program."""
    found: list[Value] = []
    layers(net, pixels)(found.append)
    return [
        Value(f"op_{one.name}", one.type, one.array.astype(np.float16) if rounds else one.array, half=True)
        for one in found
    ]


def compared(program, reference, pixels, extra=()):
    typed = [*values(program, pixels, rounds=True), *extra]
    return compare(typed, [*values(program, pixels), *extra], layers(reference, pixels))


def test_operations_and_layers_each_meet_their_own(net, pixels):
    found = compared(net, net, pixels)
    assert found.half and found.fault is None
    assert [error.name for error in found.rounding] == ["op_stem", "op_body", "op_head"]
    assert [(error.index, error.name, error.layer) for error in found.layers] == [
        (0, "op_stem", "stem"),
        (1, "op_body", "body"),
        (2, "op_head", "head"),
    ]
    assert all(55 < error.snr_db < 90 for error in found.rounding + found.layers)


def test_nothing_is_computed_ahead(net, pixels):
    """Else the values of whole runs would have to be kept."""
    log: list[str] = []

    given = values(net, pixels)

    def logged(side):
        for value in given:
            log.append(f"{side} {value.name}")
            yield value

    def reference(emit):
        def note(value):
            log.append(f"layer {value.name}")
            emit(value)

        layers(net, pixels)(note)

    compare(logged("typed"), logged("float32"), reference)
    assert log[:4] == ["layer stem", "typed op_stem", "float32 op_stem", "typed op_body"]  # a BatchNorm may follow
    assert log.index("layer body") < log.index("typed op_head") and len(log) == 9


def test_one_perturbed_weight_shows_in_its_layer_first(net, pixels):
    other = copy.deepcopy(net)
    other.body.weight[0, 0, 1, 1] += 0.5
    errors = compared(other, net, pixels).layers
    assert errors[0].snr_db > 55
    assert errors[1].layer == "body" and errors[1].snr_db < 40


def test_a_batch_norm_is_part_of_its_convolution(net, pixels):
    stem, body, head = values(net, pixels)
    program = [Value("bare", "conv", stem.array * 2), Value("normed", "batch_norm", stem.array), body, head]
    found = compare(program, program, layers(net, pixels))
    assert [(error.index, error.name) for error in found.layers] == [(1, "normed"), (2, "op_body"), (3, "op_head")]
    assert all(error.snr_db == np.inf for error in found.layers)


def test_layers_that_do_not_match_are_a_fault(net, pixels):
    found = compared(net, net, pixels, extra=[Value("op_more", "conv", np.ones(3)), Value("last", "add", np.ones(3))])
    assert found.fault.endswith("layer 3: got conv op_more [3], expected nothing more")
    assert [error.name for error in found.rounding[-2:]] == ["op_more", "last"]  # all were compared
    longer = nn.Sequential(net, nn.Linear(2, 2))
    found = compared(net, longer, pixels)
    assert found.fault.endswith("layer 3: got nothing more, expected linear 1 [1, 2]")
    assert len(found.rounding) == 3


def test_an_error_in_the_program_reaches_the_caller(net, pixels):
    given = values(net, pixels)

    def broken():
        yield given[0]
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        compare(broken(), given, layers(net, pixels))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("form", ["training", "folded"])
def test_a_stored_encoder_has_the_layers_of_its_folded_form(make_checkpoint, form):
    """The oracle is the fold, and PyTorch's plain layers in it: same names, same order, same values to rounding."""
    stored = encoder(open_checkpoint(make_checkpoint(form=form, dtype="float32")))
    for module in stored.modules():
        if isinstance(module, LayerScale2d):
            module.gamma.data.uniform_(0.5, 2.0)
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    expected: dict[str, np.ndarray] = {}
    folded = fold(stored)
    for name, module in folded.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.register_forward_hook(
                lambda _, __, output, name=name: expected.__setitem__(name, output.numpy().copy())
            )
    with torch.inference_mode():
        folded.forward_features(pixels)
    assert len(expected) > 40
    for model in (stored, folded):
        found: list[tuple[str, float]] = []

        def take(value, found=found):
            layer = expected[value.name]
            array = np.moveaxis(value.array, 1, -1) if layer.ndim == 3 else value.array
            found.append((value.name, operations.snr_db(layer.ravel(), array.ravel())))

        with layers_of(model, take):
            model.forward_features(pixels)
        assert [name for name, _ in found] == list(expected)
        assert [one for one in found if one[1] < 100] == []
