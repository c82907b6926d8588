"""A recipe says how each weight of the artefact is stored. It is data: ordered rules, JSON in and out.

The first rule whose glob pattern matches a weight's name decides. Names are the artefact's:
`language_model.model.embed_tokens.weight`, `language_model.model.layers.0.mlp.up_proj.weight`,
`language_model.lm_head.weight`, `multi_modal_projector.linear_0.weight`, ..., and `vision_encoder.<layer>` for the
layers of the Core ML encoder (timm's names), which stay float16 without a rule.

A rule with `choices` leaves the scheme to what each weight costs in quality; the recipe's `budget` says how large all
may be (`quantization.calibration.budget` decides).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastvlm.common.documents import Unreadable, load
from fastvlm.common.errors import UserError
from quantization.schemes import MODES, Affine, CoreML, Scheme, legal_combinations

VERSION = 2  # of the recipe format; a reader refuses the others
METHODS = ("rtn", "awq", "gptq", "dwq")  # how the stored values are found; rtn: each rounded to the nearest
VISION = "vision_encoder."
LAYERS = "language_model.model.layers."
# Parts that a rule may be about though a model does not store them: a tied one's lm_head, mlx-vlm's vision tower.
ELSEWHERE = ("language_model.lm_head.weight", "vision_tower.")
GPTQ_BITS = (2, 4, 8)  # what mlx-lm's implementation packs
_FOLDER = Path(__file__).with_name("recipes")
_KEYS = {"name", "version", "description", "method", "budget", "rules"}
_RULE_KEYS = {"pattern", "layers", "scheme", "choices", "why"}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(MB|GB|bpw)", re.ASCII)
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layers:
    """Some of a decoder's layers: the first and last part of them (0 to 1), and every n-th in between (0: none)."""

    first: float = 0.0
    last: float = 0.0
    every: int = 0

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether (layer, of how many) is one. As mlx-lm 0.32.2's mixed predicates count (`mlx_lm/convert.py`)."""
        index, count = place
        start, end = int(self.first * count), int((1 - self.last) * count)
        return index < start or index >= end or (self.every > 0 and (index - start) % self.every == self.every - 1)


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches `pattern` (a glob, case-sensitive), in some layers only if `layers` says so, are
    stored by one of `choices` (most rules have one); `why` is for the reader."""

    pattern: str
    choices: tuple[Scheme, ...]
    why: str = ""
    layers: Layers | None = None

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
        schemes = [scheme.to_json() for scheme in self.choices]
        document |= {"scheme": schemes[0]} if len(schemes) == 1 else {"choices": schemes}
        return document | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Budget:
    """How large the language model and the projector may be: one of the two."""

    bytes: int | None = None
    bits_per_weight: float | None = None

    def limit(self, parameters: int) -> int:
        """The budget in bytes for a model of so many values."""
        return self.bytes if self.bytes is not None else int((self.bits_per_weight or 0) * parameters / 8)

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; `name` is what `--quant` takes and what the manifest records."""

    name: str
    version: int
    rules: tuple[Rule, ...]
    description: str = ""
    method: str = "rtn"
    budget: Budget | None = None

    def to_json(self) -> dict[str, Any]:
        """The document that `recipe_from_json` reads back."""
        document: dict[str, Any] = {"name": self.name, "version": self.version, "description": self.description}
        document |= {"method": self.method} if self.method != "rtn" else {}
        document |= {"budget": self.budget.to_json()} if self.budget else {}
        return document | {"rules": [rule.to_json() for rule in self.rules]}

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
            for scheme in rule.choices
            if isinstance(scheme, CoreML)
        )

    def choices(self, name: str, layer_count: int = 0) -> tuple[Scheme, ...]:
        """What the first rule that matches a weight's name offers; nothing when none does."""
        return next((rule.choices for rule in self.rules if rule.matches(name, layer_count)), ())

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
        """What may become of each weight: the first matching rule's choices, as far as they can store it.

        Raises UserError with every rule that matches nothing, and every weight that has no rule or that no choice can
        store.
        """
        count, found = layer_count(shapes), {}
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
            found[name] = fitting
        if faults:
            raise UserError(f"recipe {self.name} does not fit this model: {_listed(faults)}")
        return found

    def decided(self, chosen: Mapping[str, Scheme]) -> "Recipe":
        """The recipe with the choices made: a rule for each of these weights, and no budget."""
        made = tuple(Rule(name, (scheme,)) for name, scheme in chosen.items())
        return replace(self, rules=made + tuple(rule for rule in self.rules if len(rule.choices) == 1), budget=None)


