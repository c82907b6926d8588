"""Calibrated quantization: AWQ, GPTQ, DWQ, sensitivities, and bits allocated within a budget."""
