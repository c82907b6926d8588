"""A recipe says how each weight of the artefact is stored. It is data: ordered rules, JSON in and out.

The first rule whose glob pattern matches a weight's name decides. Names are the artefact's:
`language_model.model.embed_tokens.weight`, `language_model.model.layers.0.mlp.up_proj.weight`,
`language_model.lm_head.weight`, `multi_modal_projector.linear_0.weight`, ..., and `vision_encoder.<layer>` for the
layers of the Core ML encoder (timm's names), which stay float16 without a rule. `coreai` has the rules of a Core AI
bundle, whose weights have other names and forms (`quantization.coreai`).

A rule with `choices` leaves the scheme to what each weight costs in quality; the recipe's `budget` says how large all
may be (`quantization.calibration.budget` decides).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, MinLen

from fastvlm.common.arguments import nearest
from fastvlm.common.documents import Unreadable, load
from fastvlm.common.errors import UserError
from fastvlm.common.units import SIZE_UNITS
from quantization.coreai.plan import FormRule
from quantization.schemes import Affine, CoreML, Scheme

VISION = "vision_encoder."
LAYERS = "language_model.model.layers."
# Parts that a rule may be about though a model does not store them: a tied one's lm_head, mlx-vlm's vision tower.
ELSEWHERE = ("language_model.lm_head.weight", "vision_tower.")
GPTQ_BITS = (2, 4, 8)  # what mlx-lm's implementation packs
_FOLDER = Path(__file__).with_name("recipes")
_FORM = {"extra": "forbid"}  # how pydantic reads the classes below from JSON
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(MB|GB|bpw)", re.ASCII)
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layers:
    """Some of a decoder's layers: the first and last part of them (0 to 1), and every n-th in between (0: none)."""

    first: Annotated[float, Gt(0), Le(1)] = 0.0
    last: Annotated[float, Gt(0), Le(1)] = 0.0
    every: Annotated[int, Gt(0), Le(1000)] = 0

    __pydantic_config__ = _FORM

    def __post_init__(self) -> None:
        if not any(vars(self).values()):
            raise ValueError("expected first, last or every")

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether (layer, of how many) is one. As mlx-lm 0.32.2's mixed predicates count (`mlx_lm/convert.py`)."""
        index, count = place
        start, end = int(self.first * count), int((1 - self.last) * count)
        return index < start or index >= end or (self.every > 0 and (index - start) % self.every == self.every - 1)


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches `pattern` (a glob, case-sensitive), in some layers only if `layers` says so, are
    stored by `scheme`, or by one of `choices`; `why` is for the reader."""

    pattern: Annotated[str, MinLen(1)]
    scheme: Scheme | None = None
    choices: tuple[Scheme, ...] = ()
    why: str = ""
    layers: Layers | None = None

    __pydantic_config__ = _FORM

    def __post_init__(self) -> None:
        if len(self.choices) == 1 or bool(self.scheme) == bool(self.choices):
            raise ValueError("expected either scheme or two and more choices")
        if {self.pattern.startswith(VISION)} != {isinstance(scheme, CoreML) for scheme in self.schemes}:
            raise ValueError(f'mode "coreml" is for patterns that begin with {VISION}, and for them there is no other')

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that the rule offers: one scheme, or the choices."""
        return (self.scheme,) if self.scheme else self.choices

    def matches(self, name: str, layer_count: int) -> bool:
        """Whether the rule is about this weight of a model with so many decoder layers."""
        if not fnmatchcase(name, self.pattern):
            return False
        if self.layers is None:
            return True
        number = _LAYER_NUMBER.search(name)
        return number is not None and (int(number[1]), layer_count) in self.layers

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"pattern": self.pattern}
        if self.layers:
            document["layers"] = {key: value for key, value in vars(self.layers).items() if value}
        schemes = [scheme.to_json() for scheme in self.schemes]
        document |= {"scheme": schemes[0]} if self.scheme else {"choices": schemes}
        return document | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Budget:
    """A limit on the size of the language model and the projector: bytes, or bits per weight."""

    bytes: Annotated[int, Gt(0)] | None = None
    bits_per_weight: Annotated[float, Gt(0)] | None = None

    __pydantic_config__ = _FORM

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.bits_per_weight is None):
            raise ValueError("expected either bytes or bits_per_weight")

    def limit(self, parameters: int) -> int:
        """The budget in bytes for a model of so many values."""
        return self.bytes if self.bytes is not None else int((self.bits_per_weight or 0) * parameters / 8)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; `name` is what `--quant` takes and what the manifest records. `version` is the format's.

    method: how the stored values are found; rtn rounds each to the nearest.
    """

    name: Annotated[str, MinLen(1)]
    version: Literal[2]
    rules: tuple[Rule, ...]
    description: str = ""
    method: Literal["rtn", "awq", "gptq", "dwq"] = "rtn"
    budget: Budget | None = None
    coreai: tuple[FormRule, ...] = ()

    __pydantic_config__ = _FORM

    def __post_init__(self) -> None:
        if not self.rules:
            raise UserError(f"recipe {self.name}: rules: got none, expected one or more")
        open_rules = [number for number, rule in enumerate(self.rules, 1) if rule.choices]
        if self.budget and not open_rules:
            raise UserError(f"recipe {self.name}: takes no size: no rule offers choices to spend a budget on")
        if self.coreai and self.calibrates:
            raise UserError(
                f"recipe {self.name}: coreai: its forms are rounded to nearest, expected method rtn, no budget"
            )
        if open_rules and self.method in ("awq", "gptq"):
            raise UserError(
                f"recipe {self.name}: method {self.method} takes one scheme for all decoder matrices, "
                f"rule {open_rules[0]} offers choices"
            )

    def to_json(self) -> dict[str, Any]:
        """The document that `recipe_from_json` reads back."""
        document: dict[str, Any] = {"name": self.name, "version": self.version, "description": self.description}
        document |= {"method": self.method} if self.method != "rtn" else {}
        document |= {"budget": self.budget.to_json()} if self.budget else {}
        document["rules"] = [rule.to_json() for rule in self.rules]
        return document | ({"coreai": [rule.to_json() for rule in self.coreai]} if self.coreai else {})

    @property
    def calibrates(self) -> bool:
        """Whether it can be applied only with pictures and questions."""
        return self.method != "rtn" or self.budget is not None

    @property
    def vision(self) -> tuple[tuple[str, str], ...]:
        """The rules about the Core ML encoder: (glob over its layers' names, form's name)."""
        return tuple(
            (rule.pattern.removeprefix(VISION), scheme.form)
            for rule in self.rules
            for scheme in rule.schemes
            if isinstance(scheme, CoreML)
        )

    def choices(self, name: str, layer_count: int = 0) -> tuple[Scheme, ...]:
        """The choices of the first rule that matches a weight's name; () when none does."""
        return next((rule.schemes for rule in self.rules if rule.matches(name, layer_count)), ())

    def plan(self, shapes: Mapping[str, tuple[int, ...]], elsewhere: tuple[str, ...] = ()) -> dict[str, Scheme]:
        """Each weight's scheme. `elsewhere` are names, or beginnings of names, that a rule may be about all the same.

        Raises UserError as `options` does, and when the recipe leaves choices open or its method cannot store the plan.
        """
        options = self.options(shapes, elsewhere)
        if any(len(schemes) > 1 for schemes in options.values()):
            raise UserError(f"recipe {self.name} leaves the schemes open: say how large, as in fit:400MB or fit:4.5bpw")
        plan = {name: schemes[0] for name, schemes in options.items()}
        if faults := _method_faults(self.method, plan):
            raise UserError(f"recipe {self.name} does not fit this model: {_listed(faults)}")
        return plan

    def options(
        self, shapes: Mapping[str, tuple[int, ...]], elsewhere: tuple[str, ...] = ()
    ) -> dict[str, tuple[Scheme, ...]]:
        """Each weight's possible schemes: the first matching rule's choices that can store it.

        Raises UserError with every rule that matches nothing, and every weight that has no rule or that no choice can
        store.
        """
        count, fitting_schemes = layer_count(shapes), {}
        faults = [
            f"rule {number} matches no weight: {rule.pattern!r}"
            for number, rule in enumerate(self.rules, 1)
            if not any(fnmatchcase(name, rule.pattern) for name in (*shapes, *elsewhere))
            and not rule.pattern.startswith((VISION, *elsewhere))
        ]
        for name, shape in shapes.items():
            schemes = self.choices(name, count)
            fitting = tuple(scheme for scheme in schemes if scheme.fault(shape) is None)
            if not schemes:
                faults.append(f'{name}: no rule matches (end the recipe with a rule for "*")')
            elif not fitting:
                faults.append(f"{name} {list(shape)}: {schemes[-1].fault(shape)}")
            fitting_schemes[name] = fitting
        if faults:
            raise UserError(f"recipe {self.name} does not fit this model: {_listed(faults)}")
        return fitting_schemes

    def decided(self, chosen: Mapping[str, Scheme]) -> "Recipe":
        """The recipe with the choices made: a rule for each of these weights, and no budget."""
        made = tuple(Rule(name, scheme) for name, scheme in chosen.items())
        return replace(self, rules=made + tuple(rule for rule in self.rules if rule.scheme), budget=None)


