"""A PyTorch module as a Core AI asset (.aimodel): the same bytes in every process."""

import contextlib
import gc
import io
import json
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from model_export import artefact
from model_export.coreai import contract
from model_export.coreai.modules import SLICE_UPDATE, lower_slice_update

# Constants of up to so many bytes stay in the program's text. A larger one is a resource, which Core AI names by the
# hash of an address: these get names of ours.
_INLINE = 8


def save(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    target: Path,
    *,
    output: str,
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
    states: Sequence[str] = (),
) -> None:
    """Convert a module to an asset of one function, `main`.

    Args:
        module: evaluated under the arguments `inputs`, in their order.
        target: the folder NAME.aimodel to write; its parent exists.
        output: the name of the one output.
        dynamic: input -> axis -> `torch.export.Dim` of the axes that are open; no entry: fixed shapes.
        states: the inputs that are updated in place and become states.
    """
    shapes = {name: dict(axes) for name, axes in dynamic.items()} if dynamic else None
    given = {name: (shapes or {}).get(name) for name in inputs} if shapes else None
    with _quiet(), torch.no_grad():
        import coreai_torch

        program = torch.export.export(
            module.eval(),
            (),
            dict(inputs),
            dynamic_shapes=given,
            # The decoder compares symbolic lengths, which guards would fix to the example's.
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        ).run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        converter.register_torch_lowering(f"{SLICE_UPDATE}.default")(lower_slice_update)
        converter.add_exported_program(
            program,
            input_names=[name for name in inputs if name not in states],
            output_names=[output],
            state_names=list(states),
        )
        with _repeatable():
            converted = converter.to_coreai()
    del program, converter
    gc.collect()  # graphs, which refer to themselves
    target.mkdir()
    # `save_asset` reads the whole program into memory to hash it, and puts the time into metadata.json.
    converted._save_bytecode(target / contract.PROGRAM)
    del converted
    gc.collect()  # with it the weights
    digest = artefact.hash_file(target / contract.PROGRAM)["sha256"]
    (target / contract.PROGRAM_HASH).write_bytes(bytes.fromhex(digest))
    document = {"producer": contract.producer(), "assetVersion": contract.ASSET_VERSION}
    (target / contract.METADATA).write_text(json.dumps(document, indent=2) + "\n")


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Names that coreai-core draws at random, or makes of addresses, in the order of their use instead."""
    from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir.dialects import coreai
    from coreai._compiler.ir import DenseResourceElementsAttr
    from coreai.authoring import func, graph_builder

    original, drawn, count = coreai.create_elements_attr, random.Random(0), 0

    def create(location: Any, kind: Any, array: np.ndarray) -> Any:
        nonlocal count
        if array.nbytes <= _INLINE or array.dtype == bool or _all_equal(array):
            return original(location, kind, array)
        count += 1
        buffer: Any = np.ascontiguousarray(array)
        return DenseResourceElementsAttr.get_from_buffer(buffer, f"w{count}", kind)

    with (
        mock.patch.object(coreai, "create_elements_attr", create),
        mock.patch.object(func, "choice", drawn.choice),
        mock.patch.object(graph_builder, "choice", drawn.choice),
    ):
        yield


def _all_equal(array: np.ndarray) -> bool:
    """Whether every value is the first one. Most arrays show in their first values that they aren't, and a comparison
    of a whole one costs half its memory."""
    first = array.flat[0]
    return bool((array.flat[:_INLINE] == first).all() and (array == first).all())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar that coreai-torch prints and the deprecations that PyTorch warns of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
