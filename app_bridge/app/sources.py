"""What an app expects of a model, read from its Swift sources and its project file; nothing is taken from the table."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tree_sitter import Node

from app_bridge.app import packages
from app_bridge.app.facts import AppFacts, Key
from app_bridge.app.project import Project, read_text
from app_bridge.app.swift import (
    SIDES,
    Unclear,
    argument,
    arguments,
    called,
    child,
    is_subscript,
    last_name,
    outwards,
    peel,
    result_of,
    text,
    walk,
)
from app_bridge.app.swift_codable import Record, keys, record
from app_bridge.app.swift_modules import Modules
from app_bridge.app.swift_program import Program
from app_bridge.app.swift_prompt import image_tokens, prompt
from fastvlm.common.errors import UserError

_DTYPES = {".float32": "float32", ".float": "float32", ".float16": "float16", ".double": "float64", ".int32": "int32"}


def read(app: Path) -> AppFacts:
    """The facts of the app in a folder (ml-fastvlm's `app/`). UserError naming every fact that can't be read."""
    project = Project(app)
    faults: list[str] = []
    sources = {}
    for path in _or_faults(project.swift_files, faults) or ():
        try:
            sources[path] = read_text(app, path).encode()
        except UserError as error:
            faults.append(str(error))
    reader = Reader(Program(sources), project)
    if not (faults or reader.program.calls("registerModelType", "registerProcessorType", "prediction")):
        raise UserError(
            f"{app}: none of its project's {len(sources)} Swift files defines the model (registerModelType)"
        )
    values: dict[str, Any] = {}
    for part in (
        reader.core_ml,
        reader.configuration,
        reader.preprocessor,
        lambda: prompt(reader.program),
        lambda: image_tokens(reader.program),
        reader.bundle,
        reader.cache_limit,
        reader.max_tokens,
        lambda: {"api": packages.used(reader.program.mentioned())},
    ):
        values |= _or_faults(part, faults) or {}
    faults += [f"syntax: {fault}" for fault in reader.program.faults(everywhere=bool(faults))]
    folder = values.get("model_folder")
    for part in (
        lambda: {"deployment": project.deployment(folder)},
        lambda: {"packages": project.packages()},
        lambda: {"increased_memory_limit": project.increased_memory_limit()},
    ):
        values |= _or_faults(part, faults) or {}
    if faults:
        raise UserError(f"{app}: not understood: {'; '.join(dict.fromkeys(faults))}")
    return AppFacts(**values)


def differences(read: AppFacts, table: AppFacts) -> list[str]:
    """One line a fact, or a field of a key, module or package, that differs: what, as read, as in the table."""
    found = []
    for name in (field.name for field in fields(AppFacts)):
        ours, theirs = getattr(read, name), getattr(table, name)
        if name == "api":  # without what both have
            ours, theirs = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
        here, there = _entries(name, ours), _entries(name, theirs)
        for entry in sorted({*here, *there}):
            if here.get(entry) != there.get(entry):
                found += _lines(entry, here.get(entry), there.get(entry))
    return found


def _entries(name: str, value: Any) -> dict[str, Any]:
    """A fact, or its parts where it has many."""
    if name == "deployment":
        return {f"{name} {key}": each for key, each in value.items()}
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return {f"{name} {getattr(each, 'path', None) or each.name}": each for each in value}
    return {name: value}


def _lines(entry: str, ours: Any, theirs: Any) -> list[str]:
    if is_dataclass(ours) and is_dataclass(theirs):
        pairs = ((f"{entry}: {field}", value, vars(theirs)[field]) for field, value in vars(ours).items())
        return [line for pair in pairs if pair[1] != pair[2] for line in _lines(*pair)]
    said = (
        "nothing" if value is None else "it" if is_dataclass(value) else json.dumps(value, ensure_ascii=False)
        for value in (ours, theirs)
    )
    return ["{}: the app has {}, the table {}".format(entry, *said)]


def _or_faults(part: Callable[[], Any], faults: list[str]) -> Any:
    try:
        return part()
    except Unclear as error:
        faults.append(str(error))
    except RecursionError:
        faults.append(f"{getattr(part, '__name__', 'the project')}: Swift sources: got a type that holds itself")
    return None


class Reader:
    """One method a group of facts; each raises Unclear for the first one that it can't read."""

    def __init__(self, program: Program, project: Project) -> None:
        self.program, self.project = program, project

    def core_ml(self) -> dict[str, Any]:
        """The class that `prediction(…)` is called on, what goes in, and what is demanded of what comes out."""
        call = self.program.one(
            "the Core ML call", [c for c in self.program.calls("prediction") if _features(c)], "prediction(name: array)"
        )
        ((name, given),) = _features(call)
        array = self.program.trace(given)
        made = called_or_none(array) == "MLMultiArray"
        shape, dtype = (argument(array, label) if made else None for label in ("shape", "dataType"))
        if shape is None or dtype is None:
            raise self.program.unclear(f"the input {name}", array, "MLMultiArray(…, shape: […], dataType: …)")
        output, wanted = self._demanded(call, "shape")
        demanded = self._shape(wanted, "the output's shape", 3)
        self._copied(call, demanded)
        _, wanted_dtype = self._demanded(call, "dataType")
        return {
            "model_class": self._model_class(call),
            "input_name": name,
            "input_shape": self._shape(shape, "the input's shape", 4),
            "input_dtype": self._dtype(dtype, "the input's type"),
            "output_name": output,
            "output_shape": demanded,
            "output_dtype": self._dtype(wanted_dtype, "the output's type"),
        }

    def _model_class(self, call: Node) -> str:
        receiver = peel(child(call.children[0], "target"))
        name = self.program.type_of(receiver)
        if not name or self.program.type_named(name, call) or not self.program.calls(name):
            raise self.program.unclear(
                "the Core ML class", receiver, "a value of a class that Xcode makes and the app constructs"
            )
        return name

    def _demanded(self, call: Node, of: str) -> tuple[str, Node]:
        """(the output's name, its `shape` or `dataType`) of `output.name.shape == …`, output being the call's value."""
        found = {}
        for kind in ("equality_expression", "infix_expression"):
            for node in self.program.nodes(kind):
                for side, other in (SIDES, SIDES[::-1]):
                    left = node.child_by_field_name(side)
                    if left is None or left.type != "navigation_expression" or last_name(left) != of:
                        continue
                    output = self.program.trace(child(left, "target"))
                    if output.type == "navigation_expression" and self.program.trace(child(output, "target")) == call:
                        found[last_name(output), text(child(node, other))] = child(node, other)
        if len(found) != 1:
            raise self.program.unclear(
                f"the output's {of}", call, f"one precondition(output.name.{of} == …) on its result, got {len(found)}"
            )
        (((name, _), value),) = found.items()
        return name, value

    def _copied(self, call: Node, shape: tuple[int | None, ...]) -> None:
        """Where the output is copied into an MLXArray with a list for its shape, that is the same one."""
        function = next((n for n in outwards(call) if n.type == "function_declaration"), call)
        for node in (n for n in walk(function) if called_or_none(n) == "MLXArray"):
            for listed in (value for _, value in arguments(node) if value.type == "array_literal"):
                if self._shape(listed, "the output's shape", len(shape)) != shape:
                    raise self.program.unclear(
                        "the output's shape", listed, f"{list(shape)}, as demanded of the output"
                    )

    def _shape(self, node: Node, what: str, rank: int) -> tuple[int | None, ...]:
        listed = self.program.trace(node)
        lengths = listed.children_by_field_name("element") if listed.type == "array_literal" else []
        if len(lengths) != rank:
            raise self.program.unclear(what, node, f"a list of {rank}")
        return tuple(map(self._length, lengths))

    def _length(self, node: Node) -> int | None:
        """None for what isn't a constant: any size."""
        try:
            return self.program.integer(node, "a length")
        except Unclear:
            return None

    def _dtype(self, node: Node, what: str) -> str:
        said = text(self.program.trace(node))
        said = said[said.rfind(".") :]
        if said not in _DTYPES:
            raise self.program.unclear(what, node, f"one of {', '.join(_DTYPES)}")
        return _DTYPES[said]

    def configuration(self) -> dict[str, Any]:
        """The model's registration, its keys in config.json and its modules."""
        name, decoded, made = self._registered("registerModelType", "the model type")
        tree = Modules(self.program)
        tree.root(made, decoded)
        self._unsanitized(made)
        found = _by_path([*keys(decoded), *tree.fatal])
        paths = [layer.path for layer in tree.layers]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise Unclear(f"the modules: Swift sources: got {twice[0]} {len(twice)} times, expected once")
        return {
            "model_type": name,
            "config": found,
            "layers": tuple(sorted(tree.layers, key=lambda layer: layer.path)),
        }

    def preprocessor(self) -> dict[str, Any]:
        """The processor's registration, and its keys in preprocessor_config.json."""
        name, decoded, _ = self._registered("registerProcessorType", "the processor's class")
        return {"processor_class": name, "preprocessor": _by_path(list(keys(decoded)))}

    def _registered(self, function: str, what: str) -> tuple[str, Record, Node]:
        """(the string, the struct that is decoded, the constructor call) of a factory's registration."""
        call = self.program.one(what, self.program.calls(function), f"{function}(…)")
        given = arguments(call)
        name = self.program.words(given[0][1], what) if given else None
        types = [
            text(child(n, "target")) for n in walk(call) if n.type == "navigation_expression" and last_name(n) == "self"
        ]
        structs = [self.program.type_named(type_, call) for type_ in types]
        closure = next((n for n in walk(call) if n.type == "lambda_literal"), None)
        calls = [n for n in walk(closure) if n.type == "call_expression"] if closure else []
        made = [
            n
            for n in calls
            if n.children[0].type == "simple_identifier" and self.program.type_named(text(n.children[0]), n)
        ]
        strategy = next((n for n in self.program.nodes("simple_identifier") if text(n) == "keyDecodingStrategy"), None)
        if strategy is not None:
            raise self.program.unclear("decoding", strategy, "JSONDecoder's own strategy")
        if name is None or len(structs) != 1 or structs[0] is None or len(made) != 1:
            raise self.program.unclear(what, call, f"{function}(a string) {{ decode(T.self, …); return M(…) }}")
        return name, record(self.program, structs[0]), made[0]

    def _unsanitized(self, made: Node) -> None:
        """The model's `sanitize(weights:)`, if it has one, gives back what it was given."""
        declared = self.program.type_named(text(made.children[0]), made)
        for member in self.program.members(declared) if declared else ():
            if member.type == "function_declaration" and text(child(member, "name")) == "sanitize":
                parameter = next((n for n in member.named_children if n.type == "parameter"), None)
                name = text(child(parameter, "name")) if parameter else ""
                only = result_of(child(member, "body"))
                returned = [text(n) for n in walk(member) if n.type == "control_transfer_statement"]
                if (returned != [f"return {name}"] and (only is None or text(only) != name)) or any(
                    text(child(n, "target")).startswith(name) for n in walk(member) if n.type == "assignment"
                ):
                    raise self.program.unclear("the weights' names", member, "sanitize(weights:) that changes nothing")

    def bundle(self) -> dict[str, Any]:
        """The resource by which the app finds its model, and the folder that becomes its bundle."""
        calls = [c for c in self.program.calls("url") if argument(c, "forResource") and argument(c, "withExtension")]
        near = [
            c
            for c in calls
            if any("ModelConfiguration" in text(n) for n in outwards(c) if n.type == "property_declaration")
        ]
        call = self.program.one("the bundle's resource", near or calls, "bundle.url(forResource:withExtension:)")
        said = [self.program.words(value, "the bundle's resource") for _, value in arguments(call)[:2]]
        bundle = self.program.trace(child(call.children[0], "target"))
        path = None
        if text(bundle) != "Bundle.main":
            type_ = argument(bundle, "for") if called_or_none(bundle) == "Bundle" else None
            declared = self.program.type_named(text(type_).removesuffix(".self"), call) if type_ else None
            if declared is None:
                raise self.program.unclear("the bundle", bundle, "Bundle.main or Bundle(for: a class of the app's)")
            path = self.program.path(declared)
        return {"bundle_resource": ".".join(said), "model_folder": self.project.model_folder(path)}

    def cache_limit(self) -> dict[str, Any]:
        """`GPU.set(cacheLimit: bytes)` or `Memory.cacheLimit = bytes`."""
        found = [value for call in self.program.calls("set") if (value := argument(call, "cacheLimit"))]
        found += [
            child(n, "result")
            for n in self.program.nodes("assignment")
            if text(child(n, "target")).endswith(".cacheLimit")
        ]
        node = self.program.one("the cache limit", found, "GPU.set(cacheLimit: …)")
        return {"cache_limit": self.program.integer(node, "the cache limit")}

    def max_tokens(self) -> dict[str, Any]:
        """`GenerateParameters(maxTokens: n)`, or `if tokens.count >= n { return .stop }`."""
        calls = self.program.calls("GenerateParameters")
        found = [value for call in calls if (value := argument(call, "maxTokens"))]
        for node in () if found else self.program.nodes("if_statement"):
            condition = node.child_by_field_name("condition")
            stops = any(text(n) == ".stop" for n in walk(node) if n.type == "prefix_expression")
            if (
                stops
                and condition is not None
                and condition.type in ("infix_expression", "comparison_expression")
                and text(child(condition, "op")) == ">="
            ):
                found.append(child(condition, "rhs"))
        node = self.program.one("the most tokens of an answer", found, "if tokens.count >= n { return .stop }")
        return {"max_tokens": self.program.integer(node, "the most tokens of an answer")}


def called_or_none(node: Node) -> str:
    """What is called, if the node is a call."""
    return called(node) if node.type == "call_expression" and not is_subscript(node) else ""


def _features(call: Node) -> list[tuple[str, Node]]:
    """[(name, array)] of a prediction with one feature; [] of others, such as prediction(from:)."""
    given = arguments(call)
    one = len(given) == 1 and call.children[0].type == "navigation_expression"
    return [(label, value) for label, value in given if label not in (None, "from", "input")] if one else []


def _by_path(found: list[Key]) -> tuple[Key, ...]:
    """Each key once. Unclear for one that two structs decode differently."""
    merged: dict[str, Key] = {}
    for key in found:
        if merged.setdefault(key.path, key) != key:
            one, other = (
                f"{each.type}{'' if each.required else f'? (default {each.default})'}"
                for each in (merged[key.path], key)
            )
            raise Unclear(f"{key.path}: decoded as {one} and as {other}, expected one type")
    return tuple(merged[path] for path in sorted(merged))
