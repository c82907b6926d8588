"""Quantized weights: config.json's `quantization`, what the app's loader makes of it, and what is stored.

The published app's loader (mlx-swift-examples 2.21.2, `MLXLMCommon/Load.swift` and `LanguageModel.swift`) reads one
group_size and one bits, and quantizes by them the modules that have `.scales`; from 2.25 on a module can have an entry
of its own, or false (`BaseConfiguration.swift`), and any other value in the block ends the decoding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from app_bridge.subject import AGAIN, Subject, kind_of, listed
from app_bridge.validation.check_config import integer
from model_export import contract
from quantization.catalogue import LOADERS, Loader
from quantization.mlx.affine import BITS, GROUP_SIZES, packed_columns
from quantization.mlx.floating import FORMATS

FLOATING = ("F16", "BF16", "F32")  # what MLX computes with
_WHERE = f"{contract.CONFIG}: quantization"
Setting = tuple[str, int, int]  # mode, bits, group size
Shape = tuple[int | None, ...]  # None: config.json doesn't say


@dataclass(frozen=True)
class Stored:
    """A tensor's file (relative to the artefact), type (safetensors' name) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """config.json's `quantization`: the setting for all, and those of single modules (None: not quantized)."""

    base: Setting
    modules: Mapping[str, Setting | None]

    def settings(self) -> set[Setting]:
        """All that it says, of modules or of all."""
        return {self.base, *(setting for setting in self.modules.values() if setting)}

    def of(self, module: str) -> Setting | None:
        """A module's setting."""
        return self.modules.get(module, self.base)


