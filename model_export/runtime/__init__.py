"""Runs an artefact as a FastVLM, its halves by PyTorch, the MIL executor, MLX or Core ML."""

from model_export.runtime.loading import CoreMLVision, ExecutorVision, function_for, load

__all__ = ["CoreMLVision", "ExecutorVision", "function_for", "load"]
