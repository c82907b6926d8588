"""Time to first token of every runner, stage by stage, and the comparison of two runs."""
