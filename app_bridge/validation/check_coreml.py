"""The Core ML package, against the class that Xcode makes of it and what the app's code does with that."""

from collections.abc import Iterator, Mapping
from typing import Any

from app_bridge.validation.finite import is_finite
from app_bridge.validation.subject import NUMBERS, Encoder, Subject, error_at, listed, warn_at
from fastvlm.common.findings import Steps
from model_export import contract
from model_export.mil import MILError, read_package
from model_export.mil.blob import WeightFile
from model_export.mil.program import BlobRef, Block, Constant, Function, Program, TensorType

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
    """Check the package alone; return its interface, None if there is no package to speak of."""
    name = subject.facts.model_class + _SUFFIX
    path = subject.folder / name
    if not path.exists():
        others = listed(sorted(one.name for one in subject.folder.glob(f"*{_SUFFIX}")))
        expected = f"{name}: the app uses a class {subject.facts.model_class}"
        if others:
            remedy = "rename it: Xcode names the class after the package"
            yield error_at("package-name", f"{others} in place of {name}", others, expected, remedy)
        else:
            yield error_at("file-missing", name, "no Core ML package", expected, "export both halves with `all`")
        return None
    try:
        program = read_package(path)
    except MILError as error:
        got = _without_path(error, subject)
        yield error_at("package-unreadable", name, got, "an ML program that Core ML can compile")
        return None
    yield from _check_weights(subject, name, program)
    yield from _check_deployment(subject, name, program)
    # the function that the app is meant to get
    default = program.functions.get(program.default_function)
    function = program.functions.get(contract.MAIN, default)
    if default is None or default is not function:
        got = f"{program.default_function!r} of {listed(sorted(program.functions))}"
        remedy = "export again, or have the app name the function"
        expected = f"{contract.MAIN!r}: the app names none"
        yield error_at("default-function", f"{name}: default function", got, expected, remedy)
    function = function or next(iter(program.functions.values()))
    if unknown := _unknown(function):
        expected = "operations that are known here: Core ML may refuse to compile the package"
        yield warn_at("operation-unknown", f"{name}: {function.opset}", listed(unknown), expected)
    return (yield from _check_interface(subject, name, function))


def _unknown(function: Function) -> list[str]:
    """The operations that this project doesn't know in this opset."""
    types = {operation.type for operation in function.block.operations} - KNOWN
    if not types:
        return []
    # torch: two seconds
    import model_export.mil.ops  # noqa: F401 (registers what `lookup` finds)
    from model_export.mil.registry import OPSETS, lookup

    return sorted(one for one in types if function.opset in OPSETS and lookup(one, function.opset) is None)


def _check_interface(subject: Subject, name: str, function: Function) -> Steps[Encoder]:
    """Names, types, ranks and shapes, and how they fit together; one finding a feature at most."""
    facts, others = subject.facts, function.other_features
    wanted = (facts.input_name, facts.input_dtype, facts.input_shape)
    taken = yield from _feature(name, "input", function.described_inputs, others, wanted)
    wanted = (facts.output_name, facts.output_dtype, facts.output_shape)
    given = yield from _feature(name, "output", function.described_outputs, others, wanted)
    required = sorted({item.name for item in function.inputs} - {facts.input_name})
    if taken and required:
        got, remedy = f"{listed(required)} besides {facts.input_name}", "give the app's call the further arguments"
        expected = f"{facts.input_name} alone"
        yield error_at("input-extra", f"{name}: inputs", got, expected, f"export again, or {remedy}")
    side = taken[2] if taken and taken[2] == taken[3] else None
    if taken and side is None:
        yield error_at("input-shape", f"{name}: input {facts.input_name}", str(list(taken)), "a square picture")
    tokens, channels = (given[1], given[2]) if given else (None, None)
    if side and tokens and not (yield from _check_tokens(subject, name, side, tokens)):
        return Encoder()
    if side and given:
        yield from _check_described(subject, name, function)
    subject.checked.append(f"{name}: {function.name}, {function.opset}, {facts.input_name} -> {facts.output_name}")
    return Encoder(side, tokens, channels)


def _check_described(subject: Subject, name: str, function: Function) -> Steps[None]:
    """The description, which Xcode makes the class of, says of the program what is so."""
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
            yield error_at("package-description", f"{name}: {side} {feature}", got, "the same in both")


