"""The operations, one file per family as in coremltools' `converters/mil/mil/ops/defs`; importing registers them."""

from . import (  # noqa: F401
    activation,
    constexpr,
    control_flow,
    conv,
    elementwise_binary,
    elementwise_unary,
    image_resizing,
    linear,
    non_maximum_suppression,
    normalization,
    pool,
    quantization,
    random,
    reduction,
    scatter_gather,
    tensor_operation,
    tensor_transformation,
    transformers,
)
