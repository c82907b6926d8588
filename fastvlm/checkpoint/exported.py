"""The kind of an exported artefact's folder, by the names in it: made here or elsewhere, its loader, its halves.

`model_export` writes artefacts and reads them; this is what a checkpoint's verbs need to know of them. Nothing is
opened but JSON files and the headers of weights.
"""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastvlm.common.documents import object_or_empty

MANIFEST = "export.json"
_PACKAGE = "fastvithd.mlpackage"
_MODEL_TYPE = "llava_qwen2"
_DECODER = "language_model."  # in front of Qwen2's names; LLaVA's own checkpoints have `model.layers.*`
_READERS = {"app": "Apple's demo app", "mlx-vlm": "mlx-vlm"}
BUNDLE, _BUNDLE_KIND = "metadata.json", "vlm"  # of a Core AI bundle
_OF_MLX_VLM = ("vision_tower.", "mm_projector.")  # what mlx-vlm loads and the app refuses


@dataclass(frozen=True)
class Exported:
    """An artefact's folder. `layout`: "app", "mlx-vlm" or "coreai"; `parts`: "vision", "llm"; `ours`: it has an
    export.json."""

    ours: bool
    layout: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The kind of the artefact, in a few words."""
        return "an exported artefact" if self.ours else "an artefact exported elsewhere"

    @property
    def holds(self) -> str:
        """The files and keys that show the kind."""
        if self.ours:
            return MANIFEST
        if self.layout == "coreai":
            return f"a {BUNDLE} of Core AI, and no {MANIFEST}"
        halves = {"vision": "a Core ML encoder", "llm": "an MLX language model"}
        held = " and ".join(halves[part] for part in self.parts)
        return f"{held}, laid out for {_READERS[self.layout]}, and no {MANIFEST}"


def recognise(folder: str | os.PathLike[str]) -> Exported | None:
    """The artefact in `folder`, whole or damaged; None where there is none. Never raises for what is in the folder."""
    path = Path(folder)
    if (path / MANIFEST).is_file():
        return Exported(True, "app", ("vision", "llm"))
    bundle = object_or_empty(path / BUNDLE)
    if bundle.get("kind") == _BUNDLE_KIND and isinstance(bundle.get("assets"), dict):
        return Exported(False, "coreai", ("vision", "llm"))
    known = object_or_empty(path / "config.json").get("model_type") == _MODEL_TYPE
    names = _weight_names(path)
    llm = any(name.startswith(_DECODER) for name in names) and known
    vision = (path / _PACKAGE).is_dir() or (known and any(path.glob("*.mlpackage")))
    # Apple's script puts the package into the checkpoint, which stays one
    if not llm and (names or not vision or any(path.glob("*.bin"))):
        return None
    layout = "mlx-vlm" if any(name.startswith(_OF_MLX_VLM) for name in names) else "app"
    llm |= known and any(path.glob("*.safetensors"))  # damaged, for whoever opens it to say
    return Exported(False, layout, tuple(part for part, held in (("vision", vision), ("llm", llm)) if held))


def _weight_names(folder: Path) -> Set[str]:
    """The names of all tensors, by the index or else by each file's header; what can't be read names none."""
    listed = object_or_empty(folder / "model.safetensors.index.json").get("weight_map")
    if isinstance(listed, dict):
        return listed.keys()
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        if not path.is_file():
            continue
        try:
            with safe_open(path, "np") as file:
                names |= {*file.keys()}
        except (SafetensorError, OSError):
            continue
    return names
