"""A reduced FastViTHD in every opset and by both conversion routes, against the module it was converted from."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mil_packages as packages
import numpy as np
import pytest
import torch

from model_export import mil
from model_export.mil.program import Operation
from tests.helpers import snr_db

pytestmark = pytest.mark.slow

FLOAT32_DB = 100.0
AS_TYPED_DB = 50.0
ROUNDING = ("as-typed", "strict-fp16")

# Every opset once (iOS 15 and 18 in fp16 by test_vision, too); jit.trace where its program differs most.
VARIANTS = [("export", "iOS16", "fp16"), ("export", "iOS17", "fp16"), ("export", "iOS18", "fp32")]
VARIANTS += [("trace", "iOS15", "fp16")]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`package(route, target, precision)`; shared, so read-only."""

    @functools.cache
    def make(route: str = "export", target: str = "iOS17", precision: str = "fp16") -> Path:
        path = tmp_path_factory.mktemp("encoder") / "encoder.mlpackage"
        packages.save_encoder(path, target, precision, route)
        return path

    return make


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return packages.encoder()(packages.images()).numpy()


IMAGES = {"images": packages.images().numpy()}


@pytest.mark.parametrize(("route", "target", "precision"), VARIANTS)
def test_encoder(package: Callable[..., Path], reference: np.ndarray, route: str, target: str, precision: str) -> None:
    path = package(route, target, precision)
    compute, required = ("as-typed", AS_TYPED_DB) if precision == "fp16" else ("float32", FLOAT32_DB)
    features = mil.load(path, compute=compute).predict(IMAGES)["image_features"]
    assert features.dtype == np.float32 and features.shape == reference.shape
    assert snr_db(reference, features) >= required


def test_a_perturbed_weight_fails_the_tolerance(package: Callable[..., Path]) -> None:
    """Doubling one element of the first convolution breaks float32's tolerance; the last layer scale, fp16's too."""
    features = mil.load(package(precision="fp32", target="iOS18"), compute="float32").predict(IMAGES)["image_features"]
    model = packages.Encoder().eval().requires_grad_(False)
    model.load_state_dict(packages.encoder().state_dict())
    weight = next(module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    weight.view(-1)[0] *= 2
    assert snr_db(model(packages.images()).numpy(), features) < FLOAT32_DB
    scale = [parameter for name, parameter in model.named_parameters() if "layer_scale" in name][-1]
    scale *= 2
    assert snr_db(model(packages.images()).numpy(), features) < AS_TYPED_DB


@pytest.mark.parametrize("compute", ["float32", *ROUNDING])
def test_watching_changes_no_number(package: Callable[..., Path], compute: str) -> None:
    executor = mil.load(package(), compute=compute)
    seen: list[tuple[Operation, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    watched = executor.run(
        IMAGES, watch=lambda op, outputs: seen.append((op, dict(outputs), {k: v.clone() for k, v in outputs.items()}))
    )
    np.testing.assert_array_equal(watched["image_features"], executor.predict(IMAGES)["image_features"])
    assert [operation for operation, _, _ in seen] == list(executor.operations)
    assert "const" not in {operation.type for operation in executor.operations}
    for operation, kept, copied in seen:
        for output in operation.outputs:
            assert output.type is not None and output.type.shape == tuple(kept[output.name].shape)
            # What a watcher holds on to is never written over.
            assert torch.equal(kept[output.name], copied[output.name]), operation.name
            if compute != "float32" and output.type.dtype == "fp16":
                value = kept[output.name]
                assert torch.equal(value.half().float(), value), f"{operation.name} is not rounded"


def test_the_same_kernels_in_float32(package: Callable[..., Path]) -> None:
    """Beside the rounded run, operation by operation in turns: each is what a run of its own gives."""
    typed = mil.load(package())
    pairs = zip(typed.watched(IMAGES), typed.in_float32().watched(IMAGES), strict=True)
    found = [({n: v.clone() for n, v in a.items()}, {n: v.clone() for n, v in b.items()}) for (_, a), (_, b) in pairs]
    for side, compute in enumerate(("as-typed", "float32")):
        alone: list[dict[str, torch.Tensor]] = []
        mil.load(package(), compute=compute).run(
            IMAGES, watch=lambda _, outputs, alone=alone: alone.append({n: v.clone() for n, v in outputs.items()})
        )
        assert len(alone) == len(found)
        assert all(torch.equal(pair[side][name], each[name]) for pair, each in zip(found, alone) for name in each)
    whole = [
        made.predict(IMAGES)["image_features"] for made in (mil.load(package(), compute="float32"), typed.in_float32())
    ]
    np.testing.assert_array_equal(*whole)
    with pytest.raises(ValueError, match="kernels of its own"):
        mil.load(package(), compute="strict-fp16").in_float32()


def test_policies_that_round_lose_decibels(package: Callable[..., Path], reference: np.ndarray) -> None:
    """An encoder whose values stay small loses them to roundings, not to an overflow; which of two ways of rounding
    loses more is chance here (test_mil_strict.py has what strict rounding alone loses)."""
    features = [mil.load(package(), compute=name).predict(IMAGES)["image_features"] for name in ("float32", *ROUNDING)]
    wide, rounded, strict = (snr_db(reference, one) for one in features)
    assert wide > max(rounded, strict) and min(rounded, strict) > AS_TYPED_DB
    assert all(50 < snr_db(a, b) < 80 for a, b in ((features[0], features[1]), (features[1], features[2])))


def test_repeated_runs_agree_and_leave_the_input_alone(package: Callable[..., Path]) -> None:
    executor = mil.load(package())
    images = IMAGES["images"].copy()
    first = executor.predict({"images": images})["image_features"]
    np.testing.assert_array_equal(images, IMAGES["images"])
    images[:] = 0
    executor.predict({"images": images})
    np.testing.assert_array_equal(executor.predict(IMAGES)["image_features"], first)


def test_the_module_is_not_needed_to_run(package: Callable[..., Path]) -> None:
    """From the bytes alone: a process that imports neither coremltools nor timm gives the same features."""
    script = (
        "import sys, numpy as np; from model_export import mil\n"
        "x = np.load(sys.argv[2]); y = mil.load(sys.argv[1]).predict({'images': x})['image_features']\n"
        "assert 'coremltools' not in sys.modules and 'timm' not in sys.modules; np.save(sys.argv[3], y)"
    )
    folder = package().parent
    np.save(folder / "x.npy", IMAGES["images"])
    command = [sys.executable, "-c", script, str(package()), str(folder / "x.npy"), str(folder / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(mil.__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    np.testing.assert_allclose(
        np.load(folder / "y.npy"), mil.load(package()).predict(IMAGES)["image_features"], rtol=1e-2, atol=1e-2
    )