class Groups:
    """Faults of one rule in many tensors are one finding."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[str, str, str]]] = {}

    def add(self, rule: str, where: str, got: str, expected: str) -> None:
        self.found.setdefault(rule, []).append((where, got, expected))

    def tell(self, subject: Subject, remedies: Mapping[str, str]) -> None:
        for rule, entries in self.found.items():
            where, got, expected = entries[0]
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            subject.error(rule, where + more, got, expected, remedies.get(rule, AGAIN))


def parse_block(document: Any, faults: list[str]) -> Block | None:
    """A `quantization` block as of config.json or the manifest; None for none and, with `faults`, for what is none."""
    if document is None:
        return None
    base = _setting(document, faults, "")
    entries = document.items() if isinstance(document, dict) else ()
    modules = {
        key: None if entry is False else _setting(entry, faults, f"{key}.")
        for key, entry in entries
        if isinstance(entry, dict) or entry is False
    }
    return Block(base, modules) if base else None


def read_block(subject: Subject, config: dict[str, Any], loader: Loader) -> tuple[Block | None, bool]:
    """The `quantization` block (None: there is none) and whether the app can decode it."""
    document = config.get("quantization")
    faults: list[str] = []
    block = parse_block(document, faults)
    if isinstance(document, dict) and loader.mixed:
        faults += [
            f"{key}: {kind_of(entry)}, where this loader expects a module's settings"
            for key, entry in document.items()
            if not isinstance(entry, dict) and entry is not False and not _decoded(key, entry, loader)
        ]
    if faults:
        subject.error("quantization-block", _WHERE, "; ".join(faults[:3]), "group_size and bits, both integers")
        return None, False
    return block, True


def _decoded(key: str, entry: Any, loader: Loader) -> bool:
    """Whether a loader of several settings takes the value for one of its own (another mode is told of elsewhere)."""
    return key in ("group_size", "bits") or (key == "mode" and (len(loader.modes) > 1 or entry != "affine"))


def _setting(entry: Any, faults: list[str], at: str) -> Setting | None:
    if not isinstance(entry, dict):
        faults.append(kind_of(entry))
        return None
    numbers = {key: integer(entry.get(key)) for key in ("group_size", "bits")}
    faults += [
        f"{at}{key}: {kind_of(entry.get(key))}" for key, number in numbers.items() if number is None or number < 1
    ]
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str):
        faults.append(f"{at}mode: {kind_of(mode)}")
    bits, group_size = numbers["bits"], numbers["group_size"]
    return (str(mode), bits, group_size) if bits and group_size else None


def check_block(subject: Subject, block: Block | None, quantized: set[str], loader: Loader) -> bool:
    """The block as a whole, against which modules are quantized and what the loader reads; whether it reads them."""
    if block is None:
        if quantized:
            subject.error(
                "quantization-missing",
                _WHERE,
                f"nothing, but {len(quantized)} modules have .scales",
                "the setting that they are stored by",
            )
        return False
    if not quantized:
        subject.warning(
            "quantization-unused",
            _WHERE,
            _said({block.base}),
            "nothing: no module has .scales",
            "export again, or remove the block",
        )
        return True
    stray = sorted(
        module for module, setting in block.modules.items() if (module not in quantized) == (setting is not None)
    )
    if stray:
        subject.error(
            "quantization-entry",
            _WHERE,
            listed(stray),
            "entries for quantized modules only, false for the others",
        )
    settings = {setting for module in quantized if (setting := block.of(module)) is not None}
    if loader.reads(settings) and all(mode != "affine" or group in GROUP_SIZES for mode, _, group in settings):
        return True
    able = [f"{one.name} ({one.source})" for one in LOADERS if one.app and one.reads(settings)]
    remedy = f"read by {'; '.join(able)}" if able else "no version of the app that is known here reads it"
    subject.error(
        "quantization-unsupported",
        _WHERE,
        _said(settings),
        f"what {loader.name} reads ({_reads(loader)})",
        f"{remedy}; or export with another recipe (`python -m quantization recipes`)",
    )
    return False


def _said(settings: set[Setting]) -> str:
    words = [f"{mode} {bits} bit in groups of {group}" for mode, bits, group in sorted(settings)]
    return listed(words, 4)


def _reads(loader: Loader) -> str:
    many = "also several" if loader.mixed else "one setting for all"
    return f"{', '.join(loader.modes)}; affine with {', '.join(map(str, loader.bits))} bits; {many}"


def quantized_parts(shape: Shape, setting: Setting) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """What MLX keeps of a matrix (`quantization.schemes`): uint32 words, and a scale (affine: a bias, too) a group."""
    mode, bits, group = setting
    rows, columns = shape
    affine = mode == "affine"
    each = (rows, None if columns is None else columns // group)
    packed = (rows, None if columns is None else packed_columns(columns, bits))
    parts: dict[str, tuple[Shape, tuple[str, ...]]] = {"weight": (packed, ("U32",))}
    parts["scales"] = (each, FLOATING if affine else ("U8",))
    return parts | ({"biases": (each, FLOATING)} if affine else {})


def triple_fault(wanted: Collection[str], parts: Mapping[str, Stored]) -> str | None:
    """What is missing, or too much, of a quantized weight; None for a whole one, and for one that isn't quantized."""
    if "scales" not in parts and "biases" not in parts and ("weight" not in parts or parts["weight"].dtype != "U32"):
        return None
    missing = [leaf for leaf in ("weight", "scales", "biases") if leaf in {"scales", *wanted} and leaf not in parts]
    if missing:
        return f"no {' and no '.join(missing)}"
    return "biases, which the mode has not" if "biases" in parts and "biases" not in wanted else None


def stored_otherwise(path: str, shape: Shape, parts: Mapping[str, Stored], setting: Setting, groups: Groups) -> bool:
    """Whether the parts are a whole matrix of this shape, but stored by another setting than config.json says."""
    weight, scales = parts.get("weight"), parts.get("scales")
    if weight is None or scales is None or len(weight.shape) != 2 or len(scales.shape) != 2 or None in shape:
        return False
    rows, columns = int(shape[0] or 0), int(shape[1] or 0)
    if not scales.shape[1] or columns % scales.shape[1] or weight.shape[1] * 32 % columns:
        return False
    bits, group = weight.shape[1] * 32 // columns, columns // scales.shape[1]
    legal = bits in BITS and group in {*GROUP_SIZES, *(form.group_size for form in FORMATS.values())}
    whole = weight.shape[0] == scales.shape[0] == rows and (
        "biases" not in parts or parts["biases"].shape == scales.shape
    )
    if not legal or not whole or (bits, group) == setting[1:]:
        return False
    groups.add(
        "quantization-mismatch",
        f"{_WHERE}, {weight.file}: {path}",
        f"stored as {bits} bit in groups of {group}",
        f"{_said({setting})}, as the block says",
    )
    return True
