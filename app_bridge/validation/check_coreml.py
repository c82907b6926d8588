"""The Core ML package, against the class that Xcode makes of it and what the app's code does with that."""

from collections.abc import Mapping

from packaging.version import Version

from app_bridge.rules import finding
from app_bridge.validation.finite import is_finite
from app_bridge.validation.subject import Encoder, Subject, listed
from fastvlm.common.findings import Steps
from model_export import contract
from model_export.mil import MILError, read_package
from model_export.mil.blob import stored_tensors
from model_export.mil.program import Function, Program, TensorType

_SUFFIX = ".mlpackage"
_FLOATS = {"fp16": "float16", "fp32": "float32", "fp64": "float64"}  # MIL's names -> the app's
# The first systems that run a specification version (coremltools 9.0, `converters/mil/_deployment_compatibility.py`; of
# visionOS what was released beside that iOS) and an opset's version (`_OPSET` in its `__init__.py`).
_SYSTEMS = {
    6: {"iOS": "15", "macOS": "12", "visionOS": "1"},
    7: {"iOS": "16", "macOS": "13", "visionOS": "1"},
    8: {"iOS": "17", "macOS": "14", "visionOS": "1"},
    9: {"iOS": "18", "macOS": "15", "visionOS": "2"},
    10: {"iOS": "26", "macOS": "26", "visionOS": "26"},
}
# Operations of every opset that exported encoders consist of; which others are known, only the executor can tell.
KNOWN = {
    "add", "cast", "clip", "const", "conv", "gelu", "layer_norm", "linear", "matmul", "mul", "reduce_mean", "relu",
    "reshape", "sigmoid", "softmax", "split", "squeeze", "sub", "transpose",
}  # fmt: skip
_OPSETS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}


def check_package(subject: Subject) -> Steps[Encoder | None]:
    """Check the package alone; return its interface, None if there is no package that can be read."""
    name = subject.facts.model_class + _SUFFIX
    path = subject.folder / name
    if not path.exists():
        others = listed(sorted(package.name for package in subject.folder.glob(f"*{_SUFFIX}")))
        rule, where = ("package-name", f"{others} in place of {name}") if others else ("file-missing/package", name)
        yield finding(rule, where, others or "no Core ML package", name=name, model_class=subject.facts.model_class)
        return None
    try:
        program = read_package(path)
    except MILError as error:
        yield finding("package-unreadable", name, _without_path(error, subject))
        return None
    yield from _check_weights(subject, name, program)
    yield from _check_deployment(subject, name, program)
    # the function that the app is meant to get
    default = program.functions.get(program.default_function)
    function = program.functions.get(contract.MAIN, default)
    if default is None or default is not function:
        got = f"{program.default_function!r} of {listed(sorted(program.functions))}"
        yield finding("default-function", f"{name}: default function", got, main=repr(contract.MAIN))
    function = function or next(iter(program.functions.values()))
    if unknown := _unknown(function):
        yield finding("operation-unknown", f"{name}: {function.opset}", listed(unknown))
    return (yield from _check_interface(subject, name, function))


def _unknown(function: Function) -> list[str]:
    """The operations that this project doesn't know in this opset."""
    types = {operation.type for operation in function.block.operations} - KNOWN
    if not types:
        return []
    # torch: two seconds
    import model_export.mil.ops  # noqa: F401 (registers what `lookup` finds)
    from model_export.mil.registry import OPSETS, lookup

    return sorted(name for name in types if function.opset in OPSETS and lookup(name, function.opset) is None)


def _check_interface(subject: Subject, name: str, function: Function) -> Steps[Encoder]:
    """Names, types, ranks and shapes, and how they fit together; one finding a feature at most."""
    facts, others = subject.facts, function.other_features
    wanted = (facts.input_name, facts.input_dtype, facts.input_shape)
    taken = yield from _feature(name, "input", function.described_inputs, others, wanted)
    wanted = (facts.output_name, facts.output_dtype, facts.output_shape)
    given = yield from _feature(name, "output", function.described_outputs, others, wanted)
    required = sorted({item.name for item in function.inputs} - {facts.input_name})
    if taken and required:
        got = f"{listed(required)} besides {facts.input_name}"
        yield finding("input-extra", f"{name}: inputs", got, name=facts.input_name)
    side = taken[2] if taken and taken[2] == taken[3] else None
    if taken and side is None:
        yield finding("input-shape/square", f"{name}: input {facts.input_name}", list(taken))
    tokens, channels = (given[1], given[2]) if given else (None, None)
    if side and tokens and not (yield from _check_tokens(subject, name, side, tokens)):
        return Encoder()
    if side and given:
        yield from _check_described(subject, name, function)
    subject.checked.append(f"{name}: {function.name}, {function.opset}, {facts.input_name} -> {facts.output_name}")
    return Encoder(side, tokens, channels)


