"""Quantization that looks at data: AWQ, GPTQ, DWQ, sensitivity, bit allocation, budgets.

Imports `quantization`'s formats, schemes and recipes.
"""
