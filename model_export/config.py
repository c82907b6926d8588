"""The settings of an export, checked all at once."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm.common.arguments import whole_number
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, output_faults
from fastvlm.data.preprocessing import MAX_IMAGE_SIZE
from model_export import encoder_forms
from model_export.contract import LAYOUTS, PATCH_SIZE

PRECISIONS = ("float16", "float32")
# The interpreter of coreai-core, which runs anywhere, and the units that macOS 27's own runtime may use or prefer.
INTERPRETER = "INTERPRETER"
COREAI_UNITS = (INTERPRETER, "CPU", "GPU", "NE", "ALL")
COMPUTE_UNITS = ("CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY", "ALL")
DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
DEFAULT_TARGET = "iOS17"
# What an export makes: the encoder for Core ML beside an MLX folder, or a Core AI bundle.
FORMATS = ("coreml", "coreai")
CACHES = ("fixed", "growing")
# What can run an artefact's halves; "auto" is Core ML and MLX on a Mac, the executor and PyTorch elsewhere. "coreai",
# Apple's runtime, runs both halves of a Core AI bundle and nothing else.
VISION_RUNNERS = ("auto", "coreml", "executor", "coreai")
LLM_RUNNERS = ("auto", "mlx", "torch", "coreai")
# How the executor and PyTorch compute: the proofs' policies, those for speed, the faster of float32 and bfloat16 here.
COMPUTES = ("as-typed", "float32", "strict-fp16", "bfloat16", "int8", "auto")

_OF_COREAI = ("max_context_length", "cache")
_OF_COREML = (
    "compute_precision",
    "compute_units",
    "minimum_deployment_target",
    "resolutions",
    "vision_quant",
    "min_snr",
    "layout",
)

image_size = whole_number(PATCH_SIZE, PATCH_SIZE, MAX_IMAGE_SIZE)  # the argparse type of a picture's pixels per side


@dataclass(frozen=True)
class ExportConfig:
    """One export, of a checkpoint with the `adapter` of a folder merged into it, or without one (None).

    `image_size` (pixels per side) None is the checkpoint's own; `quant` is a recipe's name or file; `layout` is whose
    language-model folder it is: the demo app's (and mlx-lm's), or mlx-vlm's.

    `resolutions` are further sizes, each a function of the package. `minimum_deployment_target` None is
    DEFAULT_TARGET, or whatever newer one the rest needs. `calibration_data` is what `conversations.load` reads: its
    pictures choose float16's powers of two, its questions calibrate the language model; None are those that a fine-tune
    left in its folder, else drawn ones.
    `vision_quant` compresses the encoder (see `encoder_forms.load`) unless `quant` does; `min_snr` (dB) looks for the
    smallest one that keeps it.

    `format` "coreai" makes a bundle, whose KV cache has `max_context_length` positions (None: 4096, or all that the
    model has) and is `cache`: "fixed", or "growing" as it fills up.

    `compute_units` is a load-time choice in Core ML: the package cannot hold it, so the manifest and the package's
    user-defined metadata record it, and `model_export.runtime` loads with it.

    Raises UserError naming every invalid value and combination.
    """

    checkpoint: Path
    output_dir: Path
    quant: str = "fp16"
    compute_precision: str = "float16"
    compute_units: str = "CPU_AND_NE"
    minimum_deployment_target: str | None = None
    image_size: int | None = None
    resolutions: tuple[int, ...] = ()
    calibration_data: Path | None = None
    vision_quant: str = encoder_forms.NONE
    min_snr: float | None = None
    layout: str = "app"
    format: str = "coreml"
    max_context_length: int | None = None
    cache: str = "fixed"
    overwrite: bool = False
    adapter: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        object.__setattr__(self, "resolutions", tuple(self.resolutions or ()))
        faults = [*self._faults()] or [*self._target_faults()]
        if faults:
            raise UserError("; ".join(faults))

    @property
    def newer_target(self) -> dict[str, str]:
        """Reasons for a newer deployment target than DEFAULT_TARGET: reason -> target."""
        needs = {f"--vision-quant {form}": target for form, target in self.compression.targets.items()}
        if self.min_snr is not None and self.minimum_deployment_target is None:
            needs["the forms that --min-snr chooses among"] = "iOS18"
        if self.resolutions:
            needs["several functions in one package"] = "iOS18"
        return {why: target for why, target in needs.items() if target > DEFAULT_TARGET or self._stated_before(target)}

    def _stated_before(self, target: str) -> bool:
        stated = self.minimum_deployment_target
        return stated in DEPLOYMENT_TARGETS and DEPLOYMENT_TARGETS.index(stated) < DEPLOYMENT_TARGETS.index(target)

    @property
    def compression(self) -> encoder_forms.VisionQuant:
        """The encoder's forms: by `vision_quant`, or else by the recipe."""
        if self.vision_quant != encoder_forms.NONE:
            return encoder_forms.load(self.vision_quant)
        return encoder_forms.of_recipe(self.quant)

    @property
    def deployment_target(self) -> str:
        """The target that is written: the requested one, or the oldest from DEFAULT_TARGET on that can hold it all."""
        return self.minimum_deployment_target or max([DEFAULT_TARGET, *self.newer_target.values()])

    def document(self) -> dict[str, Any]:
        """The settings that decide the artefact's bytes, for its manifest: no paths, nothing of the machine."""
        document = asdict(self)
        for key in ("checkpoint", "adapter", "output_dir", "overwrite", "calibration_data"):
            del document[key]
        document["quant"] = Path(self.quant).name  # a recipe of the user's may be a file anywhere
        if self.format == "coreai":
            return {key: document[key] for key in ("format", "quant", "max_context_length", "cache", "image_size")}
        for key in ("max_context_length", "cache"):
            del document[key]
        if self.vision_quant not in encoder_forms.FORMS or (
            self.vision_quant == encoder_forms.NONE and self.compression.rules
        ):
            document["vision_quant"] = self.compression.to_json()
        document |= {"minimum_deployment_target": self.deployment_target, "resolutions": list(self.resolutions)}
        return document | ({"newer_target": self.newer_target} if self.newer_target else {})

    def _faults(self) -> Iterator[str]:
        for name, legal in (
            ("compute_precision", PRECISIONS),
            ("compute_units", COMPUTE_UNITS),
            ("minimum_deployment_target", (*DEPLOYMENT_TARGETS, None)),
            ("layout", LAYOUTS),
            ("format", FORMATS),
            ("cache", CACHES),
        ):
            if getattr(self, name) not in legal:
                known = ", ".join(filter(None, legal))
                yield f"--{name.replace('_', '-')}: got {getattr(self, name)!r}, expected one of {known}"
        if self.image_size is not None:
            yield from size_faults("--image-size", self.image_size)
        for size in self.resolutions:
            yield from size_faults("--resolutions", size)
        if self.compute_precision == "float32" and self.compute_units == "CPU_AND_NE":
            yield (
                "--compute-precision float32 with --compute-units CPU_AND_NE: the Neural Engine has no float32, so"
                " nothing would run on it; use float16, or --compute-units CPU_AND_GPU, CPU_ONLY or ALL"
            )
        yield from self._format_faults()
        yield from self._compression_faults()
        read = {
            "--checkpoint": self.checkpoint,
            "--adapter": self.adapter,
            "--calibration-data": self.calibration_data,
        }
        given = [(flag, path) for flag, path in read.items() if path is not None]
        yield from output_faults({"--output-dir": (self.output_dir, Output(whole=True))}, given)

    def _format_faults(self) -> Iterator[str]:
        """Flags of the other format."""
        for field in _OF_COREAI if self.format != "coreai" else _OF_COREML:
            if getattr(self, field) != type(self).__dataclass_fields__[field].default:
                other = "without" if self.format == "coreai" else "with"
                yield f"--{field.replace('_', '-')} is for exports {other} --format coreai: leave it out"

    def _compression_faults(self) -> Iterator[str]:
        flags = {"--vision-quant": self.vision_quant != encoder_forms.NONE, "--min-snr": self.min_snr is not None}
        given = [flag for flag, present in flags.items() if present]
        if len(given) > 1:
            yield "--vision-quant and --min-snr: one says the form of each layer, the other looks for it"
        if self.compute_precision == "float32" and given:
            yield f"{given[0]} with --compute-precision float32: compressed weights are float16; use float16"
        if self.min_snr is not None and self.minimum_deployment_target == "iOS15":
            yield "--min-snr with --minimum-deployment-target iOS15, which has no compressed weights: ask for iOS16"
        if self.min_snr is not None and not 0 < self.min_snr < 100:
            yield f"--min-snr: got {self.min_snr:g}, expected decibels between 0 and 100"
        try:
            encoder_forms.load(self.vision_quant)
        except UserError as error:
            yield f"--vision-quant: {error}"
        try:
            if encoder_forms.of_recipe(self.quant).rules and given:
                yield f"{given[0]} and --quant {self.quant}: the recipe has rules for the encoder: leave one out"
        except UserError as error:
            yield f"--quant: {error}"

    def _target_faults(self) -> Iterator[str]:
        stated = self.minimum_deployment_target
        for why, needed in self.newer_target.items():
            if self._stated_before(needed):
                yield (
                    f"--minimum-deployment-target {stated}: too old for {why}, new in {needed}:"
                    f" ask for {needed}, or leave the flag out"
                )


def size_faults(flag: str, size: Any) -> list[str]:
    """The fault of a flag's picture size in pixels per side, [] if it is legal."""
    whole = isinstance(size, int) and not isinstance(size, bool)
    if whole and PATCH_SIZE <= size <= MAX_IMAGE_SIZE and size % PATCH_SIZE == 0:
        return []
    return [f"{flag}: got {size!r}, expected a multiple of {PATCH_SIZE} from {PATCH_SIZE} to {MAX_IMAGE_SIZE}"]
