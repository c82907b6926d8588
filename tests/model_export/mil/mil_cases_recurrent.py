"""Cases of recurrent layers."""

import itertools
from typing import Any

import numpy as np
from mil_case import Case, uniform
from mil_oracles_recurrent import np_gru, np_lstm, np_rnn

STEPS, BATCH, INPUTS, SIZE = 4, 3, 2, 5


def weights(gates: int, seed: int = 0, suffix: str = "") -> dict[str, Any]:
    return {
        f"weight_ih{suffix}": uniform(gates * SIZE, INPUTS, low=-1, high=1, seed=seed),
        f"weight_hh{suffix}": uniform(gates * SIZE, SIZE, low=-1, high=1, seed=seed + 1),
        f"bias{suffix}": uniform(gates * SIZE, low=-1, high=1, seed=seed + 2),
    }


def inputs(*states: str, directions: int = 1) -> dict[str, np.ndarray]:
    start = {name: uniform(BATCH, directions * SIZE, low=-1, high=1, seed=i) for i, name in enumerate(states)}
    return {"x": uniform(STEPS, BATCH, INPUTS, low=-2, high=2), **start}


def recurrent() -> list[Case]:
    one, two = inputs("initial_h"), inputs("initial_h", "initial_c")
    directions = itertools.product(("forward", "reverse"), (True, False))
    plain = [{"direction": direction, "output_sequence": every} for direction, every in directions]
    cases = [Case("rnn", one, weights(1) | more, np_rnn) for more in plain]
    cases += [Case("rnn", one, weights(1) | {"activation": name}, np_rnn) for name in ("relu", "sigmoid", "linear")]
    cases += [Case("gru", one, weights(3) | more, np_gru) for more in plain]
    swapped = {"activation": "sigmoid", "recurrent_activation": "tanh", "output_sequence": True}
    unbiased = {key: value for key, value in weights(3).items() if key != "bias"}
    cases += [Case("gru", one, unbiased | swapped, np_gru)]
    more_bias = {"input_bias": uniform(3 * SIZE, seed=9), "output_sequence": True}
    cases += [Case("gru", one, weights(3) | more_bias | {"reset_after": after}, np_gru, "iOS18")
              for after in (True, False)]  # fmt: skip
    cases += [Case("gru", one, weights(3) | {"reset_after": True}, np_gru, "iOS18")]
    cases += [Case("lstm", two, weights(4) | more, np_lstm) for more in plain]
    looks = {"peephole": uniform(3 * SIZE, low=-1, high=1, seed=3), "output_sequence": True}
    cases += [Case("lstm", two, weights(4) | looks | {"clip": np.float32(clip)}, np_lstm) for clip in (0.25, 50)]
    names = ("scaled_tanh", "hard_sigmoid", "relu", "linear")
    cases += [Case("lstm", two, weights(4) | {"activation": name, "cell_activation": "sigmoid"}, np_lstm)
              for name in names]  # fmt: skip
    both = weights(4) | weights(4, 5, "_back") | {"direction": "bidirectional"}
    wide = inputs("initial_h", "initial_c", directions=2)
    cases += [Case("lstm", wide, both | {"output_sequence": every}, np_lstm) for every in (True, False)]
    looks |= {"peephole_back": uniform(3 * SIZE, low=-1, high=1, seed=4), "clip": np.float32(0.5)}
    return [*cases, Case("lstm", wide, both | looks, np_lstm)]