def layer_count(names: Mapping[str, Any]) -> int:
    """The number of decoder layers among these weights' names."""
    return max((int(match[1]) + 1 for name in names if (match := _LAYER_NUMBER.search(name))), default=0)


def _method_faults(method: str, plan: Mapping[str, Scheme]) -> list[str]:
    """Reasons why a calibration method cannot store this plan (the limits are mlx-lm 0.32.2's)."""
    matrices = {scheme for name, scheme in plan.items() if name.startswith(LAYERS) and name.endswith("_proj.weight")}
    affine = [scheme for scheme in plan.values() if isinstance(scheme, Affine)]
    faults = []
    if method in ("awq", "gptq") and (len(matrices) != 1 or not all(isinstance(scheme, Affine) for scheme in matrices)):
        faults.append(f"method {method} takes one affine scheme for all decoder matrices, got {len(matrices)} schemes")
    elif method == "gptq" and (
        wrong := [scheme.bits for scheme in matrices if isinstance(scheme, Affine) and scheme.bits not in GPTQ_BITS]
    ):
        faults.append(f"method gptq takes {', '.join(map(str, GPTQ_BITS))} bits, got {wrong[0]}")
    if method == "dwq" and not any(scheme.bits < 8 for scheme in affine):
        faults.append("method dwq trains affine scales and biases below 8 bits: the recipe has none")
    return faults


