"""The operations, one file per family as in coremltools' `converters/mil/mil/ops/defs`; importing registers them."""

from . import (  # noqa: F401
    activation,
    classify,
    constexpr,
    control_flow,
    conv,
    elementwise_binary,
    elementwise_unary,
    image_resizing,
    linear,
    lists,
    non_maximum_suppression,
    normalization,
    pool,
    recurrent,
    reduction,
    scatter_gather,
    states,
    tensor_operation,
    tensor_transformation,
    transformers,
)
