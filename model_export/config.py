"""What an export is asked to do; refused at once, with every fault, when it cannot be done."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastvlm.errors import UserError
from model_export.contract import LAYOUTS, PATCH_SIZE

PRECISIONS = ("float16", "float32")
COMPUTE_UNITS = ("CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY", "ALL")
DEPLOYMENT_TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18")
# What can run an artefact's halves; "auto" is Core ML and MLX on a Mac, the executor and PyTorch elsewhere.
VISION_RUNNERS = ("auto", "coreml", "executor")
LLM_RUNNERS = ("auto", "mlx", "torch")
# The fourth stage attends over (S / 32)^2 positions, so its memory grows with S^4: 2048 needs 16 times that of 1024.
MAX_IMAGE_SIZE = 2048


@dataclass(frozen=True)
class ExportConfig:
    """One export. `image_size` (pixels per side) None is the checkpoint's own; `quant` is a recipe's name or file;
    `layout` is whose language-model folder it is: the demo app's (and mlx-lm's), or mlx-vlm's.

    `compute_units` is a load-time choice in Core ML: the package cannot hold it, so the manifest and the package's
    user-defined metadata record it, and `model_export.runtime` loads with it.

    Raises UserError naming every invalid value and combination.
    """

    checkpoint: Path
    output_dir: Path
    quant: str = "fp16"
    compute_precision: str = "float16"
    compute_units: str = "CPU_AND_NE"
    minimum_deployment_target: str = "iOS17"
    image_size: int | None = None
    layout: str = "app"
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        faults = [*self._unknown_values(), *self._contradictions(), *self._paths()]
        if faults:
            raise UserError("; ".join(faults))

    def document(self) -> dict[str, Any]:
        """What decides the artefact's bytes, for its manifest: no paths, nothing of the machine."""
        kept = asdict(self)
        for key in ("checkpoint", "output_dir", "overwrite"):
            del kept[key]
        return kept

    def _unknown_values(self) -> list[str]:
        legal = {
            "compute_precision": PRECISIONS,
            "compute_units": COMPUTE_UNITS,
            "minimum_deployment_target": DEPLOYMENT_TARGETS,
            "layout": LAYOUTS,
        }
        faults = [
            f"{_flag(name)}: got {getattr(self, name)!r}, expected one of {', '.join(values)}"
            for name, values in legal.items()
            if getattr(self, name) not in values
        ]
        size = self.image_size
        whole = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (whole and PATCH_SIZE <= size <= MAX_IMAGE_SIZE and size % PATCH_SIZE == 0):
            faults.append(
                f"--image-size: got {size!r}, expected a multiple of {PATCH_SIZE} from {PATCH_SIZE} to {MAX_IMAGE_SIZE}"
            )
        return faults

    def _contradictions(self) -> list[str]:
        if self.compute_precision == "float32" and self.compute_units == "CPU_AND_NE":
            return [
                "--compute-precision float32 with --compute-units CPU_AND_NE: the Neural Engine has no float32, so"
                " nothing would run on it; use float16, or --compute-units CPU_AND_GPU, CPU_ONLY or ALL"
            ]
        return []

    def _paths(self) -> list[str]:
        source, target = self.checkpoint.expanduser().resolve(), self.output_dir.expanduser().resolve()
        if source == target or source in target.parents:
            return [f"--output-dir {self.output_dir}: is inside the checkpoint, which is read-only; choose another"]
        if target in source.parents:
            return [f"--output-dir {self.output_dir}: holds the checkpoint; choose another"]
        return []


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
