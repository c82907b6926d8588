"""The language model as an MLX folder: weights, config, tokenizer, mlx-vlm's layout."""
