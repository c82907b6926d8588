"""NumPy oracles of recurrent layers, a loop over samples and steps, in the type of their operands' arithmetic.

`half` rounds every intermediate value to fp16: the chain of the policy strict-fp16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.minimum(np.maximum(0.2 * x + 0.5, 0), 1),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}


def rounded(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float64)


def whole(x: Array) -> Array:
    return x


def walked(x: Array, state: tuple[Array, ...], cell: Callable[..., Any], reverse: bool, every: bool) -> list[Array]:
    """The results of `cell(x[i], *state) -> state` in the order in which they come: each or the last, and the last
    state."""
    outputs = np.zeros((len(x), *state[0].shape))
    for i, step in enumerate(x[::-1] if reverse else x):
        state = cell(step, *state)
        outputs[i] = state[0]
    return [outputs if every else state[0][None], *state]


def np_rnn(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Any = 0.0, direction: str = "forward",
    output_sequence: bool = False, activation: str = "tanh", half: bool = False,
) -> list[Array]:  # fmt: skip
    r = rounded if half else whole
    x, h, w, u, b = (np.float64(value) for value in (x, initial_h, weight_ih, weight_hh, bias))
    cell = lambda x, h: (r(ACTIVATIONS[activation](r(x @ w.T + h @ u.T + b))),)  # noqa: E731
    return walked(x, (h,), cell, direction == "reverse", output_sequence)


def np_gru(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Any = None, direction: str = "forward",
    output_sequence: bool = False, recurrent_activation: str = "sigmoid", activation: str = "tanh",
    reset_after: bool = False, input_bias: Any = None, half: bool = False,
) -> list[Array]:  # fmt: skip
    """Weights in the order r, o, z."""
    r, zeros = rounded if half else whole, np.zeros(len(weight_ih))
    w, u, b, more = (
        np.split(np.float64(zeros if value is None else value), 3) for value in (weight_ih, weight_hh, bias, input_bias)
    )
    gate, act = ACTIVATIONS[recurrent_activation], ACTIVATIONS[activation]

    def cell(x: Array, h: Array) -> tuple[Array]:
        reset = r(gate(r(x @ w[0].T + more[0] + h @ u[0].T + b[0])))
        update = r(gate(r(x @ w[2].T + more[2] + h @ u[2].T + b[2])))
        inner = r(reset * r(h @ u[1].T + b[1])) if reset_after else r(reset * h) @ u[1].T + b[1]
        new = r(act(r(x @ w[1].T + more[1] + inner)))
        return (r(r(r(1 - update) * new) + r(update * h)),)

    return walked(np.float64(x), (np.float64(initial_h),), cell, direction == "reverse", output_sequence)


def np_lstm(
    x: Array, initial_h: Array, initial_c: Array, weight_ih: Array, weight_hh: Array, bias: Any = None,
    peephole: Any = None, weight_ih_back: Any = None, weight_hh_back: Any = None, bias_back: Any = None,
    peephole_back: Any = None, direction: str = "forward", output_sequence: bool = False,
    recurrent_activation: str = "sigmoid", cell_activation: str = "tanh", activation: str = "tanh",
    clip: float = np.inf, half: bool = False,
) -> list[Array]:  # fmt: skip
    """Weights in the order i, f, o, z."""
    r, results = rounded if half else whole, []
    gate, inner, outer = (ACTIVATIONS[name] for name in (recurrent_activation, cell_activation, activation))
    both, size = direction == "bidirectional", weight_hh.shape[1]
    sides = [(weight_ih, weight_hh, bias, peephole), (weight_ih_back, weight_hh_back, bias_back, peephole_back)]
    for side, (w_ih, w_hh, b_all, p_all) in enumerate(sides[: 2 if both else 1]):
        w, u = np.split(np.float64(w_ih), 4), np.split(np.float64(w_hh), 4)
        b = np.split(np.zeros(4 * size) if b_all is None else np.float64(b_all), 4)
        p = np.split(np.zeros(3 * size) if p_all is None else np.float64(p_all), 3)

        def cell(x: Array, h: Array, c: Array, w: Any = w, u: Any = u, b: Any = b, p: Any = p) -> tuple[Array, Array]:
            i = r(gate(r(x @ w[0].T + h @ u[0].T + b[0] + p[0] * c)))
            f = r(gate(r(x @ w[1].T + h @ u[1].T + b[1] + p[1] * c)))
            z = r(inner(r(x @ w[3].T + h @ u[3].T + b[3])))
            c = np.clip(r(r(f * c) + r(i * z)), -clip, clip)
            o = r(gate(r(x @ w[2].T + h @ u[2].T + b[2] + p[2] * c)))
            return r(o * r(outer(c))), c

        part = slice(side * size, (side + 1) * size)
        state = (np.float64(initial_h[:, part]), np.float64(initial_c[:, part]))
        outputs, *last = walked(np.float64(x), state, cell, direction == "reverse" or side == 1, output_sequence)
        results.append([outputs[::-1] if side == 1 else outputs, *last])  # beside the forward ones of the same steps
    return [np.concatenate(parts, -1) for parts in zip(*results)]
