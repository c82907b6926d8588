"""The PyTorch reference model and its checkpoints: `load` is the way in.

Wings: `common` (command line, errors, files, child processes), `checkpoint` (find, check and read a folder), `data`
(pictures, prompts, conversations), `model` (build, fold, ask), and `download`, `demo`, `synthetic`.
"""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvlm.model.surface import FastVLM

from fastvlm.common.version import VERSION

__all__ = ["load"]
__version__ = VERSION


def load(
    path: str | PathLike[str],
    dtype: str = "float32",
    device: str = "cpu",
    adapter: str | PathLike[str] | None = None,
) -> "FastVLM":
    """Load a checkpoint folder, in LLaVA's or Transformers' layout, to be run by PyTorch.

    Args:
        path: the folder.
        dtype: "float32", "float16" or "bfloat16", or "auto": as the weights are stored, as far as the device can.
        device: "cpu", "cuda" or "mps", or "auto": the first of cuda, mps and cpu that is there.
        adapter: the folder of a fine-tune's adapter, which is merged into the weights as they are read; None: none.

    Returns:
        The model: `generate`, and its stages `preprocess`, `encode_image`, `project` and `merge`, NumPy in and out.

    Raises:
        UserError (`fastvlm.common.errors`): the folder is no usable checkpoint, the adapter doesn't fit it, or the
            device is not on this machine.
    """
    from fastvlm.model.torch_parts import load_checkpoint  # torch and transformers take seconds: not at import

    return load_checkpoint(path, dtype, device, adapter=adapter)
