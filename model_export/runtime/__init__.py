"""An artefact as a FastVLM: its halves run by PyTorch, the MIL executor, MLX or Core ML.

Imports `model_export.mil`, `encoder`, `artefact`, `config` and `contract`.
"""

from model_export.runtime.loading import CoreMLVision, ExecutorVision, function_for, load

__all__ = ["CoreMLVision", "ExecutorVision", "function_for", "load"]