def layer_count(names: Mapping[str, Any]) -> int:
    """How many decoder layers there are among these weights' names."""
    return max((int(found[1]) + 1 for name in names if (found := _LAYER_NUMBER.search(name))), default=0)


def _method_faults(method: str, plan: Mapping[str, Scheme]) -> list[str]:
    """What keeps a calibration method from storing this plan (the limits are mlx-lm 0.32.2's)."""
    matrices = {scheme for name, scheme in plan.items() if name.startswith(LAYERS) and name.endswith("_proj.weight")}
    affine = [scheme for scheme in plan.values() if isinstance(scheme, Affine)]
    faults = []
    if method in ("awq", "gptq") and (len(matrices) != 1 or not all(isinstance(one, Affine) for one in matrices)):
        faults.append(f"method {method} takes one affine scheme for all decoder matrices, got {len(matrices)} schemes")
    elif method == "gptq" and (
        wrong := [one.bits for one in matrices if isinstance(one, Affine) and one.bits not in GPTQ_BITS]
    ):
        faults.append(f"method gptq takes {', '.join(map(str, GPTQ_BITS))} bits, got {wrong[0]}")
    if method == "dwq" and not any(one.bits < 8 for one in affine):
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
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.json")))
        raise UserError(f"unknown recipe {name!r}: expected {known}, or the path of a .json file")
    recipe = _read(path)
    return replace(recipe, name=text, budget=_budget_of(text, size, recipe)) if ":" in text else recipe


def _budget_of(text: str, size: str, recipe: Recipe) -> Budget:
    if not any(len(rule.choices) > 1 for rule in recipe.rules):
        raise UserError(f"recipe {text!r}: {recipe.name} takes no size: its rules leave nothing to choose")
    found = _SIZE.fullmatch(size)
    if not found or not float(found[1]):
        raise UserError(
            f"recipe {text!r}: size {size!r}: expected one such as 400MB, 1.2GB or 4.5bpw (bits per weight)"
        )
    number, unit = float(found[1]), found[2]
    return Budget(bits_per_weight=number) if unit == "bpw" else Budget(bytes=int(number * {"MB": 1e6, "GB": 1e9}[unit]))


def _read(path: Path) -> Recipe:
    try:
        document = load(path)
    except Unreadable as error:
        raise UserError(f"recipe {path}: not readable as JSON ({error})") from None
    return recipe_from_json(document, where=f"recipe {path}")


