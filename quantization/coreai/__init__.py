"""Core AI's forms of weights: their table, their arithmetic in NumPy, and which weight of a bundle gets which."""
