"""Run an artefact from its own bytes: Core ML and MLX on a Mac; elsewhere the MIL executor and PyTorch."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm.checkpoint import layouts
from fastvlm.common.errors import UserError
from fastvlm.data.preprocessing import read_preprocessor
from fastvlm.data.prompt import eos_ids
from fastvlm.model.surface import FastVLM, Vision
from model_export import artefact as manifest
from model_export import contract, mil, stored
from model_export.config import COMPUTE_UNITS, COMPUTES, COREAI_UNITS, LLM_RUNNERS, VISION_RUNNERS
from model_export.encoder.coreml import coremltools
from model_export.mil import int8, onednn
from model_export.runtime import language, mlx_language


def load(
    artefact: str | Path,
    vision: str = "auto",
    llm: str = "auto",
    compute: str = "as-typed",
    resolution: int | None = None,
    units: str | None = None,
) -> FastVLM:
    """Load an artefact to be run from its own bytes.

    Args:
        artefact: the folder that an export wrote.
        vision: the encoder's runner: "coreml" (macOS only), "executor" (the saved program in PyTorch), or "auto": Core
            ML on a Mac, else the executor.
        llm: the language model's runner: "mlx", "torch", or "auto": MLX on a Mac, else PyTorch.
        compute: the executor's and PyTorch's arithmetic. "as-typed" rounds to the program's float16 after every
            operation, "strict-fp16" inside composite operations as well, "float32" never; the language model is in
            float32 beside all three. For speed: "bfloat16" in both parts; "auto", the faster of float32 and bfloat16
            by the processor's instructions, for the encoder, for prompts and for single tokens each; "int8", the same
            with 8-bit operands in most of the encoder and for the logits.
        resolution: the side of the pictures in pixels, one that the encoder was exported for; None: its native one.
        units: Core ML's compute units: "ALL", "CPU_AND_NE", "CPU_AND_GPU" or "CPU_ONLY"; None: as exported.

    Returns:
        The model, with the methods, shapes and units of a checkpoint's (`fastvlm.load`); `runners` names what runs
        each part.

    Raises:
        UserError (`fastvlm.common.errors`): the artefact is not whole, a runner doesn't exist on this machine, or the
            resolution was not exported.
    """
    folder = Path(artefact).expanduser()
    for flag, value, known in (
        ("--vision", vision, VISION_RUNNERS),
        ("--llm", llm, LLM_RUNNERS),
        ("--compute", compute, COMPUTES),
        ("--compute-units", units, (None, *COMPUTE_UNITS, *COREAI_UNITS)),
    ):
        if value not in known:
            raise UserError(f"{flag} {value}: expected one of {', '.join(filter(None, known))}")
    if compute == "int8" and not int8.AVAILABLE:
        raise UserError("--compute int8: this processor or PyTorch has no 8-bit products (VNNI): use auto")
    document = manifest.read_whole(folder)
    if manifest.is_bundle(document):
        return _load_bundle(folder, document, {"--vision": vision, "--llm": llm}, compute, resolution, units)
    if "coreai" in (vision, llm):
        raise UserError(f"{folder}: is no Core AI bundle, which --vision and --llm coreai run: leave them out")
    on_mac = sys.platform == "darwin"
    if vision == "coreml" and not on_mac:
        raise UserError("--vision coreml: Core ML runs on macOS only: use --vision executor here")
    manifest.check_for_app(folder, document)
    use_coreml = vision == "coreml" or (vision == "auto" and on_mac)
    use_mlx = llm == "mlx" or (llm == "auto" and on_mac)
    if units and not use_coreml:
        raise UserError(f"--compute-units {units}: the executor runs the encoder, not Core ML: leave it out")
    if compute not in ("auto", "as-typed") and use_coreml and use_mlx:
        raise UserError(f"--compute {compute}: Core ML and MLX run this model: use --vision executor or --llm torch")
    config = stored.read_config(folder)
    function = function_for(document, folder, resolution)
    stages = None
    if compute == "bfloat16":
        stages = ("bfloat16", "bfloat16", "bfloat16")
    elif compute in ("auto", "int8") and not (use_coreml and use_mlx):
        stages = fastest_here()
    encoder: Vision
    if use_coreml:
        encoder = CoreMLVision(folder, units or document["config"].get("compute_units", "ALL"), function)
    else:
        encoder = ExecutorVision(folder, _policy(compute, stages), function)
    how: tuple[Any, ...] = ("float32" if compute == "float32" else "as-stored",)
    if stages:
        how = (*stages[1:], compute == "int8")
    speaker, projector = mlx_language.mlx_language(folder) if use_mlx else language.torch_language(folder, *how)
    image_token, preprocessor = config["image_token_index"], read_preprocessor(folder)
    tokenizer = layouts.load_tokenizer(folder, image_token)
    speaker.eos_ids = frozenset(eos_ids(tokenizer, [*speaker.eos_ids]))
    return FastVLM(
        preprocessor=preprocessor if resolution is None else replace(preprocessor, image_size=resolution),
        tokenizer=tokenizer,
        image_token_id=image_token,
        vision=encoder,
        projector=projector,
        language=speaker,
    )


def _load_bundle(
    folder: Path,
    document: dict[str, Any],
    runners: dict[str, str],
    compute: str,
    resolution: int | None,
    units: str | None,
) -> FastVLM:
    """A Core AI bundle, which Apple's runtime alone runs. UserError for what it does not have."""
    from model_export.coreai.runtime import load_bundle

    native = document["image"]["image_size"]
    faults = [f"{flag} {name}" for flag, name in runners.items() if name not in ("auto", "coreai")]
    faults += [f"--compute {compute}"] if compute not in ("auto", "as-typed") else []
    faults += [f"--resolution {resolution}"] if resolution not in (None, native) else []
    faults += [f"--compute-units {units}"] if units not in (None, *COREAI_UNITS) else []
    if faults:
        raise UserError(
            f"{folder}: Apple's runtime runs a Core AI bundle, as it was exported: leave out {', '.join(faults)}"
        )
    return load_bundle(folder, units)


