"""Checkpoint to MLX folder: the language model and the projector, streamed from the input files to the output files.

Memory does not depend on the model's size: every output file gets its header first, and then the rows of one weight
after the other, some megabytes at a time.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common import threads
from fastvlm.common.dtypes import LARGEST, Array, bits_of, kind_of
from fastvlm.common.errors import UserError
from model_export import contract
from model_export.language.config import language_config
from model_export.language.tensor_file import RowReader, TensorFile
from quantization.calibration import budget
from quantization.recipe import ELSEWHERE, Recipe
from quantization.schemes import Scheme, Spec, spec_bytes

SHARD_BYTES = 1 << 30  # peers write 5 GiB, and loaders take any number
# What a recipe may have rules for although the layout does not store it.
ELSEWHERE_OF = {"app": ELSEWHERE, "mlx-vlm": ELSEWHERE[:1], "mlx-lm": (*ELSEWHERE, contract.PROJECTOR_PREFIX)}
_CHUNK = 1 << 20  # values that a worker converts at once: 4 MiB in float32
# The weights whose scheme is a decision worth naming: what they are for, and one name of each.
_DECISIONS = {
    "layers": "language_model.model.layers.0.mlp.down_proj.weight",
    "embeddings": "language_model.model.embed_tokens.weight",
    "lm_head": "language_model.lm_head.weight",
    "projector": "multi_modal_projector.linear_0.weight",
}


@dataclass(frozen=True)
class Weight:
    """One weight on its way: from `rows(start, stop)` (in `source`'s dtype) to `name` in `file`, stored by `scheme`."""

    rule_name: str  # the name that recipes speak of
    name: str
    file: str
    shape: tuple[int, ...]
    scheme: Scheme
    source: str
    rows: RowReader
    ready: Mapping[str, Array] | None = None  # its parts, where they are not to be made from the rows

    def parts(self) -> dict[str, Spec]:
        """Stored tensor name -> dtype, shape: `x.weight` and, where quantized, `x.scales` and `x.biases`."""
        stem, _, leaf = self.name.rpartition(".")
        return {
            f"{stem}.{leaf if part == 'weight' else part}": spec for part, spec in self.scheme.parts(self.shape).items()
        }

    def source_bytes(self, rows: int | None = None) -> int:
        """Bytes in the checkpoint of so many rows (None: all)."""
        return spec_bytes((self.source, (self.shape[0] if rows is None else rows, *self.shape[1:])))

    def convert(self, start: int, stop: int) -> tuple[dict[str, Array], float]:
        """Rows `start` to `stop` as they are stored, by stored name, and their largest magnitude."""
        if self.ready is None:
            rows = self.rows(start, stop)
            encoded, largest = self.scheme.encode(rows)
            if not largest < LARGEST[self.scheme.dtype]:  # rounding may have made it so
                largest = _magnitude(rows)
        else:
            encoded = {part: array[start:stop] for part, array in self.ready.items()}
            largest = float(np.max([_magnitude(array) for array in encoded.values() if kind_of(array)]))
        return dict(zip(self.parts(), encoded.values(), strict=True)), largest


def _magnitude(values: Array) -> float:
    """The largest magnitude of floats, NaN above all."""
    bits = bits_of(np.ascontiguousarray(values))
    top = bits & (np.iinfo(bits.dtype).max >> 1)
    if kind_of(values) == "bfloat16":
        top = top.astype(np.uint32) << 16
    return float(top.max(initial=0).view(np.float16 if top.itemsize == 2 else np.float32))


def bytes_to_read(checkpoint: Checkpoint, recipe: Recipe, layout: str = "app") -> int:
    """The total of what `export_llm` reports through `advance`."""
    return sum(weight.source_bytes() for weight in _weights(checkpoint, recipe, layout))


def planned_bytes(checkpoint: Checkpoint, recipe: Recipe, layout: str = "app") -> int:
    """The size in bytes of what `export_llm` will write. UserError for all that would stop it, but for values."""
    language_config(checkpoint, layout)
    if recipe.budget is not None:
        shapes = weight_shapes(checkpoint, layout)
        budget.within_reach(recipe, shapes, ELSEWHERE_OF[layout])
        return recipe.budget.limit(sum(map(math.prod, shapes.values())))
    weights = _weights(checkpoint, recipe, layout)
    return sum(spec_bytes(spec) for weight in weights for spec in weight.parts().values())


def export_llm(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    advance: Callable[[int], None] | None = None,
    layout: str = "app",
    ready: Mapping[str, Mapping[str, Array]] | None = None,
) -> dict[str, Any]:
    """Write the decoder, the projector and config.json into `folder`, which exists and has no such files.

    layout "app" is what the demo app and mlx-lm load; "mlx-vlm" adds the vision tower and uses that loader's names;
    "mlx-lm" is the decoder alone as a plain Qwen2 (see contract.py). `advance(n)` is called after every n of the
    `bytes_to_read`. The same input gives the same bytes. `ready` has the parts of weights that were calibrated (by the
    names that recipes speak of): they are stored as they are. Returns facts for the manifest: files, parameters, bytes,
    bits per weight, recipe and its decisions. Raises UserError, with every fault, when the recipe or the loaders cannot
    take the model (before any work), or when values are not finite or too large for the dtype that the recipe names.
    """
    if layout not in contract.LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: expected {' or '.join(contract.LAYOUTS)}")
    config = language_config(checkpoint, layout)
    weights = [
        replace(weight, ready=(ready or {}).get(weight.rule_name)) for weight in _weights(checkpoint, recipe, layout)
    ]
    quantization = _quantization(weights)
    if quantization:
        config["quantization"] = quantization
    faults = _write_weights(weights, folder, advance)
    if faults:
        raise UserError(
            f"recipe {recipe.name} cannot store {checkpoint.path}: {'; '.join(faults)}"
            "; repair the checkpoint, or use a recipe with bfloat16 where values are too large for float16"
        )
    _write_json(folder / contract.CONFIG, config)
    stored = {name: (weight.file, spec) for weight in weights for name, spec in weight.parts().items()}
    size = sum(spec_bytes(spec) for _, spec in stored.values())
    parameters = sum(math.prod(weight.shape) for weight in weights)
    if contract.WEIGHTS not in (file for file, _ in stored.values()):
        index = {
            "metadata": {"total_size": size, "total_parameters": parameters},
            "weight_map": {name: file for name, (file, _) in stored.items()},
        }
        _write_json(folder / contract.WEIGHTS_INDEX, index)
    return {
        "layout": layout,
        "files": sorted({file for file, _ in stored.values()}),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 3),
        "recipe": recipe.to_json(),
        "decisions": _decisions(weights, checkpoint.tied),
        "quantization": quantization,
    }


