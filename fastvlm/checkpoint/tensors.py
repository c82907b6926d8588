"""Checks of a checkpoint's tensors: their canonical names, the tower's form, the tie of the head, types, shapes."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fastvlm.checkpoint import layouts, naming
from fastvlm.checkpoint.configuration import ModelConfig, reason_of
from fastvlm.checkpoint.shapes import shapes
from fastvlm.checkpoint.weights import TensorInfo, Weights
from fastvlm.common.dtypes import DTYPES
from fastvlm.common.findings import Finding, Steps

_TRAINING_PARTS = (".conv_kxk.", ".conv_scale.", ".identity.", ".large_conv.", ".small_conv.", ".pos_enc.")


def canonical(weights: Weights, layout: str) -> Steps[tuple[dict[str, TensorInfo], list[str]]]:
    """The tensors by canonical name, and the source names of those that have none."""
    rename = naming.from_llava if layout == "llava_qwen2" else naming.from_transformers
    tensors, unknown = {}, []
    prefix = naming.wrapper_prefix(weights.tensors)
    if prefix:
        got, expected = f"{prefix} in front of every name", "names without it, as they are read: a wrapper added it"
        yield Finding("tensor-prefix", "weights", got, expected, severity="warning")
    for source, info in weights.tensors.items():
        name = rename(source.removeprefix(prefix))
        if naming.is_ignored(source):
            if source.endswith(naming.IMAGE_NEWLINE):
                got = "a tensor that is not used: it ends the rows of tiles, and a picture is one square here"
                yield Finding("tensor-ignored", source, got, severity="warning")
        elif name is None or name in tensors:
            unknown.append(source)
        else:
            tensors[name] = info
    return tensors, unknown


def is_training(name: str) -> bool:
    """Whether a vision tensor of this (canonical) name is only in the training form."""
    return any(part in name for part in _TRAINING_PARTS)


def form_of(tensors: Mapping[str, TensorInfo], complete: bool) -> Steps[str]:
    """`training` or `folded`, from the names of the vision tensors."""
    vision = [name for name in tensors if name.startswith(naming.VISION)]
    training = [name for name in vision if is_training(name)]
    folded = [name for name in vision if ".reparam_conv." in name]
    if training and folded:
        expected, remedy = "all branches folded or none", "these are already folded"
        yield Finding("tower-partly-folded", "vision tower", "both forms", expected, remedy, details=tuple(folded))
    elif not vision and complete:
        yield Finding("tower-missing", "weights", "no vision tower", "a whole FastVLM, not a part of one")
    return "training" if training else "folded"


def resolve_tie(
    weights: Weights, tensors: Mapping[str, TensorInfo], config: dict[str, Any], layout: str
) -> Steps[bool]:
    """Whether lm_head is the embeddings: the weights decide, the config is only compared."""
    stated = layouts.says_tied(config, layout)
    head, embeddings = tensors.get(naming.LM_HEAD), tensors.get(naming.EMBEDDINGS)
    tied = head is None or (embeddings is not None and _identical(weights, head, embeddings))
    if stated is not None and stated != tied:
        why = "is absent" if head is None else "repeats the embeddings" if tied else "differs from the embeddings"
        expected = f"{str(tied).lower()}, which is used: lm_head.weight {why}"
        where = "config.json: tie_word_embeddings"
        yield Finding("config-ignored", where, str(stated).lower(), expected, severity="warning")
    return tied


def _identical(weights: Weights, a: TensorInfo, b: TensorInfo) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = 4096  # different ones differ in the first piece
    return all(
        np.array_equal(weights.rows(a, start, start + step), weights.rows(b, start, start + step))
        for start in range(0, a.shape[0], step)
    )


def compare(
    tensors: Mapping[str, TensorInfo], unknown: list[str], model: ModelConfig, tied: bool, complete: bool
) -> Iterator[Finding]:
    """Yield findings where names or shapes differ from those of Transformers' own class."""
    try:
        expected = shapes(model)
    except Exception as error:  # timm builds the tower, and raises anything for widths that don't go together
        yield Finding("config-unusable", "config.json", reason_of(error), "sizes of which a model can be built")
        return
    if tied and naming.LM_HEAD not in tensors:
        expected.pop(naming.LM_HEAD)
    missing = sorted(set(expected) - set(tensors)) if complete else []
    unexpected = sorted([tensors[name].source for name in set(tensors) - set(expected)] + unknown)
    misshapen = [
        f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    for kind, names in kinds.items():
        if names:
            yield Finding(f"tensors-{kind}", "weights", f"{len(names)} {kind} tensors", details=tuple(names))


def dtype_of(tensors: Mapping[str, TensorInfo], config: dict[str, Any], complete: bool) -> Steps[str]:
    """The type of most weights."""
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size
    if other := sorted(name for name in sizes if name not in DTYPES):
        names = tuple(info.source for info in tensors.values() if info.dtype in other)
        expected, remedy = ", ".join(DTYPES), "give the weights before quantization"
        yield Finding("dtype-unsupported", "weights", ", ".join(other), expected, remedy, details=names)
    main = max(sizes, key=lambda name: sizes[name], default="float32")
    if not complete:
        return main
    if len(sizes) > 1:
        parts = ", ".join(f"{name} {count:,}" for name, count in sorted(sizes.items()))
        yield Finding("dtype-mixed", "weights", f"{parts} parameters", f"one: read as {main}", severity="warning")
    stated = config.get("dtype", config.get("torch_dtype"))
    if isinstance(stated, str) and stated.removeprefix("torch.") != main:
        expected = f"{main}, as most weights are"
        yield Finding("config-ignored", "config.json: dtype", stated, expected, severity="warning")
    return main
