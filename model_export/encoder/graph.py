"""The encoder's graph of a checkpoint: its branches folded, the fold proved, and the folded module traced."""

import torch
from torch import nn
from torch._export.verifier import Verifier

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.cli import progress
from fastvlm.common.dtypes import DTYPES
from fastvlm.model.build import encoder as load_encoder
from fastvlm.model.fold import fold_and_prove
from model_export import contract
from model_export.encoder.channel_first import Encoder
from model_export.encoder.coreml import quiet_conversion
from model_export.mil.allocator import returned_buffers


@progress("fold the branches, prove the fold")
def folded_encoder(checkpoint: Checkpoint) -> tuple[nn.Module, dict[str, float]]:
    """The folded float32 encoder and the fold's errors. Loaded as it is stored: half the memory, nothing rounded."""
    stored = {info.dtype for name, info in checkpoint.tensors.items() if name.startswith(naming.VISION)} & {*DTYPES}
    original = load_encoder(checkpoint, dtype=stored.pop() if len(stored) == 1 else "float32")
    with returned_buffers(8 << 20):  # those of weights; what is computed with them is smaller
        folded, errors = fold_and_prove(original, dtype=torch.float32)
    checkpoint.unmap()
    return folded.requires_grad_(False), errors


@progress("trace (torch.export)")
def graph(encoder: Encoder, image_size: int) -> torch.export.ExportedProgram:
    """The core-ATen graph. Gradients off: with them the conversion peaks at 7 GB instead of 2 (1024 x 1024).

    `run_decompositions({})`, what coremltools asks for, would trace it once more, for twice as long: nothing in it is
    left to decompose (tests compare), so its dialect's name is all that would change.
    """
    example = (torch.zeros(contract.input_shape(image_size)),)
    with torch.no_grad(), quiet_conversion():
        program = torch.export.export(encoder.eval(), example)
    program._verifiers = [Verifier]  # of core ATen
    return program


def module_of(node: torch.fx.Node) -> tuple[str, str]:
    """Path and class of the innermost module that a node comes from."""
    path, kind = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1]
    return path, kind if isinstance(kind, str) else kind.__name__


def kind_of(node: torch.fx.Node) -> str:
    """The name of a node's ATen operation."""
    return str(node.target).removeprefix("aten.").partition(".")[0]
