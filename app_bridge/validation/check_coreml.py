"""The Core ML package, against the class that Xcode makes of it and what the app's code does with that."""

from collections.abc import Iterator, Mapping
from typing import Any

from app_bridge.subject import NUMBERS, Encoder, Subject, is_finite, listed
from model_export import contract
from model_export.mil import MILError, read_package
from model_export.mil.blob import WeightFile
from model_export.mil.program import BlobRef, Block, Constant, Function, Program, TensorType
from model_export.mil.registry import OPSETS, lookup

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
_OPSETS = {"CoreML5": 6, "CoreML6": 7, "CoreML7": 8, "CoreML8": 9, "CoreML9": 10}


def check_package(subject: Subject) -> Encoder | None:
    """Everything about the package alone; None if there is none to speak of."""
    name = subject.facts.model_class + _SUFFIX
    path = subject.folder / name
    if not path.exists():
        others = sorted(one.name for one in subject.folder.glob(f"*{_SUFFIX}"))
        rule, got = ("package-name", listed(others)) if others else ("file-missing", "no Core ML package")
        remedy = "rename it: Xcode names the class after the package" if others else "export both halves with `all`"
        where = f"{listed(others)} in place of {name}" if others else name
        subject.error(rule, where, got, f"{name}: the app uses a class {subject.facts.model_class}", remedy)
        return None
    try:
        program = read_package(path)
    except MILError as error:
        subject.error(
            "package-unreadable", name, _without_path(error, subject), "an ML program that Core ML can compile"
        )
        return None
    _check_weights(subject, name, program)
    _check_deployment(subject, name, program)
    function = _main(subject, name, program)
    _check_operations(subject, name, function)
    return _check_interface(subject, name, function)


def _main(subject: Subject, name: str, program: Program) -> Function:
    """The function that the app is meant to get."""
    default = program.functions.get(program.default_function)
    meant = program.functions.get(contract.MAIN, default)
    if default is None or default is not meant:
        subject.error(
            "default-function",
            f"{name}: default function",
            f"{program.default_function!r} of {listed(sorted(program.functions))}",
            f"{contract.MAIN!r}: the app names none",
            "export again, or have the app name the function",
        )
    return meant or next(iter(program.functions.values()))


def _check_interface(subject: Subject, name: str, function: Function) -> Encoder:
    """Names, types, ranks and shapes, and how they fit together; one finding a feature at most."""
    facts, others = subject.facts, function.other_features
    wanted = (facts.input_name, facts.input_dtype, facts.input_shape)
    taken = _feature(subject, name, "input", function.described_inputs, others, wanted)
    wanted = (facts.output_name, facts.output_dtype, facts.output_shape)
    given = _feature(subject, name, "output", function.described_outputs, others, wanted)
    required = sorted({item.name for item in function.inputs} - {facts.input_name})
    if taken and required:
        subject.error(
            "input-extra",
            f"{name}: inputs",
            f"{listed(required)} besides {facts.input_name}",
            f"{facts.input_name} alone",
            "export again, or give the app's call the further arguments",
        )
    side = taken[2] if taken and taken[2] == taken[3] else None
    if taken and side is None:
        subject.error("input-shape", f"{name}: input {facts.input_name}", str(list(taken)), "a square picture")
    tokens, channels = (given[1], given[2]) if given else (None, None)
    if side and tokens and not _check_tokens(subject, name, side, tokens):
        return Encoder()
    if side and given:
        _check_described(subject, name, function)
    subject.checked.append(f"{name}: {function.name}, {function.opset}, {facts.input_name} -> {facts.output_name}")
    return Encoder(side, tokens, channels)


def _check_described(subject: Subject, name: str, function: Function) -> None:
    """The description, which Xcode makes the class of, says of the program what is so."""
    made = (item for operation in function.block.operations for item in operation.outputs)
    own = {
        "input": {item.name: item.type for item in function.inputs},
        "output": {item.name: item.type for item in made if item.name in function.block.outputs},
    }
    described = {"input": function.described_inputs, "output": function.described_outputs}
    for side, feature in (("input", subject.facts.input_name), ("output", subject.facts.output_name)):
        said, found = described[side][feature], own[side].get(feature)
        sizes = tuple(size or 0 for size in said.shape)  # the app's: none is flexible
        if found is None or found.dtype != said.dtype or not found.accepts(sizes):
            got = f"{said} in the description, {found or 'nothing'} in the program"
            subject.error("package-description", f"{name}: {side} {feature}", got, "the same in both")


def _check_operations(subject: Subject, name: str, function: Function) -> None:
    """Operations that this project has never seen in this opset."""
    types = {operation.type for operation in function.block.operations} - {"const"}
    unknown = sorted(one for one in types if function.opset in OPSETS and lookup(one, function.opset) is None)
    if unknown:
        subject.warning(
            "operation-unknown",
            f"{name}: {function.opset}",
            listed(unknown),
            "operations that are known here: Core ML may refuse to compile the package",
        )


