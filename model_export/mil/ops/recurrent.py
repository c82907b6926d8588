"""Recurrent layers. Semantics: coremltools defs `recurrent.py`; its tests say what a device does where the text is
silent: an LSTM clips the cell state itself, a GRU multiplies the state by the reset gate before the matrix product, and
`direction` "reverse" returns the last step first, as it turns the input round and nothing back ("bidirectional" does).

x is (steps, batch, inputs); weights are (gates * H, inputs or H). Under strict-fp16 each gate, its activation and both
states are rounded at every step; else only the results are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..registry import Kernel, Node, Unsupported, mil_op

Unary = Callable[[torch.Tensor], torch.Tensor]
Weight = torch.Tensor | None

# With the constants of `ActivationParams`: a scaled tanh is a tanh.
_ACTIVATIONS: dict[str, Unary] = {
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "relu": torch.relu,
    "linear": lambda x: x,
}


def _activation(node: Node, key: str, default: str) -> Unary:
    name, step = node.const(key, default), node.step
    function = _ACTIVATIONS.get(name.lower())
    if function is None:
        raise Unsupported(f"{key} {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return lambda x: step(function(x))


def _direction(node: Node, *allowed: str) -> str:
    direction: str = node.const("direction", "forward")
    if direction not in allowed:
        raise Unsupported(f"direction {direction!r}, expected one of {', '.join(allowed)}")
    return direction


def _checked(node: Node, gates: int, directions: int = 1) -> bool:
    """Whether every step is returned; Unsupported for operands that don't fit each other or the declared result."""
    steps, batch, inputs = node.type_of("x").shape
    hidden = node.type_of("weight_hh").shape[1]
    if hidden is None or hidden < 1:
        raise Unsupported(f"a weight_hh {node.type_of('weight_hh')}")
    expected: dict[str, tuple[int | None, ...]] = {
        "weight_ih": (gates * hidden, inputs), "weight_hh": (gates * hidden, hidden), "bias": (gates * hidden,),
        "input_bias": (gates * hidden,), "peephole": (3 * hidden,),
    }  # fmt: skip
    expected |= {f"{key}_back": shape for key, shape in expected.items()} if directions == 2 else {}
    expected |= {key: (batch, directions * hidden) for key in ("initial_h", "initial_c")}
    for key, shape in expected.items():
        if node.has(key):
            type = node.type_of(key)
            if len(type.shape) != len(shape) or any(None not in (a, b) and a != b for a, b in zip(type.shape, shape)):
                raise Unsupported(f"{key} {type}, expected {list(shape)}")
    every: bool = node.const("output_sequence", False)
    node.expects(steps if every else 1, batch, directions * hidden)
    return every


def _walk(
    cell: Callable[..., Any], project: Unary, x: torch.Tensor, state: Any, backwards: bool, every: bool
) -> tuple[torch.Tensor, Any]:
    """`cell(project(x[i]), state) -> state` over the steps: the first element of each state (or, unless `every`, of the
    last) in the order in which they come, and the last state."""
    x = x.flip(0) if backwards else x
    rows = project(x) if every else None  # all at once is faster, but larger than a result of one step
    outputs = []
    for i in range(len(x)):
        state = cell(project(x[i]) if rows is None else rows[i], state)
        if every:
            outputs.append(state[0])
    if not every:
        return state[0].unsqueeze(0), state
    return torch.stack(outputs) if outputs else x.new_zeros(0, *state[0].shape), state


def _native(
    node: Node, layer: Callable[..., Any], directions: int, turned: Callable[[torch.Tensor], torch.Tensor] = lambda w: w
) -> Callable[..., Any] | None:
    """PyTorch's own layer, which has every step's results, for x and the states; None where it can't be used.

    `turned`: weights with their gates in PyTorch's order. It is left to the loop over the steps to round within a step
    and to return the last one alone, in whose size PyTorch's intermediate results do not fit.
    """
    sizes = node.type_of("x").shape
    if node.decomposes or not node.const("output_sequence", False) or None in sizes or 0 in sizes:
        return None
    suffixes = ("", "_back")[:directions]
    given = [node.weight(f"{key}{suffix}") for suffix in suffixes for key in ("weight_ih", "weight_hh")]
    biases = [node.weight(f"bias{suffix}") for suffix in suffixes]
    floats = [weight for weight in given if weight is not None and weight.dtype == torch.float32]
    if len(floats) < len(given) or any(node.has(f"bias{end}") and b is None for end, b in zip(suffixes, biases)):
        return None
    weights: list[torch.Tensor] = []
    for place, bias in enumerate(biases):
        w_ih, w_hh = floats[2 * place : 2 * place + 2]
        bias = w_ih.new_zeros(len(w_ih)) if bias is None else bias
        weights += [turned(w_ih), turned(w_hh), turned(bias), torch.zeros_like(bias)]

    def run(x: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [torch.stack(state.chunk(directions, -1)) for state in states]
        settings = (weights, True, 1, 0.0, False, directions == 2, False)
        outputs, *lasts = layer(x, tuple(parts) if len(parts) > 1 else parts[0], *settings)
        return outputs, *(torch.cat([*last], -1) for last in lasts)

    return run


def _says(node: Node, key: str, default: str) -> str:
    return str(node.const(key, default)).lower()


@mil_op("rnn")
def rnn(node: Node) -> Kernel:
    """h = activation(W_ih x + W_hh h + b)."""
    every, backwards = _checked(node, 1), _direction(node, "forward", "reverse") == "reverse"
    activation, step = _activation(node, "activation", "tanh"), node.step
    layer = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}.get(_says(node, "activation", "tanh"))
    if layer is not None and (native := _native(node, layer, 1)) is not None:
        return node.kernel(lambda x, h: native(x.flip(0) if backwards else x, h), "x", "initial_h")

    def run(x: torch.Tensor, h: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, bias: Weight) -> Any:
        cell = lambda a, state: (activation(step(a + F.linear(state[0], w_hh))),)  # noqa: E731
        outputs, (h,) = _walk(cell, lambda x: F.linear(x, w_ih, bias), x, (h,), backwards, every)
        return outputs, h

    return node.kernel(run, "x", "initial_h", "weight_ih", "weight_hh", "bias")


