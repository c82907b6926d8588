"""Lockstep: two runs meet value by value, an error in one ends both, and layers must match one to one."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import operations
from benchmarks.operations import Value, lockstep
from fastvlm.errors import CheckFailed


def numbers(count, log=None, fail_at=None):
    def run(emit):
        for n in range(count):
            if n == fail_at:
                raise RuntimeError("broke")
            if log is not None:
                log.append(n)
            emit(Value(f"v{n}", "conv", np.full(4, float(n + 1))))

    return run


def test_values_come_in_order_and_the_run_waits_for_the_reader():
    log: list[int] = []
    seen = []
    for value in lockstep(numbers(5, log)):
        assert log == list(range(len(seen) + 1))  # nothing is computed ahead of the reader
        seen.append(value.name)
    assert seen == [f"v{n}" for n in range(5)]


def test_an_error_reaches_the_reader():
    with pytest.raises(RuntimeError, match="broke"):
        list(lockstep(numbers(5, fail_at=3)))


def test_a_reader_that_stops_leaves_no_thread():
    before = threading.active_count()
    for _ in lockstep(numbers(100)):
        break
    values = lockstep(numbers(100))
    next(values)
    values.close()
    assert threading.active_count() == before


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward_features(self, x):
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).random((1, 3, 8, 8), dtype=np.float32)


def as_program(monkeypatch, net, extra=()):
    """Let a PyTorch module stand for the saved program."""

    def program_values(package, pixels, compute, function):
        rounded = (lambda x: x.astype(np.float16).astype(np.float32)) if compute == "as-typed" else np.asarray
        inner = operations.layer_values(copy.deepcopy(net), pixels)

        def run(emit):
            inner(lambda value: emit(Value(f"op_{value.name}", value.type, rounded(value.array), half=True)))
            for value in extra:
                emit(value)

        return run

    monkeypatch.setattr(operations, "program_values", program_values)


def test_rounding_and_precision(monkeypatch, net, pixels):
    as_program(monkeypatch, net)
    errors, precision = operations.rounding_errors("package", pixels)
    assert precision == "float16"
    assert [error.name for error in errors] == ["op_stem", "op_body", "op_head"]
    assert all(55 < error.snr_db < 90 for error in errors)


def test_layers_have_their_names_in_pytorch(monkeypatch, net, pixels):
    as_program(monkeypatch, net)
    errors = operations.layer_errors("package", net, pixels)
    assert [(error.name, error.layer) for error in errors] == [
        ("op_stem", "stem"),
        ("op_body", "body"),
        ("op_head", "head"),
    ]
    assert all(error.snr_db > 55 for error in errors)


def test_one_perturbed_weight_shows_in_its_layer_first(monkeypatch, net, pixels):
    other = Net().eval()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.body.weight[0, 0, 1, 1] += 0.5
    as_program(monkeypatch, other)
    errors = operations.layer_errors("package", net, pixels)
    assert errors[0].snr_db > 55
    assert errors[1].layer == "body" and errors[1].snr_db < 40


def test_layers_that_do_not_match_are_a_failure(monkeypatch, net, pixels):
    as_program(monkeypatch, net, extra=[Value("op_more", "conv", np.ones(3))])
    with pytest.raises(CheckFailed, match=r"layer 3: got conv op_more \[3\], expected nothing more"):
        operations.layer_errors("package", net, pixels)
    as_program(monkeypatch, net)
    net.more, forward = nn.Linear(2, 2), net.forward_features
    longer = Net()
    longer.forward_features = lambda x: net.more(forward(x))
    longer.add_module("net", net)
    with pytest.raises(CheckFailed, match=r"layer 3: got nothing more, expected linear net\.more"):
        operations.layer_errors("package", longer, pixels)