def named_recipes() -> dict[str, Recipe]:
    """The recipes that come with the project, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.json"))}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A named recipe, NAME:SIZE for one that takes a budget (fit:400MB, fit:4.5bpw), or one from a .json file.

    Raises UserError with every fault of the file at once.
    """
    text = str(name_or_path)
    if "/" in text or text.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"recipe {path}: no such file")
        return _read(path)
    name, _, size = text.partition(":")
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in _FOLDER.glob("*.json"))
        meant = nearest(name, known)
        raise UserError(f"unknown recipe {name!r}: expected {', '.join(known)}, or the path of a .json file{meant}")
    recipe = _read(path)
    return replace(recipe, name=text, budget=_budget_of(text, size)) if ":" in text else recipe


def usable_recipe(text: str) -> str:
    """The argparse type of a flag that takes a recipe as `load_recipe` does: the text as it is."""
    load_recipe(text)
    return text


def _budget_of(text: str, size: str) -> Budget:
    match = _SIZE.fullmatch(size)
    if not match or not float(match[1]):
        raise UserError(
            f"recipe {text!r}: size {size!r}: expected one such as 400MB, 1.2GB or 4.5bpw (bits per weight)"
        )
    number, unit = float(match[1]), match[2]
    return Budget(bits_per_weight=number) if unit == "bpw" else Budget(bytes=int(number * SIZE_UNITS[unit]))


def _read(path: Path) -> Recipe:
    try:
        document = load(path)
    except Unreadable as error:
        raise UserError(f"recipe {path}: {error}") from None
    return recipe_from_json(document, where=f"recipe {path}")


def recipe_from_json(document: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from its JSON document. Raises UserError with every fault, and for a scheme the legal ones."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"
            for fault in error.errors()
        ]
    raise UserError(f"{where}: {_listed(faults)}")


def _listed(faults: list[str], most: int = 12) -> str:
    """Every fault on one line; long lists of the same kind are cut, with their number."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
