"""The PyTorch reference model and its checkpoints."""

from typing import Any

from fastvlm.common.version import VERSION

__all__ = ["load"]
__version__ = VERSION


def load(path: Any, dtype: str = "float32") -> Any:
    """Load a checkpoint as a `fastvlm.model.surface.FastVLM` (see there for the methods, shapes and units)."""
    from fastvlm.model.surface import load_checkpoint  # torch and transformers take seconds: not at import

    return load_checkpoint(path, dtype=dtype)