def fastest_here() -> tuple[str, str, str]:
    """The faster of float32 and bfloat16 for the encoder, for prompts and for single tokens.

    Without bfloat16 instructions oneDNN emulates them, two to three times slower than float32; single tokens, whose
    time is that of reading the matrices, are faster in it all the same.
    """
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bfloat16", "bfloat16", "bfloat16"
    return "float32", "float32", "bfloat16" if onednn.packs(torch.bfloat16) else "float32"


def _policy(compute: str, stages: tuple[str, ...] | None) -> str:
    """The executor's policy for a `compute`, where `stages` is what is fastest here."""
    if stages is None:
        return compute
    if compute == "int8":
        return "int8" if stages[0] == "bfloat16" else "int8-float32"
    return stages[0]


def function_for(document: dict[str, Any], folder: Path, resolution: int | None) -> str | None:
    """Choose the package's function for a resolution.

    Args:
        document: the artefact's manifest (`model_export.artefact.read_whole`).
        folder: the artefact, which the error names.
        resolution: the side of the pictures in pixels; None: the native one.

    Returns:
        The function's name; None: the package's default function.

    Raises:
        UserError: the encoder was not exported for the resolution.
    """
    held = document["vision"]["resolutions"]
    if resolution is not None and resolution not in held:
        raise UserError(
            f"--resolution {resolution}: {folder} was exported for {', '.join(map(str, held))}:"
            " choose one of them, or export with --resolutions"
        )
    return None if resolution is None or len(held) == 1 else contract.function_name(resolution)


# What to do when an artefact's encoder computes NaN or infinity.
_REMEDY = (
    "the program leaves its range: export the checkpoint with this version of the tool, which keeps float16 in range;"
    " if it was, with --compute-precision float32 --compute-units CPU_AND_GPU"
)


class ExecutorVision:
    """The saved Core ML program, computed by the MIL executor.

    Args:
        folder: the artefact.
        compute: a policy of `model_export.mil.dtypes.POLICIES`.
        function: one of the package's functions; None: its default.

    Raises:
        UserError: the package is missing, damaged, or no program that the executor runs.
    """

    def __init__(self, folder: Path, compute: str = "as-typed", function: str | None = None) -> None:
        try:
            self.executor = mil.load(folder / contract.PACKAGE, compute=compute, function_name=function)
        except mil.MILError as error:
            raise UserError(f"{folder / contract.PACKAGE}: {error}") from error
        self.compute, self.name, self.remedy = compute, f"MIL executor ({compute})", _REMEDY

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Pixel values (1, 3, S, S) float32 -> encoder features (1, N, C) float32. UserError where the run fails."""
        try:
            return self.executor.predict({contract.INPUT: pixel_values})[contract.OUTPUT]
        except mil.MILError as error:
            raise UserError(f"{contract.PACKAGE}: {error}") from error


class CoreMLVision:
    """The saved Core ML program, run by Core ML (macOS only).

    coremltools compiles the package at every load, which an app does once, when it is built.

    Args:
        folder: the artefact.
        units: the name of one of coremltools' `ComputeUnit`s.
        function: one of the package's functions; None: its default.

    Raises:
        UserError: Core ML refuses the package.
    """

    def __init__(self, folder: Path, units: str, function: str | None = None) -> None:
        ct, self.package = coremltools(), folder / contract.PACKAGE
        chosen = {} if function is None else {"function_name": function}
        try:
            self.model = ct.models.MLModel(str(self.package), compute_units=getattr(ct.ComputeUnit, units), **chosen)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.package}: Core ML refuses it ({error})") from error
        if getattr(self.model, "__proxy__", None) is None:  # a refusal by the framework is only warned of, and kept
            reason = getattr(self.model, "_framework_error", None)
            raise UserError(f"{self.package}: Core ML refuses it ({' '.join(str(reason).split())})")
        self.name, self.remedy = f"Core ML ({units})", _REMEDY

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Pixel values (1, 3, S, S) float32 -> encoder features (1, N, C) float32. UserError where the run fails."""
        pixels = np.require(pixel_values, np.float32, ["C", "W"])  # the binding refuses read-only arrays
        try:
            features = self.model.predict({contract.INPUT: pixels})[contract.OUTPUT]
        except Exception as error:  # coremltools raises plain ones
            raise UserError(f"{self.package}: Core ML: {' '.join(str(error).split())}") from error
        return np.asarray(features, dtype=np.float32)