def _check_tokens(subject: Subject, name: str, side: int, tokens: int) -> Steps[bool]:
    """Return whether the package gives as many image tokens as FastViTHD; the app's prompt has to have as many, too."""
    facts, expected = subject.facts, contract.tokens_per_image(side)
    if expected != tokens:
        got = f"{tokens} image tokens for {side} x {side} pixels"
        each = f"{expected}, one for {contract.PATCH_SIZE} x {contract.PATCH_SIZE}"
        yield error_at("encoder-tokens", f"{name}: output {facts.output_name}", got, each)
        return False
    inserted = (side // facts.patch_size) ** 2 + facts.additional_image_tokens
    if inserted != tokens:
        got = f"{inserted} image tokens for {side} x {side} pixels"
        remedy = "change the app's patch size and number of additional tokens to the model's"
        yield error_at("prompt-tokens", "the app's prompt", got, f"{tokens}, which {name} gives", remedy)
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
        yield error_at(f"{side}-kind", where, others[feature], "a multi-array")
        return None
    if feature not in arrays:
        got = listed(sorted(arrays)) or listed(sorted(others)) or "none"
        yield error_at(f"{side}-name", f"{name}: {side}s", got, feature, "export again, or change the app's call")
        return None
    got_dtype, got_shape = _FLOATS.get(arrays[feature].dtype, arrays[feature].dtype), arrays[feature].shape
    if got_dtype != dtype:
        yield error_at(f"{side}-dtype", where, got_dtype, dtype)
    elif len(got_shape) != len(shape):
        got = f"{len(got_shape)} dimensions, {list(got_shape)}"
        yield error_at(f"{side}-rank", where, got, f"{len(shape)}, {expected}")
    elif any(size is None for size in got_shape):
        yield error_at(f"{side}-shape", where, "a flexible shape", expected)
    elif any(want not in (None, size) for size, want in zip(got_shape, shape, strict=True)):
        remedy = (
            "export a checkpoint or resolution (--image-size) that gives this shape,"
            f" or change the app's lines that name {expected}, and give --app"
        )
        yield error_at(f"{side}-shape", where, str(list(got_shape)), f"{expected}, which the app requires", remedy)
    else:
        return tuple(size for size in got_shape if size is not None)
    return None


def _check_deployment(subject: Subject, name: str, program: Program) -> Steps[None]:
    """The oldest systems that run the package, against the oldest that the app is for."""
    opsets = sorted({function.opset for function in program.functions.values()})
    needed = max([program.specification_version, *(_OPSETS.get(one, 0) for one in opsets)])
    where, deployment = f"{name}: specification version", subject.facts.deployment
    if not {*opsets} <= {*_OPSETS} or needed > max(_SYSTEMS):
        known = f"specification {max(_SYSTEMS)} or older, opset {listed(sorted(_OPSETS), 9)}"
        got = f"specification {needed}, opset {listed(opsets)}"
        yield error_at("deployment-target", where, got, known, "export for an older target")
        return
    systems = _SYSTEMS[max(needed, min(_SYSTEMS))]
    older = [
        f"{system} {least}"
        for system, least in deployment.items()
        if _version(least) < _version(systems.get(system, "0"))
    ]
    if older:
        got = f"specification {needed}, which needs {', '.join(map(' '.join, systems.items()))}"
        lowest = "the lowest deployment target of the app and of the target with the model"
        remedy = "export with an older --minimum-deployment-target, or raise the app's"
        yield error_at("deployment-target", where, got, f"one for {', '.join(older)}, {lowest}", remedy)
    elif program.specification_version < needed:
        got = f"{program.specification_version} for opset {listed(opsets)}"
        yield error_at("specification-version", where, got, f"{needed} or newer")
    subject.checked.append(f"{name}: specification {needed} for {', '.join(map(' '.join, deployment.items()))}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _check_weights(subject: Subject, name: str, program: Program) -> Steps[None]:
    """Every tensor that the program refers to is in its weight file, whole and finite."""
    files: dict[Any, WeightFile] = {}
    count, infinite = 0, []
    try:
        for function in program.functions.values():
            for label, constant in _constants(function.block):
                if isinstance(constant.data, BlobRef):
                    if constant.data.file not in files:
                        files[constant.data.file] = WeightFile(constant.data.file)
                    raw = files[constant.data.file].raw(constant.data.offset, constant.type)
                    if not is_finite(raw, constant.type.dtype):
                        infinite.append(label)
                    count += 1
    except MILError as error:
        expected = "a weight file with every tensor of the program"
        yield error_at("package-weights", name, _without_path(error, subject), expected)
        return
    if infinite:
        yield error_at("weight-value", f"{name}: {listed(infinite)}", "NaN or infinite values", NUMBERS)
    subject.checked.append(f"{name}: {count} stored tensors")


def _constants(block: Block) -> Iterator[tuple[str, Constant]]:
    """Each with the name of its operation."""
    for operation in block.operations:
        given = (*operation.attributes.values(), *(item for items in operation.inputs.values() for item in items))
        yield from ((operation.name, item) for item in given if isinstance(item, Constant))
        for inner in operation.blocks:
            yield from _constants(inner)


def _without_path(error: MILError, subject: Subject) -> str:
    """The message with names relative to the artefact."""
    return str(error).replace(f"{subject.folder}/", "")
