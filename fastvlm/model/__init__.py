"""The PyTorch model: building it, folding its branches, running it."""
