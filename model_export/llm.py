"""Checkpoint to MLX folder: the language model and the projector, streamed from the input files to the output files.

Memory does not depend on the model's size: every output file gets its header first, and then the rows of one weight
after the other, some megabytes at a time.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvlm import naming
from fastvlm.checkpoint import Checkpoint
from fastvlm.errors import UserError
from model_export import contract, mlx_vlm
from model_export.llm_config import language_config
from model_export.tensor_file import Spec, TensorFile, nbytes
from quantization.recipe import Recipe
from quantization.schemes import DTYPES, Scheme

SHARD_BYTES = 5 << 30  # as mlx-lm and mlx-vlm write: hosting sites refuse much larger files
_CHUNK = 1 << 20  # values that a worker converts at once: 4 MiB in float32
# The weights whose scheme is a decision worth naming: what they are for, and one name of each.
_DECISIONS = {
    "layers": "language_model.model.layers.0.mlp.down_proj.weight",
    "embeddings": "language_model.model.embed_tokens.weight",
    "lm_head": "language_model.lm_head.weight",
    "projector": "multi_modal_projector.linear_0.weight",
}
# Parts that a recipe may speak of though a model does not store them here: a tied one's lm_head, the vision tower.
_ELSEWHERE = ("language_model.lm_head.weight", "vision_tower.")


@dataclass(frozen=True)
class Weight:
    """One weight on its way: from `rows(start, stop)` (any float dtype) to `name` in `file`, stored by `scheme`."""

    rule_name: str  # the name that recipes speak of
    name: str
    file: str
    shape: tuple[int, ...]
    scheme: Scheme
    rows: Callable[[int, int], Tensor]

    def parts(self) -> dict[str, Spec]:
        """Stored tensor name -> dtype, shape: `x.weight` and, where quantized, `x.scales` and `x.biases`."""
        stem, _, leaf = self.name.rpartition(".")
        return {
            f"{stem}.{leaf if part == 'weight' else part}": spec for part, spec in self.scheme.parts(self.shape).items()
        }


def language_parameters(checkpoint: Checkpoint) -> int:
    """How many values `export_llm` will stream, and so the total of what it reports through `advance`."""
    return sum(math.prod(checkpoint.tensors[source].shape) for source in _sources(checkpoint).values())


def planned_bytes(checkpoint: Checkpoint, recipe: Recipe, layout: str = "app") -> int:
    """What `export_llm` will write, in bytes. UserError with whatever would stop it, but for the values."""
    language_config(checkpoint, layout)
    weights = _weights(checkpoint, recipe, layout)
    return sum(nbytes(spec) for weight in weights for spec in weight.parts().values())


def export_llm(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    advance: Callable[[int], None] | None = None,
    layout: str = "app",
) -> dict[str, Any]:
    """Write the decoder, the projector and config.json into `folder`, which exists and has no such files.

    layout "app" is what the demo app and mlx-lm load; "mlx-vlm" adds the vision tower and uses that loader's names
    (see contract.py). `advance(n)` is called after every n of
    the `language_parameters`. The same input gives the same bytes.
    Returns facts for the manifest: files, parameters, bytes, bits per weight, recipe and its decisions.
    Raises UserError, with every fault, when the recipe or the loaders cannot take the model (before any work), or
    when values are not finite or too large for the dtype that the recipe names.
    """
    if layout not in contract.LAYOUTS:
        raise UserError(f"unknown layout {layout!r}: expected {' or '.join(contract.LAYOUTS)}")
    config = language_config(checkpoint, layout)
    weights = _weights(checkpoint, recipe, layout)
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
    size = sum(nbytes(spec) for _, spec in stored.values())
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


def _sources(checkpoint: Checkpoint) -> dict[str, str]:
    """Artefact name -> canonical name of the decoder's and the projector's weights, in the model's order."""
    names: dict[str, str] = {}
    for source in checkpoint.tensors:
        if source.startswith(naming.LANGUAGE):
            names["language_model.model." + source.removeprefix(naming.LANGUAGE)] = source
        elif source == naming.LM_HEAD and not checkpoint.tied:
            names["language_model.lm_head.weight"] = source
        elif source.startswith(naming.PROJECTOR):
            names[source.replace(naming.PROJECTOR, contract.PROJECTOR_PREFIX).replace("linear_1", "linear_0")] = source
    return dict(sorted(names.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key with layer 2 before layer 10, whatever order the input files have."""
    return [(int(word) if word.isdigit() else -1, word) for word in re.split(r"\.", name)]


def _weights(checkpoint: Checkpoint, recipe: Recipe, layout: str) -> list[Weight]:
    """Everything that will be stored, each with its scheme and its file."""
    sources = _sources(checkpoint)
    shapes = {name: tuple(checkpoint.tensors[source].shape) for name, source in sources.items()}
    tower: dict[str, Tensor] = {}
    if layout == "mlx-vlm":
        recipe.plan(shapes, _ELSEWHERE)  # the language model's faults before the vision tower's work
        tower = mlx_vlm.vision_tower(checkpoint)
        shapes |= {name: tuple(tensor.shape) for name, tensor in tower.items()}
    plan = recipe.plan(shapes, _ELSEWHERE[:1] if tower else _ELSEWHERE)
    decoder = [name for name in shapes if name.startswith(contract.LANGUAGE_PREFIX)]
    shards = _shards({name: sum(map(nbytes, plan[name].parts(shapes[name]).values())) for name in decoder})
    weights = []
    for name, shape in shapes.items():
        stored, file = name, contract.PROJECTOR_WEIGHTS
        if name.startswith(contract.LANGUAGE_PREFIX):
            file = shards[name]
        elif name in tower:
            file = contract.VISION_WEIGHTS
        elif layout == "mlx-vlm":
            stored = mlx_vlm.projector_name(name)
        rows = _rows_in_memory(tower[name]) if name in tower else _rows_of(checkpoint, sources[name])
        weights.append(Weight(name, stored, file, shape, plan[name], rows))
    return weights


def _rows_in_memory(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: tensor[start:stop]


def _rows_of(checkpoint: Checkpoint, name: str) -> Callable[[int, int], Tensor]:
    """Reads rows of a checkpoint's tensor into memory: of a mapped file, every page once read would count as ours."""
    info = checkpoint.tensors[name]
    dtype, columns = DTYPES[info.dtype], math.prod(info.shape[1:])
    if info.offset < 0:  # an old .bin file, whose tensors are where PyTorch says
        return lambda start, stop: checkpoint.read(name, mapped=True)[start:stop]

    def rows(start: int, stop: int) -> Tensor:
        part = torch.empty(min(stop, info.shape[0]) - start, *info.shape[1:], dtype=dtype)
        rest = part.view(-1).view(torch.uint8).numpy().data
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start * columns * dtype.itemsize)
            while rest:  # a single read may be short
                count = file.readinto(rest)
                if not count:
                    raise UserError(f"{info.file}: ended in {info.source} while it was read: has it changed?")
                rest = rest[count:]
        return part

    return rows


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
    with _workers() as pool:
        for file in dict.fromkeys(weight.file for weight in weights):
            own = [weight for weight in weights if weight.file == file]
            counted = None if file == contract.VISION_WEIGHTS else advance
            with TensorFile(folder / file, {k: v for weight in own for k, v in weight.parts().items()}) as output:
                for weight in own:
                    fault = _stream(weight, output, pool, counted)
                    faults += [fault] if fault else []
    return faults


@contextmanager
def _workers() -> Iterator[Executor]:
    """As many threads as torch would use, each running its operations alone.

    Torch's own threads wait for each other after every operation: on a busy machine that made an export 200 times
    slower than one thread is.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also what threads that start from here on begin with
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _stream(weight: Weight, output: TensorFile, pool: Executor, advance: Callable[[int], None] | None) -> str | None:
    """Convert and write one weight, some rows at a time; returns what is wrong with its values, if anything."""
    dtype = DTYPES[weight.scheme.dtype]
    stored = dict(zip(weight.scheme.parts(weight.shape), weight.parts(), strict=True))
    step = max(1, _CHUNK // math.prod(weight.shape[1:]))

    def convert(start: int) -> tuple[int, list[float]]:
        rows = weight.rows(start, start + step)
        for part, encoded in weight.scheme.encode(rows.to(dtype)).items():
            output.write(stored[part], encoded, start)
        return rows.numel(), [edge.item() for edge in rows.aminmax()]  # not-a-number spreads into both

    edges: list[float] = []
    for count, both in pool.map(convert, range(0, weight.shape[0], step)):
        edges += both
        if advance:
            advance(count)
    if not all(map(math.isfinite, edges)):
        return f"{weight.rule_name}: values are not finite"
    largest, limit = max(map(abs, edges)), torch.finfo(dtype).max
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
    """What the recipe decided for the decoder's layers, the embeddings, lm_head and the projector."""
    schemes = {weight.rule_name: weight.scheme for weight in weights}
    decisions: dict[str, Any] = {part: schemes[name].to_json() for part, name in _DECISIONS.items() if name in schemes}
    return decisions | ({"lm_head": "the embeddings (tied)"} if tied else {})


def _write_json(path: Path, document: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
