"""An app's expectations of a model: read from its sources (sources.py), or our table of Apple's demo app (app.json)."""

import ast
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "app.json"


@dataclass(frozen=True)
class Key:
    """A key that a `Codable` struct decodes.

    path: dotted, in the JSON file ("size.shortest_edge"). type: Swift's ("Int", "Float", "[CGFloat]", "Bool", …).
    required: where what is around it is there (of "rope_scaling.mrope_section" only in a file with "rope_scaling").
    default: what the app takes where an optional key is absent or null (None: nothing).
    """

    path: str
    type: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Layer:
    """A module that has weights.

    path: its keys' beginning, `{layer}` standing for 0 … num_hidden_layers - 1. kind: "Linear", "Embedding", "RMSNorm".
    shape: of `weight`, each an integer expression over keys of config.json ("hidden_size // num_attention_heads").
    bias: whether `bias` is expected too. unless: a boolean key of config.json that, when true, leaves the layer out.
    """

    path: str
    kind: str
    shape: tuple[str, ...]
    bias: bool
    unless: str | None = None


@dataclass(frozen=True)
class Package:
    """A Swift package as the project file requires it.

    kind: Xcode's ("upToNextMajorVersion", "upToNextMinorVersion", "exactVersion", "versionRange", "branch",
    "revision"), or "local". minimum: the version, branch, revision or path named; maximum: of a versionRange, itself
    excluded. resolved: the version (or revision) in Package.resolved, None where there is none.
    """

    name: str
    url: str
    kind: str
    minimum: str
    maximum: str | None = None
    resolved: str | None = None


@dataclass(frozen=True)
class Changed:
    """A declaration that differs from the published app's.

    where: "FILE:LINE". what: its name. facts: fields of AppFacts that rest on it.
    """

    where: str
    what: str
    facts: tuple[str, ...]

    def line(self, reader: str = "app") -> str:
        """The difference on one line. `reader`: "app" or "engine"."""
        rest = ", ".join(self.facts)
        return f"{self.what}: differs from the published {reader} at {self.where}: check by hand ({rest})"


@dataclass(frozen=True)
class AppFacts:
    """Everything that decides whether a model loads and runs in an app."""

    # Core ML: the class that Xcode makes is named as the package; None in a shape is any size.
    model_class: str
    input_name: str
    input_shape: tuple[int | None, ...]
    input_dtype: str
    output_name: str
    output_shape: tuple[int | None, ...]
    output_dtype: str
    # Registries: the strings looked up in config.json and preprocessor_config.json.
    model_type: str
    processor_class: str
    # Codable structs.
    config: tuple[Key, ...]
    preprocessor: tuple[Key, ...]
    # Modules.
    layers: tuple[Layer, ...]
    # The prompt that the app builds.
    image_token: str
    patch_size: int
    additional_image_tokens: int
    system_prompt: str
    turn: str  # one turn, with {role} and {content}
    turn_separator: str
    prompt_end: str  # what follows the last turn
    # Project.
    model_folder: str  # relative to app/
    bundle_resource: str  # the file by which the app finds its model folder
    # "iOS", "macOS", "visionOS" -> least version of the app and of its target with the model
    deployment: dict[str, str]
    packages: tuple[Package, ...]
    increased_memory_limit: bool  # the entitlement
    cache_limit: int  # bytes that MLX may keep of freed buffers
    max_tokens: int  # of an answer
    # Interfaces of the packages that the sources use, of those that came and went (packages.json).
    api: tuple[str, ...] = ()
    # Declarations that facts rest on and that differ from the published app's, so that these facts are unverified.
    changed: tuple[Changed, ...] = ()


def table() -> AppFacts:
    """Our table: Apple's demo app as published (apple/ml-fastvlm 592b4ad)."""
    values = json.loads(TABLE.read_text(encoding="utf-8"))["facts"]
    for name, kind in {"config": Key, "preprocessor": Key, "layers": Layer, "packages": Package}.items():
        values[name] = tuple(kind(**_tuples(entry)) for entry in values[name])
    return AppFacts(**_tuples(values))


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
}


def arithmetic(expression: str, value: Callable[[str], int]) -> int:
    """An integer expression, such as a layer's size.

    Args:
        expression: integers and names with + - * // << between them.
        value: what a (dotted) name stands for.

    Raises:
        ValueError, SyntaxError, ArithmeticError: for anything else, and whatever `value` raises.
    """

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name | ast.Attribute):
            return value(ast.unparse(node))
        raise ValueError(f"{ast.unparse(node)} is no arithmetic of integers")

    return evaluate(ast.parse(expression, mode="eval").body)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) and name != "default" else value for name, value in entry.items()
    }
