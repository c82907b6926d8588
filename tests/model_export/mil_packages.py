"""Writes the packages that the executor's tests read: small MIL programs and a reduced FastViTHD."""

import functools
import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

# coremltools collects garbage after each conversion: half a second for the libraries' own objects, unless they are set
# apart.
gc.freeze()

TARGETS = {"iOS15": ct.target.iOS15, "iOS16": ct.target.iOS16, "iOS17": ct.target.iOS17, "iOS18": ct.target.iOS18}
_TYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32, "bool": types.bool}


def save_program(
    path: Path,
    build: Callable[..., Any],
    inputs: Mapping[str, np.ndarray],
    target: str = "iOS17",
) -> list[str]:
    """Save `build(**variables)` as a package whose inputs are like these arrays; the outputs' names."""
    specs = [mb.TensorSpec(array.shape, dtype=_TYPES[array.dtype.name]) for array in inputs.values()]
    order = list(inputs)
    # coremltools reads the input names from the function's signature.
    namespace: dict[str, Any] = {"build": build}
    exec(f"def function({', '.join(order)}): return build({', '.join(f'{n}={n}' for n in order)})", namespace)
    program = mb.program(input_specs=specs, opset_version=TARGETS[target])(namespace["function"])
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=TARGETS[target],
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return [output.name for output in model.get_spec().description.output]


def value_inference(op: str, target: str, **arguments: Any) -> list[np.ndarray]:
    """coremltools' own NumPy evaluation of one operation on constants."""
    found: list[np.ndarray] = []
    # Some evaluations write over their argument.
    arguments = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in arguments.items()}

    @mb.program(input_specs=[], opset_version=TARGETS[target])
    def program() -> Any:
        result = getattr(mb, op)(**arguments)
        for variable in result if isinstance(result, (tuple, list)) else [result]:
            assert variable.val is not None, f"coremltools does not evaluate {op}"
            found.append(np.asarray(variable.val))
        return mb.const(val=np.float32(0))

    return found


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Non-trivial weights: timm's layer scales of 1e-5 and fresh biases hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "layer_scale" in name or "gamma" in name:
            values = 0.2 + 0.05 * values
        elif parameter.ndim == 1:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            values = values * (1.2 / parameter[0].numel()) ** 0.5
        parameter.data.copy_(values)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(0.2 * noise - 0.1 if name.endswith("mean") else 0.5 + noise)


class Encoder(torch.nn.Module):
    """The encoder as it is exported: images (1, 3, S, S) -> image features (1, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model(
            "fastvit_mci3",
            layers=(1, 1, 2, 1, 1),
            embed_dims=(8, 16, 32, 64, 128),
            inference_mode=True,
            num_classes=0,
            global_pool="",
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images).flatten(2).transpose(1, 2)


IMAGE_SIZE = 128


@functools.cache
def encoder() -> Encoder:
    model = Encoder().eval().requires_grad_(False)
    randomize(model)
    return model


def images() -> torch.Tensor:
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@functools.cache
def _captured(route: str) -> Any:
    with torch.no_grad():
        if route == "trace":
            return torch.jit.trace(encoder(), images(), check_trace=False)
        return torch.export.export(encoder(), (images(),)).run_decompositions({})


def save_encoder(path: Path, target: str, precision: str, route: str) -> None:
    """The reduced encoder as a package; precision "fp16" or "fp32", route "export" or "trace"."""
    half = precision == "fp16"
    model = ct.convert(
        _captured(route),
        convert_to="mlprogram",
        minimum_deployment_target=TARGETS[target],
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        inputs=[ct.TensorType("images", shape=images().shape, dtype=np.float32)],
        outputs=[ct.TensorType("image_features", dtype=np.float32)],
        skip_model_load=True,
    )
    model.save(str(path))


class Sum(torch.nn.Module):
    """Adds up what it is given, (3,), in a state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 1