def weight_shapes(checkpoint: Checkpoint, layout: str = "app") -> dict[str, tuple[int, ...]]:
    """Name, as recipes speak of it -> shape of the decoder's weights and, but for layout "mlx-lm", the projector's."""
    return {name: tuple(checkpoint.tensors[source].shape) for name, source in _sources(checkpoint, layout).items()}


def _sources(checkpoint: Checkpoint, layout: str) -> dict[str, str]:
    """Artefact name -> canonical name of the weights of `weight_shapes`, in the model's order."""
    names = {
        name: source
        for source in checkpoint.tensors
        if (name := naming.to_artefact(source))
        and not (source == naming.LM_HEAD and checkpoint.tied)
        and (layout != "mlx-lm" or name.startswith(contract.LANGUAGE_PREFIX))
    }
    return dict(sorted(names.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key with layer 2 before layer 10, whatever order the input files have."""
    return [(int(word) if word.isdigit() else -1, word) for word in re.split(r"\.", name)]


def _weights(checkpoint: Checkpoint, recipe: Recipe, layout: str) -> list[Weight]:
    """Everything that will be stored, each with its scheme and its file."""
    sources = _sources(checkpoint, layout)
    shapes = weight_shapes(checkpoint, layout)
    tower: dict[str, tuple[tuple[int, ...], str, RowReader]] = {}
    if layout == "mlx-vlm":
        from model_export.language import mlx_vlm  # and with it timm

        recipe.plan(shapes, ELSEWHERE)  # the language model's faults before the vision tower's
        tower = mlx_vlm.vision_tower(checkpoint)
        shapes |= {name: shape for name, (shape, _, _) in tower.items()}
    plan = recipe.plan(shapes, ELSEWHERE_OF[layout])
    decoder = [name for name in shapes if name.startswith(contract.LANGUAGE_PREFIX)]
    shards = _shards({name: sum(map(spec_bytes, plan[name].parts(shapes[name]).values())) for name in decoder})
    weights = []
    for name, shape in shapes.items():
        stored, file = name, contract.PROJECTOR_WEIGHTS
        if name.startswith(contract.LANGUAGE_PREFIX):
            file, stored = shards[name], name.removeprefix(contract.LANGUAGE_PREFIX if layout == "mlx-lm" else "")
        elif name in tower:
            file = contract.VISION_WEIGHTS
        elif layout == "mlx-vlm":
            stored = mlx_vlm.projector_name(name)
        if name in tower:
            _, source, rows = tower[name]
        else:
            source, rows = checkpoint.tensors[sources[name]].dtype, partial(checkpoint.rows, sources[name])
        weights.append(Weight(name, stored, file, shape, plan[name], source, rows))
    return weights


def _shards(sizes: dict[str, int]) -> dict[str, str]:
    """The file of each weight: in order, a new one when the next weight would pass SHARD_BYTES."""
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > SHARD_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    if number == 1:
        return dict.fromkeys(sizes, contract.WEIGHTS)
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _write_weights(weights: list[Weight], folder: Path, advance: Callable[[int], None] | None) -> list[str]:
    """Write every file, one after the other; returns what is wrong with the values."""
    faults: list[str] = []
    with ThreadPoolExecutor(threads.count()) as pool:
        for file in dict.fromkeys(weight.file for weight in weights):
            own = [weight for weight in weights if weight.file == file]
            with TensorFile(folder / file, {k: v for weight in own for k, v in weight.parts().items()}) as output:
                faults += _stream(own, output, pool, advance)
    return faults


def _stream(
    weights: list[Weight], output: TensorFile, pool: Executor, advance: Callable[[int], None] | None
) -> list[str]:
    """Convert and write the weights of a file, some rows at a time; returns what is wrong with their values."""

    def convert(piece: tuple[Weight, int, int]) -> tuple[Weight, int, float]:
        weight, start, stop = piece
        parts, largest = weight.convert(start, stop)
        for name, rows in parts.items():
            output.write(name, rows, start)
        return weight, weight.source_bytes(stop - start), largest

    magnitudes_of: dict[str, tuple[Weight, list[float]]] = {}
    for weight, size, largest in pool.map(convert, _pieces(weights)):
        magnitudes_of.setdefault(weight.name, (weight, []))[1].append(largest)
        if advance:
            advance(size)
    return [fault for weight, magnitudes in magnitudes_of.values() if (fault := _fault(weight, magnitudes))]


def _pieces(weights: list[Weight]) -> Iterator[tuple[Weight, int, int]]:
    """Every weight's rows, about _CHUNK values at a time: (weight, start, stop)."""
    for weight in weights:
        rows, step = weight.shape[0], max(1, _CHUNK // math.prod(weight.shape[1:]))
        yield from ((weight, start, min(start + step, rows)) for start in range(0, rows, step))


def _fault(weight: Weight, magnitudes: list[float]) -> str | None:
    """The fault of a weight whose pieces have these largest magnitudes; None for a sound one."""
    if not all(map(math.isfinite, magnitudes)):
        return f"{weight.rule_name}: values are not finite"
    largest, limit = max(magnitudes), LARGEST[weight.scheme.dtype]
    if largest > limit:
        return f"{weight.rule_name}: largest value {largest:.4g} is past {weight.scheme.dtype}'s {limit:.4g}"
    return None


def _quantization(weights: list[Weight]) -> dict[str, Any] | None:
    """config.json's `quantization`: the commonest setting for all, and an entry for each module that differs from it.

    Modules without an entry are quantized where they have `.scales` (mlx-lm, mlx-vlm and the app all look for them), so
    a recipe with one setting needs no entries, and loads in mlx-swift-examples 2.21, which reads none.
    """
    modules: dict[str, dict[str, Any]] = {}
    for weight in weights:
        entry = weight.scheme.mlx()
        if entry:
            modules[weight.name.removesuffix(".weight")] = entry
    if not modules:
        return None
    entries = list(modules.values())
    common = max(entries, key=entries.count)
    return common | {name: entry for name, entry in modules.items() if entry != common}


def _decisions(weights: list[Weight], tied: bool) -> dict[str, Any]:
    """The recipe's decisions for the decoder's layers, the embeddings, lm_head and the projector."""
    schemes = {weight.rule_name: weight.scheme for weight in weights}
    decisions: dict[str, Any] = {part: schemes[name].to_json() for part, name in _DECISIONS.items() if name in schemes}
    return decisions | ({"lm_head": "the embeddings (tied)"} if tied else {})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
