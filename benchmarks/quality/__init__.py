"""Answers and perplexity of checkpoints and artefacts, and the sweep over recipes."""