def _gru(node: Node, after: bool) -> Kernel:
    """r, z = recurrent_activation(W x + R h + b), o = activation(W_o x + R_o (r h) + b_o), h = (1 - z) o + z h.

    after: o = activation(W_o x + b_io + r (R_o h + b_ho)), as in PyTorch. The order of the weights is r, o, z.
    """
    every, backwards = _checked(node, 3), _direction(node, "forward", "reverse") == "reverse"
    gate, activation = _activation(node, "recurrent_activation", "sigmoid"), _activation(node, "activation", "tanh")
    step = node.step

    def run(
        x: torch.Tensor, h: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, bias: Weight, more: Weight = None
    ) -> Any:
        (w_r, w_o, w_z), biases = w_hh.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)

        def cell(a: torch.Tensor, state: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (h,), (a_r, a_o, a_z) = state, a.chunk(3, -1)
            r = gate(step(a_r + F.linear(h, w_r, biases[0])))
            z = gate(step(a_z + F.linear(h, w_z, biases[2])))
            inner = step(r * step(F.linear(h, w_o, biases[1]))) if after else F.linear(step(r * h), w_o, biases[1])
            o = activation(step(a_o + inner))
            return (step(step(step(1 - z) * o) + step(z * h)),)

        outputs, (h,) = _walk(cell, lambda x: F.linear(x, w_ih, more), x, (h,), backwards, every)
        return outputs, h

    keys = ("x", "initial_h", "weight_ih", "weight_hh", "bias")
    return node.kernel(run, *keys, *(["input_bias"] if node.has("input_bias") else []))


@mil_op("gru")
def gru(node: Node) -> Kernel:
    return _gru(node, after=False)


@mil_op("gru", since="CoreML8")
def gru_ios18(node: Node) -> Kernel:
    return _gru(node, after=node.const("reset_after", False))


def _input_forget_cell_output(weight: torch.Tensor) -> torch.Tensor:
    i, f, o, z = weight.chunk(4)
    return torch.cat([i, f, z, o])


@mil_op("lstm")
def lstm(node: Node) -> Kernel:
    """i, f, o = recurrent_activation(W x + R h + b + p c), z = cell_activation(W x + R h + b), c = f c + i z, clipped,
    h = o activation(c). The output gate looks at the new c. The order of the weights is i, f, o, z.

    bidirectional: both directions' results beside each other, each with its own last step.
    """
    direction = _direction(node, "forward", "reverse", "bidirectional")
    both = direction == "bidirectional"
    every = _checked(node, 4, 2 if both else 1)
    gate = _activation(node, "recurrent_activation", "sigmoid")
    inner, outer = _activation(node, "cell_activation", "tanh"), _activation(node, "activation", "tanh")
    step, clip = node.step, node.const("clip", None)

    def cell(
        a: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor], w_hh: torch.Tensor, looks: tuple[Weight, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, c = state
        i, f, o, z = (a + F.linear(h, w_hh)).chunk(4, -1)

        def peeping(x: torch.Tensor, c: torch.Tensor, look: Weight) -> torch.Tensor:
            return gate(step(x if look is None else x + look * c))

        i, f = peeping(i, c, looks[0]), peeping(f, c, looks[1])
        c = step(step(f * c) + step(i * inner(step(z))))
        c = c if clip is None else c.clamp(-clip, clip)
        return step(peeping(o, c, looks[2]) * outer(c)), c

    def run(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, *weights: Any) -> Any:
        results = []
        for i, (w_ih, w_hh, bias, peephole) in enumerate(zip(*[iter(weights)] * 4)):
            width = w_hh.shape[1]
            part = slice(i * width, (i + 1) * width)
            looks = (None,) * 3 if peephole is None else peephole.chunk(3)
            backwards = direction == "reverse" or i == 1
            one, project = partial(cell, w_hh=w_hh, looks=looks), partial(F.linear, weight=w_ih, bias=bias)
            outputs, (last, memory) = _walk(one, project, x, (h[:, part], c[:, part]), backwards, every)
            results.append((outputs.flip(0) if i == 1 else outputs, last, memory))
        return tuple(torch.cat(parts, -1) if both else parts[0] for parts in zip(*results))

    keys = ["weight_ih", "weight_hh", "bias", "peephole"]
    back = [f"{key}_back" for key in keys]
    if both and not (node.has(back[0]) and node.has(back[1])):
        raise Unsupported("bidirectional without weight_ih_back and weight_hh_back")
    for key in back:
        node.has(key) and node.raw(key)  # may be given, and is not used, in one direction
    usual = {"recurrent_activation": "sigmoid", "cell_activation": "tanh", "activation": "tanh"}
    plain = all(_says(node, key, name) == name for key, name in usual.items())
    if plain and clip is None and not any(node.has(key) for key in ("peephole", "peephole_back")):
        native = _native(node, torch.lstm, 1 + both, _input_forget_cell_output)
        if native is not None:
            turned = lambda x, *states: native(x.flip(0) if direction == "reverse" else x, *states)  # noqa: E731
            return node.kernel(turned, "x", "initial_h", "initial_c")
    return node.kernel(run, "x", "initial_h", "initial_c", *keys, *(back if both else []))
