"""MLX weight formats: affine groups, mxfp, nvfp and casts, byte for byte."""
