"""The largest values of a saved program, operation by operation, measured with the MIL executor in float32."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from model_export import mil
from model_export.encoder.ranges import Advance, Range, Tally, finished, subnormal_share
from model_export.mil import registry
from model_export.mil.blob import WeightFile, immediate
from model_export.mil.program import BlobRef, Constant, Operation
from model_export.mil.types import NUMPY

_TWO_WORDS = ("final_conv", "pos_emb", "reparam_conv", "token_mixer")  # parts of timm's names with a "_" of their own


def measure_package(
    executor: mil.MILExecutor, pixels: Iterable[np.ndarray], advance: Advance = lambda: None
) -> list[Range]:
    """Every operation of a package's function that gives floats, in order of execution.

    executor: loaded with compute="float32". pixels: arrays of its one input's shape, cast to its type. `advance()`
    after each. Raises UserError as `measure_modules`, MILError as the executor.
    """
    ((input_name, input_type),) = executor.inputs.items()
    constants = _Constants(executor)
    tallies: dict[str, Tally] = {}
    norms = {op.name: constants.norm(op) for op in executor.operations if op.type == "layer_norm"}
    sources = {source for source, _ in norms.values()}
    of_norms: dict[str, torch.Tensor] = {}  # what a LayerNorm reads

    def watch(operation: Operation, outputs: Mapping[str, torch.Tensor]) -> None:
        of_norms.update({name: value for name, value in outputs.items() if name in sources})
        floats = [value for value in outputs.values() if value.is_floating_point()]
        if floats and operation.name not in tallies:
            tallies[operation.name] = constants.tally(operation)
        for value in floats:
            tallies[operation.name].see(value)
        if operation.name in norms:
            source, axes = norms[operation.name]
            tallies[operation.name].see_norm(of_norms[source], axes)

    for array in pixels:
        array = array.astype(NUMPY[input_type.dtype])
        of_norms[input_name] = torch.from_numpy(array)
        executor.run({input_name: array}, watch=watch)
        of_norms.clear()
        advance()
    return finished(tallies)


def layer_name(weight: str) -> str | None:
    """timm's name of a layer from the name that coremltools gives its weight, None if it isn't one:
    `p_fastvit_stages_3_pos_emb_weight_to_fp16` is of `stages.3.pos_emb`."""
    match = re.search(r"_((?:stem|stages|final_conv)_.*?)_(?:weight|bias)(?:_|$)", weight)
    if match is None:
        return None
    path = match[1].replace("_", ".")
    for words in _TWO_WORDS:
        path = path.replace(words.replace("_", "."), words)
    return path


class _Constants:
    """The constants of a function's operations: weights, whatever form they are stored in, and parameters."""

    def __init__(self, executor: mil.MILExecutor) -> None:
        self._executor = executor
        self._makers = {
            output.name: operation
            for operation in executor.function.block.operations
            if operation.type == "const" or operation.type.startswith("constexpr_")
            for output in operation.outputs
        }
        self._types = {output.name: output.type for maker in self._makers.values() for output in maker.outputs}

    def norm(self, operation: Operation) -> tuple[str, tuple[int, ...]]:
        """A layer_norm's input, and the axes that it normalizes (default: all)."""
        node, source = self._node(operation), operation.inputs["x"][0]
        rank = len(operation.outputs[0].type.shape) if operation.outputs[0].type else 0
        return str(source), tuple(node.const("axes", list(range(rank))))

    def tally(self, operation: Operation) -> Tally:
        """An empty tally; its layer is that of the first weight whose name has one."""
        names = [item for items in operation.inputs.values() for item in items if isinstance(item, str)]
        values = map(self._get, names)  # scalars are parameters, no weights
        constants = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()]
        layers = (layer_name(name) for name in names if name in self._makers)
        type = operation.outputs[0].type
        return Tally(
            operation.name,
            operation.type,
            next((layer for layer in layers if layer), None),
            weight_subnormal=subnormal_share(constants),
            dtype=type.dtype if type else "",
        )

    def _node(self, operation: Operation) -> registry.Node:
        return registry.Node(operation, dict(self._types), self._get, self._load, self._executor.policy)

    def _get(self, name: str) -> Any:
        maker = self._makers.get(name)
        if maker is None:
            return None
        if maker.type == "const":
            return self._load(maker.attributes["val"])
        builder = registry.lookup(maker.type, self._executor.function.opset)
        assert builder is not None  # or the executor would have refused the program
        result = builder(self._node(maker)).run()
        several = result if isinstance(result, tuple) else (result,)
        return several[[output.name for output in maker.outputs].index(name)]

    def _load(self, constant: Constant) -> Any:
        if not isinstance(constant.data, BlobRef):
            return immediate(constant)
        return WeightFile(constant.data.file).read(constant.data.offset, constant.type)
