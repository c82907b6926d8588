"""Round trips of whole architectures: torch to a saved program to the executor, one line each in TRIPS.

A row is converted once: every third in float16, the others in float32, and the weights of some of these are then
compressed. `benchmarks.suites.trips` has every row in both, at its full size, with its speed.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.suites import trips
from benchmarks.suites.trip_models import TRIPS
from model_export import mil
from tests.helpers import snr_db

pytestmark = pytest.mark.slow

# in the benchmark alone: minutes of coremltools
LONG = {
    "ghostnet", "googlenet", "mobilevitv2", "poolformer", "repvgg", "mnasnet", "levit", "seresnet", "efficientformer",
    "shufflenet", "inceptionnext",
}  # fmt: skip
NAMES = [name for name in TRIPS if name not in LONG]
HALF = [name for name in NAMES[::3] if not TRIPS[name].typed_outputs]
SINGLE = [name for name in NAMES if name not in HALF]
KIND = {
    "vit": "palette4", "distilbert": "palette6-group", "squeezenet": "int8", "gpt2": "int4-block",
    "diffusion": "sparse", "qwen2": "sparse-palette", "rnn": "int8",
}  # fmt: skip
DECODER = TRIPS["decoder"]
STEPS = 6  # tokens that a decoder generates


def outputs(package: Path, compute: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    executor = mil.load(package, compute=compute)
    state = executor.make_state() if executor.interface.states else None
    found = executor.predict({f"x{i}": x for i, x in enumerate(inputs)}, state=state)
    return [found[name] for name in executor.outputs]


def expected(name: str, seed: int = 0) -> list[np.ndarray]:
    with torch.inference_mode():
        return trips.flat(trips.built(TRIPS[name])(*trips.tensors(TRIPS[name], seed)))


def test_there_are_three_dozen() -> None:
    assert len(NAMES) >= 36 and set(KIND.values()) == set(trips.KINDS) and set(TRIPS) > LONG and set(TRIPS) > set(KIND)


@pytest.mark.parametrize("name", HALF)
def test_float16_as_typed(name: str, tmp_path: Path) -> None:
    """Rounding to float16 is noise 71 dB below a value; that of N operations adds up to 10 log10 N more, and what
    layers amplify is given 16 dB."""
    trips.convert(trips.built(TRIPS[name]), TRIPS[name], tmp_path / "m.mlpackage", "float16")
    least = 55 - 10 * math.log10(len(mil.load(tmp_path / "m.mlpackage").operations))
    found = outputs(tmp_path / "m.mlpackage", "as-typed", TRIPS[name].arrays())
    for wanted, other, got in zip(expected(name), expected(name, seed=1), found, strict=True):
        assert snr_db(wanted, got) > least > snr_db(other, got)  # the control: another input's result fails


@pytest.mark.parametrize("name", SINGLE)
def test_float32(name: str, tmp_path: Path) -> None:
    trips.convert(trips.built(TRIPS[name]), TRIPS[name], tmp_path / "m.mlpackage")
    found = outputs(tmp_path / "m.mlpackage", "float32", TRIPS[name].arrays())
    for wanted, other, got in zip(expected(name), expected(name, seed=1), found, strict=True):
        assert trips.relative_error(wanted, got) < 1e-4
        assert trips.relative_error(other, got) > 1e-3


@pytest.mark.parametrize("name, kind", KIND.items())
def test_compressed_weights(name: str, kind: str, tmp_path: Path) -> None:
    """Against the program with the weights that coremltools decompresses."""
    model, inputs = trips.convert(trips.built(TRIPS[name]), TRIPS[name], tmp_path / "m.mlpackage"), TRIPS[name].arrays()
    found = {}
    for which, made in zip(("compressed", "decompressed"), trips.compressed(model, kind), strict=True):
        made.save(str(tmp_path / f"{which}.mlpackage"))
        found[which] = outputs(tmp_path / f"{which}.mlpackage", "float32", inputs)
    stored = mil.read_package(tmp_path / "compressed.mlpackage").functions["main"].block.operations
    assert any(operation.type.startswith("constexpr_") for operation in stored)
    plain = outputs(tmp_path / "m.mlpackage", "float32", inputs)
    for wanted, got, uncompressed in zip(found["decompressed"], found["compressed"], plain, strict=True):
        assert trips.relative_error(wanted, got) < 1e-5
        assert trips.relative_error(uncompressed, got) > 1e-4


@pytest.mark.parametrize("precision, compute", [("float32", "float32"), ("float16", "as-typed")])
def test_a_decoder_generates_the_same_tokens(precision: str, compute: str, tmp_path: Path) -> None:
    """Each token is the last one's answer; keys and values stay in the states."""
    trips.convert(trips.built(DECODER), DECODER, tmp_path / "m.mlpackage", precision)
    module, executor = trips.built(DECODER), mil.load(tmp_path / "m.mlpackage", compute=compute)

    def generate(step: Any) -> tuple[list[int], list[np.ndarray]]:
        tokens, logits = [7], []
        for position in range(STEPS):
            logits.append(step(np.array([tokens[-1]], np.int32), np.array([position], np.int32)))
            tokens.append(int(logits[-1].argmax()))
        return tokens, logits

    with torch.inference_mode():
        want, wanted = generate(lambda *given: module(*map(torch.from_numpy, given)).numpy())
    state = executor.make_state()
    (output,) = executor.outputs
    got, logits = generate(lambda token, position: executor.predict({"x0": token, "x1": position}, state)[output])
    assert got == want and len(set(want)) > 2
    assert snr_db(np.stack(wanted), np.stack(logits)) > 45
    _, forgetful = generate(
        lambda token, position: executor.predict({"x0": token, "x1": position}, executor.make_state())[output]
    )
    assert snr_db(np.stack(wanted), np.stack(forgetful)) < 25