def _check_described(subject: Subject, name: str, function: Function) -> Steps[None]:
    """Check that the description, which Xcode makes the class of, agrees with the program."""
    made = (item for operation in function.block.operations for item in operation.outputs)
    inputs = {item.name: item.type for item in function.inputs}
    outputs = {item.name: item.type for item in made if item.name in function.block.outputs}
    for side, feature, described, own in (
        ("input", subject.facts.input_name, function.described_inputs, inputs),
        ("output", subject.facts.output_name, function.described_outputs, outputs),
    ):
        stated, held = described[feature], own.get(feature)
        sizes = tuple(size or 0 for size in stated.shape)  # the app's: none is flexible
        if held is None or held.dtype != stated.dtype or not held.accepts(sizes):
            got = f"{stated} in the description, {held or 'nothing'} in the program"
            yield finding("package-description", f"{name}: {side} {feature}", got)


def _check_tokens(subject: Subject, name: str, side: int, tokens: int) -> Steps[bool]:
    """Return whether the package gives as many image tokens as FastViTHD; the app's prompt has to have as many, too."""
    facts, expected = subject.facts, contract.tokens_per_image(side)
    if expected != tokens:
        got, where = f"{tokens} image tokens for {side} x {side} pixels", f"{name}: output {facts.output_name}"
        yield finding("encoder-tokens", where, got, tokens=expected, patch=contract.PATCH_SIZE)
        return False
    inserted = (side // facts.patch_size) ** 2 + facts.additional_image_tokens
    if inserted != tokens:
        got = f"{inserted} image tokens for {side} x {side} pixels"
        yield finding("prompt-tokens", "the app's prompt", got, tokens=tokens, name=name)
    return True


def _feature(
    name: str,
    side: str,
    arrays: Mapping[str, TensorType],
    others: Mapping[str, str],
    wanted: tuple[str, str, tuple[int | None, ...]],
) -> Steps[tuple[int, ...] | None]:
    """Return the shape of an input or output that is as the app has it; None after its (first) finding."""
    feature, dtype, shape = wanted
    where, expected = f"{name}: {side} {feature}", f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
    if feature in others:
        yield finding(f"{side}-kind", where, others[feature])
        return None
    if feature not in arrays:
        yield finding(f"{side}-name", f"{name}: {side}s", listed(sorted(arrays or others)) or "none", name=feature)
        return None
    got_dtype, sizes = _FLOATS.get(arrays[feature].dtype, arrays[feature].dtype), arrays[feature].shape
    if got_dtype != dtype:
        yield finding(f"{side}-dtype", where, got_dtype, dtype=dtype)
    elif len(sizes) != len(shape):
        got = f"{len(sizes)} dimensions, {list(sizes)}"
        yield finding(f"{side}-rank", where, got, rank=len(shape), shape=expected)
    elif any(size is None for size in sizes):
        yield finding(f"{side}-shape/flexible", where, "a flexible shape", shape=expected)
    elif any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
        yield finding(f"{side}-shape", where, list(sizes), shape=expected)
    else:
        return tuple(size for size in sizes if size is not None)
    return None


def _check_deployment(subject: Subject, name: str, program: Program) -> Steps[None]:
    """The oldest systems that run the package, against the oldest that the app is for."""
    opsets = sorted({function.opset for function in program.functions.values()})
    needed = max([program.specification_version, *(_OPSETS.get(opset, 0) for opset in opsets)])
    where, deployment = f"{name}: specification version", subject.facts.deployment
    if not {*opsets} <= {*_OPSETS} or needed > max(_SYSTEMS):
        got, known = f"specification {needed}, opset {listed(opsets)}", listed(sorted(_OPSETS), 9)
        yield finding("deployment-target/unknown", where, got, specification=max(_SYSTEMS), opsets=known)
        return
    systems = _SYSTEMS[max(needed, min(_SYSTEMS))]
    older = [
        f"{system} {least}"
        for system, least in deployment.items()
        if Version(least) < Version(systems.get(system, "0"))
    ]
    if older:
        got = f"specification {needed}, which needs {', '.join(map(' '.join, systems.items()))}"
        yield finding("deployment-target", where, got, systems=", ".join(older))
    elif program.specification_version < needed:
        got = f"{program.specification_version} for opset {listed(opsets)}"
        yield finding("specification-version", where, got, needed=needed)
    oldest = ", ".join(map(" ".join, deployment.items()))
    subject.checked.append(
        f"{name}: specification {needed} (iOS {systems['iOS']}); the app's oldest systems are {oldest}"
    )


def _check_weights(subject: Subject, name: str, program: Program) -> Steps[None]:
    """Every tensor that the program refers to is in its weight file, whole and finite."""
    count, infinite = 0, []
    try:
        for label, constant, raw in stored_tensors(program):
            count += 1
            if not is_finite(raw, constant.type.dtype):
                infinite.append(label)
    except MILError as error:
        yield finding("package-weights", name, _without_path(error, subject))
        return
    if infinite:
        yield finding("weight-value", f"{name}: {listed(infinite)}", "NaN or infinite values")
    subject.checked.append(f"{name}: {count} tensors in its weight file")


def _without_path(error: MILError, subject: Subject) -> str:
    """The message with names relative to the artefact."""
    return str(error).replace(f"{subject.folder}/", "")