def _check_tokens(subject: Subject, name: str, side: int, tokens: int) -> bool:
    """Whether the package gives as many image tokens as FastViTHD; the app's prompt has to have as many, too."""
    facts, expected = subject.facts, contract.tokens_per_image(side)
    if expected != tokens:
        got = f"{tokens} image tokens for {side} x {side} pixels"
        each = f"{expected}, one for {contract.PATCH_SIZE} x {contract.PATCH_SIZE}"
        subject.error("encoder-tokens", f"{name}: output {facts.output_name}", got, each)
        return False
    inserted = (side // facts.patch_size) ** 2 + facts.additional_image_tokens
    if inserted != tokens:
        got = f"{inserted} image tokens for {side} x {side} pixels"
        remedy = "change the app's patch size and number of additional tokens to the model's"
        subject.error("prompt-tokens", "the app's prompt", got, f"{tokens}, which {name} gives", remedy)
    return True


def _feature(
    subject: Subject,
    name: str,
    side: str,
    arrays: Mapping[str, TensorType],
    others: Mapping[str, str],
    wanted: tuple[str, str, tuple[int | None, ...]],
) -> tuple[int, ...] | None:
    """The shape of an input or output that is as the app has it; None after its (first) finding."""
    feature, dtype, shape = wanted
    where = f"{name}: {side} {feature}"
    if feature in others:
        subject.error(f"{side}-kind", where, others[feature], "a multi-array")
        return None
    if feature not in arrays:
        got = listed(sorted(arrays)) or listed(sorted(others)) or "none"
        subject.error(f"{side}-name", f"{name}: {side}s", got, feature, "export again, or change the app's call")
        return None
    type = arrays[feature]
    got_dtype, got_shape = _FLOATS.get(type.dtype, type.dtype), type.shape
    if got_dtype != dtype:
        subject.error(f"{side}-dtype", where, got_dtype, dtype)
    elif len(got_shape) != len(shape):
        subject.error(
            f"{side}-rank", where, f"{len(got_shape)} dimensions, {list(got_shape)}", f"{len(shape)}, {_said(shape)}"
        )
    elif any(size is None for size in got_shape):
        subject.error(f"{side}-shape", where, "a flexible shape", _said(shape))
    elif any(want not in (None, size) for size, want in zip(got_shape, shape, strict=True)):
        remedy = (
            "export a checkpoint or resolution (--image-size) that gives this shape,"
            f" or change the app's lines that name {_said(shape)}, and give --app"
        )
        subject.error(f"{side}-shape", where, str(list(got_shape)), f"{_said(shape)}, which the app requires", remedy)
    else:
        return tuple(size for size in got_shape if size is not None)
    return None


def _said(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _check_deployment(subject: Subject, name: str, program: Program) -> None:
    """The oldest systems that run the package, against the oldest that the app is for."""
    opsets = {function.opset for function in program.functions.values()}
    unknown = sorted(opsets - set(_OPSETS))
    needed = max([program.specification_version, *(_OPSETS[one] for one in opsets if one in _OPSETS)])
    if unknown or needed > max(_SYSTEMS):
        known = f"specification {max(_SYSTEMS)} or older, opset {listed(sorted(_OPSETS), 9)}"
        got = f"specification {needed}, opset {listed(sorted(opsets))}"
        subject.error("deployment-target", f"{name}: specification version", got, known, "export for an older target")
        return
    systems = _SYSTEMS[max(needed, min(_SYSTEMS))]
    older = [
        f"{system} {least}"
        for system, least in subject.facts.deployment.items()
        if _version(least) < _version(systems.get(system, "0"))
    ]
    if older:
        got = (
            f"specification {needed}, which needs {', '.join(f'{system} {least}' for system, least in systems.items())}"
        )
        subject.error(
            "deployment-target",
            f"{name}: specification version",
            got,
            f"one for {', '.join(older)}, the lowest deployment target of the app and of the target with the model",
            "export with an older --minimum-deployment-target, or raise the app's",
        )
    elif program.specification_version < needed:
        got = f"{program.specification_version} for opset {listed(sorted(opsets))}"
        subject.error("specification-version", f"{name}: specification version", got, f"{needed} or newer")
    subject.checked.append(
        f"{name}: specification {needed} for {', '.join(f'{k} {v}' for k, v in subject.facts.deployment.items())}"
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _check_weights(subject: Subject, name: str, program: Program) -> None:
    """Every tensor that the program refers to is in its weight file, whole and finite."""
    files: dict[Any, WeightFile] = {}
    count, infinite = 0, []
    try:
        for function in program.functions.values():
            for label, constant in _constants(function.block):
                if isinstance(constant.data, BlobRef):
                    if constant.data.file not in files:
                        files[constant.data.file] = WeightFile(constant.data.file)
                    values = files[constant.data.file].read(constant.data.offset, constant.type)
                    if values.is_floating_point() and not is_finite(values):
                        infinite.append(label)
                    count += 1
    except MILError as error:
        subject.error(
            "package-weights", name, _without_path(error, subject), "a weight file with every tensor of the program"
        )
        return
    if infinite:
        subject.error("weight-value", f"{name}: {listed(infinite)}", "NaN or infinite values", NUMBERS)
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
