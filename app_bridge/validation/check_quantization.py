"""Quantized weights: config.json's `quantization`, and the stored tensors, as the app's loader reads them.

The published app's loader (mlx-swift-examples 2.21.2, `MLXLMCommon/Load.swift` and `LanguageModel.swift`) reads one
group_size and one bits, and quantizes by them the modules that have `.scales`; from 2.25 on a module can have an entry
of its own, or false (`BaseConfiguration.swift`), and any other value in the block ends the decoding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from app_bridge.rules import finding
from app_bridge.validation.check_config import integer
from app_bridge.validation.subject import kind_of, listed
from fastvlm.common.findings import Steps
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
        """Every setting in the block."""
        return {self.base, *(setting for setting in self.modules.values() if setting)}

    def of(self, module: str) -> Setting | None:
        """A module's setting."""
        return self.modules.get(module, self.base)


def parse_block(document: Any) -> tuple[Block | None, list[str]]:
    """Parse a `quantization` block as of config.json or the manifest.

    Returns:
        The block, None where there is none or no valid one; and its faults, a line each.
    """
    if document is None:
        return None, []
    base, faults = _setting(document, "")
    modules: dict[str, Setting | None] = {}
    for key, entry in document.items() if isinstance(document, dict) else ():
        if entry is False:
            modules[key] = None
        elif isinstance(entry, dict):
            modules[key], wrong = _setting(entry, f"{key}.")
            faults += wrong
    return Block(base, modules) if base else None, faults


def read_block(config: dict[str, Any], loader: Loader) -> Steps[tuple[Block | None, bool]]:
    """Return the `quantization` block (None: there is none) and whether the app can decode it."""
    document = config.get("quantization")
    block, faults = parse_block(document)
    if isinstance(document, dict) and loader.mixed:
        faults += [
            f"{key}: {kind_of(entry)}, where this loader expects a module's settings"
            for key, entry in document.items()
            if not isinstance(entry, dict) and entry is not False and not _decoded(key, entry, loader)
        ]
    if faults:
        yield finding("quantization-block", _WHERE, "; ".join(faults[:3]))
        return None, False
    return block, True


def _decoded(key: str, entry: Any, loader: Loader) -> bool:
    """Whether a loader of several settings takes the value for one of its own (another mode is told of elsewhere)."""
    return key in ("group_size", "bits") or (key == "mode" and (len(loader.modes) > 1 or entry != "affine"))


def _setting(entry: Any, at: str) -> tuple[Setting | None, list[str]]:
    if not isinstance(entry, dict):
        return None, [kind_of(entry)]
    mode, bits, group = entry.get("mode", "affine"), integer(entry.get("bits")), integer(entry.get("group_size"))
    numbers = (("group_size", group), ("bits", bits))
    faults = [f"{at}{key}: {kind_of(entry.get(key))}" for key, number in numbers if number is None or number < 1]
    if not isinstance(mode, str):
        faults.append(f"{at}mode: {kind_of(mode)}")
    return (str(mode), bits, group) if bits and group else None, faults


def check_block(block: Block | None, quantized: set[str], loader: Loader) -> Steps[bool]:
    """Check the block against which modules are quantized; return whether the loader reads what it says."""
    if block is None:
        if quantized:
            yield finding("quantization-missing", _WHERE, f"nothing, but {len(quantized)} modules have .scales")
        return False
    if not quantized:
        yield finding("quantization-unused", _WHERE, _words({block.base}))
        return True
    stray = sorted(
        module for module, setting in block.modules.items() if (module not in quantized) == (setting is not None)
    )
    if stray:
        yield finding("quantization-entry", _WHERE, listed(stray))
    settings = {setting for module in quantized if (setting := block.of(module)) is not None}
    if loader.reads(settings) and all(mode != "affine" or group in GROUP_SIZES for mode, _, group in settings):
        return True
    able = [f"{known.name} ({known.source})" for known in LOADERS if known.app and known.reads(settings)]
    readers = f"read by {'; '.join(able)}" if able else "no version of the app that is known here reads it"
    many = "also several" if loader.mixed else "one setting for all"
    reads = f"{', '.join(loader.modes)}; affine with {', '.join(map(str, loader.bits))} bits; {many}"
    yield finding(
        "quantization-unsupported", _WHERE, _words(settings), loader=loader.name, reads=reads, readers=readers
    )
    return False


def _words(settings: set[Setting]) -> str:
    return listed([f"{mode} {bits} bit in groups of {group}" for mode, bits, group in sorted(settings)], 4)


def quantized_parts(shape: Shape, setting: Setting) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """The tensors that MLX stores of a matrix: uint32 words, and a scale (affine: a bias, too) for each group."""
    mode, bits, group = setting
    rows, columns = shape
    affine = mode == "affine"
    each = (rows, None if columns is None else columns // group)
    packed = (rows, None if columns is None else packed_columns(columns, bits))
    parts: dict[str, tuple[Shape, tuple[str, ...]]] = {"weight": (packed, ("U32",))}
    parts["scales"] = (each, FLOATING if affine else ("U8",))
    return parts | ({"biases": (each, FLOATING)} if affine else {})


def triple_fault(wanted: Collection[str], parts: Mapping[str, Stored]) -> str | None:
    """The parts that a quantized weight lacks or has in excess; None for a whole or an unquantized one."""
    if "scales" not in parts and "biases" not in parts and ("weight" not in parts or parts["weight"].dtype != "U32"):
        return None
    missing = [leaf for leaf in ("weight", "scales", "biases") if leaf in {"scales", *wanted} and leaf not in parts]
    if missing:
        return f"no {' and no '.join(missing)}"
    return "biases, which the mode has not" if "biases" in parts and "biases" not in wanted else None


def check_setting(path: str, shape: Shape, parts: Mapping[str, Stored], setting: Setting) -> Steps[bool]:
    """Return whether the parts are a whole matrix of this shape, stored by another setting than config.json says."""
    weight, scales = parts.get("weight"), parts.get("scales")
    if weight is None or scales is None or len(weight.shape) != 2 or len(scales.shape) != 2 or None in shape:
        return False
    rows, columns = int(shape[0] or 0), int(shape[1] or 0)
    if not scales.shape[1] or columns % scales.shape[1] or weight.shape[1] * 32 % columns:
        return False
    bits, group = weight.shape[1] * 32 // columns, columns // scales.shape[1]
    legal = bits in BITS and group in {*GROUP_SIZES, *(form.group_size for form in FORMATS.values())}
    whole = weight.shape[0] == scales.shape[0] == rows and parts.get("biases", scales).shape == scales.shape
    if not legal or not whole or (bits, group) == setting[1:]:
        return False
    where, got = f"{_WHERE}, {weight.file}: {path}", f"stored as {bits} bit in groups of {group}"
    yield finding("quantization-mismatch", where, got, setting=_words({setting}))
    return True