def recipe_from_json(document: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from its JSON document. Raises UserError with every fault and the legal combinations."""
    if not isinstance(document, dict):
        raise UserError(f"{where}: expected an object with name, version, rules, got {type(document).__name__}")
    faults = [f"unknown key {key!r} (known: {', '.join(sorted(_KEYS))})" for key in sorted(set(document) - _KEYS)]
    name, version, rules = document.get("name"), document.get("version"), document.get("rules")
    description, method = document.get("description", ""), document.get("method", "rtn")
    if not isinstance(name, str) or not name:
        faults.append(f"name: expected a non-empty string, got {name!r}")
    if type(version) is not int or version != VERSION:
        faults.append(f"version: expected {VERSION}, got {version!r}")
    if not isinstance(description, str):
        faults.append(f"description: expected a string, got {description!r}")
    if method not in METHODS:
        faults.append(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(rules, list) or not rules:
        faults.append("rules: expected a non-empty list of {pattern, scheme}")
        rules = []
    read = tuple(_rule(rule, i, faults) for i, rule in enumerate(rules))
    budget = _budget(document["budget"], faults) if "budget" in document else None
    open_rules = [str(i) for i, rule in enumerate(read, 1) if rule and len(rule.choices) > 1]
    if budget and not open_rules:
        faults.append("budget: no rule offers choices to spend it on")
    if open_rules and method in ("awq", "gptq"):
        faults.append(f"method {method} takes one scheme for all decoder matrices, rule {open_rules[0]} offers choices")
    if faults:
        raise UserError(f"{where}: {_listed(faults)}")
    return Recipe(str(name), VERSION, tuple(rule for rule in read if rule), description, method, budget)


def _rule(document: Any, index: int, faults: list[str]) -> Rule | None:
    """One rule, or None after adding its faults to the list."""
    where, before = f"rule {index + 1}", len(faults)
    if not isinstance(document, dict):
        faults.append(f"{where}: expected an object with pattern and scheme, got {document!r}")
        return None
    known = ", ".join(sorted(_RULE_KEYS))
    faults.extend(f"{where}: unknown key {key!r} (known: {known})" for key in sorted(set(document) - _RULE_KEYS))
    pattern, why = document.get("pattern"), document.get("why", "")
    if not isinstance(pattern, str) or not pattern:
        faults.append(f"{where}: pattern: expected a glob over weight names, got {pattern!r}")
    if not isinstance(why, str):
        faults.append(f"{where}: why: expected a string, got {why!r}")
    choices = _choices(document, where, faults)
    layers = _layers(document["layers"], where, faults) if "layers" in document else None
    about_vision = isinstance(pattern, str) and pattern.startswith(VISION)
    if any(about_vision != isinstance(scheme, CoreML) for scheme in choices):
        faults.append(
            f'{where}: mode "coreml" is for patterns that begin with {VISION}, and for them there is no other'
        )
    return Rule(str(pattern), choices, why, layers) if len(faults) == before else None


def _choices(document: dict[str, Any], where: str, faults: list[str]) -> tuple[Scheme, ...]:
    if "choices" not in document:
        schemes = [document.get("scheme")]
    elif "scheme" in document:
        faults.append(f"{where}: has both scheme and choices: say one")
        return ()
    else:
        schemes = document["choices"]
        if not isinstance(schemes, list) or len(schemes) < 2:
            faults.append(f"{where}: choices: expected a list of at least two schemes, got {schemes!r}")
            return ()
    found = [_scheme(scheme, where, faults) for scheme in schemes]
    return tuple(scheme for scheme in found if scheme)


def _layers(document: Any, where: str, faults: list[str]) -> Layers | None:
    legal = {"first": (int, float), "last": (int, float), "every": (int,)}
    numbers = isinstance(document, dict) and all(
        key in legal and type(value) in legal[key] and 0 < value <= (1 if key != "every" else 1000)
        for key, value in document.items()
    )
    if not numbers or not document:
        faults.append(
            f'{where}: layers: expected {{"first": 0..1, "last": 0..1, "every": n}} or some of it, got {document!r}'
        )
        return None
    return Layers(**document)


def _budget(document: Any, faults: list[str]) -> Budget | None:
    legal = {"bytes": (int,), "bits_per_weight": (int, float)}
    if (
        not isinstance(document, dict)
        or len(document) != 1
        or not all(key in legal and type(value) in legal[key] and value > 0 for key, value in document.items())
    ):
        faults.append(f'budget: expected {{"bytes": n}} or {{"bits_per_weight": x}}, got {document!r}')
        return None
    return Budget(**document)


def _scheme(document: Any, where: str, faults: list[str]) -> Scheme | None:
    if not isinstance(document, dict):
        faults.append(f"{where}: scheme: expected an object, got {document!r}; legal: {legal_combinations()}")
        return None
    settings = dict(document)
    mode = settings.pop("mode", "cast")
    if not isinstance(mode, str) or mode not in MODES:
        faults.append(f"{where}: scheme: unknown mode {mode!r}; legal: {legal_combinations()}")
        return None
    kind = MODES[mode]
    wrong = [f"unknown key {key!r}" for key in sorted(set(settings) - set(kind.LEGAL))]
    for key, legal in kind.LEGAL.items():
        if key not in settings:
            wrong.append(f"{key} is missing")
        elif type(settings[key]) is not type(legal[0]) or settings[key] not in legal:
            wrong.append(f"{key} {settings[key]!r} is not one of {', '.join(map(str, legal))}")
    if wrong:
        faults.append(f"{where}: scheme: {', '.join(wrong)}; legal: {legal_combinations()}")
        return None
    return kind(**settings)


def _listed(faults: list[str], most: int = 12) -> str:
    """Every fault on one line; long lists of the same kind are cut, with their number."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
