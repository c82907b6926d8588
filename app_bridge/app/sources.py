"""An app's expectations of a model, read from its Swift sources and its project file.

Plain facts (keys, types, names, numbers, strings) are read by the queries of facts.scm. What they mean rests on the
declarations around them, which are compared with those of the published app by fingerprint (published.json): where one
differs, nothing is concluded from it, and the facts that rest on it are the table's, marked as unverified.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tree_sitter import Node

from app_bridge.app import packages
from app_bridge.app.facts import AppFacts, Changed, Key, arithmetic, table
from app_bridge.app.project import Project, Unclear, read_text
from app_bridge.app.swift import Member, Program, enclosing_type, fingerprint, string, text, walk
from fastvlm.common.errors import UserError

PUBLISHED = Path(__file__).parent / "published.json"

_DTYPES = {"float32": "float32", "float": "float32", "float16": "float16", "double": "float64", "int32": "int32"}
_NOWHERE = "Swift sources"  # where something that is missing would be
_DEFINING = ("model_type", "processor_class", "input_name")  # an app without any of these has no model


@cache
def published() -> dict[str, Any]:
    """The published app's declarations: published.json, whose "about" says what its entries mean."""
    document: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return document


def read(app: Path) -> AppFacts:
    """Read the facts of an app.

    Args:
        app: the folder that holds the .xcodeproj, `app/` of ml-fastvlm.

    Returns:
        The facts; `changed` has every declaration that differs from the published app's.

    Raises:
        UserError: for what is no app of ours, with everything in its project that can't be read.
    """
    project = Project(app)
    faults: list[str] = []
    swift: dict[str, bytes] = {}

    def of_project(what: str, part: Callable[[], Any]) -> Any:
        """Read a part of the project; None, and a fault, where a reference leads nowhere or to something else."""
        try:
            return part()
        except Unclear as error:
            faults.append(str(error))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            faults.append(f"{what}: {project.file}: a wrong reference ({type(error).__name__}: {error})")
        return None

    for path in of_project("Swift files", project.swift_files) or ():
        try:
            swift[path] = read_text(app, path).encode()
        except UserError as error:
            faults.append(str(error))
    reading = Reading(Program(swift), published())
    if not faults and not any(reading.captures[name] for name in _DEFINING):
        raise UserError(f"{app}: none of its project's {len(swift)} Swift files defines the model (registerModelType)")
    values: dict[str, Any] = reading.facts()
    folder = of_project("model folder", lambda: project.model_folder(reading.bundle_source()))
    values |= {
        "model_folder": folder,
        "deployment": of_project("deployment", lambda: project.deployment(folder)),
        "packages": of_project("packages", project.packages),
        "increased_memory_limit": of_project("increased memory limit", project.increased_memory_limit),
    }
    if faults:
        raise UserError(f"{app}: not understood: {'; '.join(dict.fromkeys(faults))}")
    return replace(table(), **values, changed=tuple(reading.compare()))


