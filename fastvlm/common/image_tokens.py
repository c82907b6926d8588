"""The number of tokens that a picture becomes: decided here alone."""

# Pixels per image token along each side: 4 in the encoder's stem, times 2 in each of its four later stages.
PATCH_SIZE = 64
# What apple/ml-fastvlm's app hard-codes: `precondition(output.image_features.shape == [1, 256, 3072])`.
APP_OUTPUT_SHAPE = (1, 256, 3072)


def tokens_per_image(image_size: int) -> int:
    """Image tokens of a square picture with sides of `image_size` pixels."""
    return (image_size // PATCH_SIZE) ** 2
