"""The models that the FastVLM paper compares with, and its claims recomputed."""