class Reading:
    """An app's sources beside the published declarations.

    Args:
        program: the app's sources.
        published: as of published.json.
        known: our table, of the dataclass that has the facts; None: of the app.
    """

    def __init__(self, program: Program, published: Mapping[str, Any], known: Any = None) -> None:
        self.program, self.published = program, published
        self.table: Any = known or table()
        self.captures = {name: self._in_scope(name, nodes) for name, nodes in program.captures().items()}
        self._changed: list[Changed] = []
        self._masked: dict[int, str] = {}  # plain facts, which a fingerprint leaves out
        self._names: dict[str, str] = {}

    def facts(self) -> dict[str, Any]:
        """Field of AppFacts -> value, of those that the sources decide."""
        values = {
            name: self._plain(name, getattr(self.table, name)) for name in self.captures if hasattr(self.table, name)
        }
        for name, expected in self.published["names"].items():
            if self._plain(name, expected or "") != (expected or ""):
                self._differs(self.captures[name][0], name, [name])
        for declared in self.program.types.get(values["model_class"], ()):  # Xcode makes it, of the package
            self._differs(declared, values["model_class"], ["model_class"])
        self._names = {values[name]: name for name in ("model_class", "input_name", "output_name")}
        renamed: dict[str, str] = {}
        for name in ("config", "preprocessor"):
            values[name] = self._keys(name, renamed)
        values["layers"] = self._layers(renamed)
        return values | {"api": packages.used(self.program.mentioned())}

    def bundle_source(self) -> str | None:
        """The file of the class whose bundle has the model; None for the application's own bundle."""
        names = {text(node) for node in self.captures["bundle_class"]}
        declared = self.program.types.get(names.pop() if len(names) == 1 else "", ())
        return self.program.path(declared[0]) if declared else None

    def compare(self) -> list[Changed]:
        """Everything that differs from the published declarations; ask for `facts` first."""
        fingerprints = self.fingerprints()
        for name, entry in self.published["types"].items():
            declared, ours = self.program.types.get(name, []), fingerprints.get(name, {})
            if not declared:
                self._changed.append(Changed(_NOWHERE, name, tuple(entry["facts"])))
                continue
            for member in {**entry["members"], **ours}:
                nodes = [each.node for each in self.program.members(name).get(member, ())] or self.captures.get(member)
                if not nodes or len(nodes) > 1 or ours.get(member) != entry["members"].get(member):
                    facts = [member] if member in self.captures else entry["facts"]
                    self._differs((nodes or declared)[-1], f"{name}.{member}", facts)
        rests = {fact for each in self._changed if each.where != _NOWHERE for fact in each.facts}
        missing = [each for each in self._changed if each.where == _NOWHERE and not rests & {*each.facts}]
        return list(dict.fromkeys([*(each for each in self._changed if each.where != _NOWHERE), *missing]))

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Type -> member -> fingerprint, of what facts rest on: stored properties, initializers, and members of a name
        that published.json lists (with its labels: that one alone); a capture that it lists counts as a member."""
        prints: dict[str, dict[str, str]] = {}
        for name, entry in self.published["types"].items():
            for member, declared in self.program.members(name).items():
                stored = declared[0].name is not None and declared[0].computed is None
                if stored or {member, member.partition("(")[0]} & {"init", *entry["listed"]}:
                    made = fingerprint(declared[0].node, self._masked, self._names)
                    prints.setdefault(name, {})[member] = made
            for capture in self.captures.keys() & {*entry["listed"]}:
                for node in self.captures[capture]:
                    prints.setdefault(name, {})[capture] = fingerprint(node, self._masked, self._names)
        return prints

    def _in_scope(self, name: str, nodes: list[Node]) -> list[Node]:
        """The captures in the types that the fact rests on; all of them where it rests on none."""
        types = {each for each, entry in self.published["types"].items() if name in entry["facts"] + entry["listed"]}
        return [node for node in nodes if not types or enclosing_type(node) in types]

    def _differs(self, node: Node, what: str, facts: list[str]) -> None:
        self._changed.append(Changed(self.program.where(node), what, tuple(facts)))

    def _plain(self, name: str, expected: Any) -> Any:
        """The value of a fact; the expected one, and a difference, where the sources have none, several or another."""
        value, nodes = None, self.captures[name]
        for node in nodes:
            try:
                read_value = self._value(node, name, expected)
            except (ValueError, SyntaxError, ArithmeticError):
                read_value = None
            if read_value is None or value not in (None, read_value):
                self._differs(node, name, [name])
                continue
            value = read_value
            self._masked[node.id] = name
        if not nodes and expected:
            self._changed.append(Changed(_NOWHERE, name, (name,)))
        return expected if value is None else value

    def _value(self, node: Node, name: str, expected: Any) -> Any:
        """A node's value, of the kind of the expected one; ValueError for another kind."""
        if name.endswith("_dtype"):
            return _DTYPES.get(text(node).rpartition(".")[2])
        if name.endswith("_shape"):
            elements = [self._length(each) for each in node.children_by_field_name("element")]
            return tuple(elements) if len(elements) == len(expected) else None
        if isinstance(expected, int):
            number = self._integer(text(node))
            return number if number > 0 or expected == 0 else None
        if name == "bundle_resource":
            return ".".join(string(each) for each in walk(node) if each.type == "line_string_literal")
        return text(node) if node.type in ("simple_identifier", "type_identifier", "user_type") else string(node)

    def _length(self, node: Node) -> int | None:
        """A size; None, any size, for a name that is no constant."""
        try:
            return self._integer(text(node))
        except ValueError:
            if node.type == "simple_identifier":
                return None
            raise

    def _integer(self, expression: str, depth: int = 0) -> int:
        def constant(name: str) -> int:
            value = self.program.constants.get(name.rpartition(".")[2])
            if value is None or depth > 9:
                raise ValueError(f"{name} is no constant")
            return self._integer(value, depth + 1)

        return arithmetic(expression, constant)

    def _keys(self, name: str, renamed: dict[str, str]) -> tuple[Key, ...]:
        """The keys of a file, sorted by path; adds the app's name of each published path to `renamed`."""
        keys: dict[str, Key] = {}
        known: dict[str, Key] = {key.path: key for key in getattr(self.table, name)}
        declared: list[tuple[str, Member, str, str]] = []
        for full, path in self.published[name].items():
            type_name, _, member = full.rpartition(".")
            cases = self.program.cases(f"{type_name}.CodingKeys")
            for each in self.program.members(type_name).get(member, ())[:1]:
                key, literal = cases.get(member, (member, None))
                if literal is not None:
                    self._masked[literal.id] = name
                if renamed.setdefault(path, key) != key:
                    self._differs(each.node, full, [name])
                declared.append((path, each, type_name, member))
        for path, each, type_name, member in declared:
            if path not in known or each.annotation is None:
                continue
            self._masked[each.annotation.id] = name
            kind, required, default = self._decoded(type_name, member, text(each.annotation), known[path])
            key = Key(_renamed(path, renamed), kind, required, default)
            if keys.setdefault(key.path, key) != key:
                self._differs(each.node, f"{type_name}.{member}", [name])
        for path in known.keys() - {*self.published[name].values()}:
            keys[_renamed(path, renamed)] = replace(known[path], path=_renamed(path, renamed))
        return tuple(keys[path] for path in sorted(keys))

    def _decoded(self, type_name: str, member: str, annotation: str, known: Key) -> tuple[str, bool, Any]:
        """A key's Swift type, whether it is required, and its default, from the property's annotation."""
        required = not annotation.endswith("?")
        default = None if required else self._default(type_name, member, known.default)
        return annotation.removesuffix("?"), required, default

    def _default(self, type_name: str, member: str, published: Any) -> Any:
        """The number or boolean after `??` where a computed property reads this one, else the published default."""
        for computed in (each.computed for members in self.program.members(type_name).values() for each in members):
            for node in walk(computed) if computed else ():
                value, otherwise = (node.child_by_field_name(side) for side in ("value", "if_nil"))
                if node.type != "nil_coalescing_expression" or not value or not otherwise or text(value) != member:
                    continue
                try:
                    default = json.loads(text(otherwise).replace("_", ""))
                except ValueError:
                    return published
                self._masked[otherwise.id] = "default"
                return default
        return published

    def _layers(self, renamed: Mapping[str, str]) -> tuple[Any, ...]:
        """The published layers, by the keys that the app gives its modules and its configuration."""
        modules: dict[str, str] = {}
        for full, path in self.published["modules"].items():
            type_name, _, member = full.rpartition(".")
            for each in self.program.members(type_name).get(member, ())[:1]:
                attribute = next((node for node in walk(each.node) if node.type == "attribute"), None)
                literal = (
                    next((n for n in walk(attribute) if n.type == "line_string_literal"), None) if attribute else None
                )
                if literal is not None:
                    self._masked[literal.id] = "key"
                    modules[path] = string(literal)
                elif attribute is None or "key" not in text(attribute):
                    modules[path] = member

        def size(expression: str) -> str:
            return re.sub(r"[a-z_]+", lambda name: renamed.get(name[0], name[0]), expression)

        layers = (
            replace(
                layer,
                path=_renamed(layer.path, modules),
                shape=tuple(map(size, layer.shape)),
                unless=layer.unless and renamed.get(layer.unless, layer.unless),
            )
            for layer in self.table.layers
        )
        return tuple(sorted(layers, key=lambda layer: layer.path))


def _renamed(path: str, names: Mapping[str, str]) -> str:
    """A dotted path, each part by the name that the app has for it."""
    parts = path.split(".")
    return ".".join(names.get(".".join(parts[: number + 1]), part) for number, part in enumerate(parts))
