"""A recipe says how each weight of the artefact is stored. It is data: ordered rules, JSON in and out.

The first rule whose glob pattern matches a weight's name decides. Names are the artefact's:
`language_model.model.embed_tokens.weight`, `language_model.model.layers.0.mlp.up_proj.weight`,
`language_model.lm_head.weight`, `multi_modal_projector.linear_0.weight`, ...
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastvlm.errors import UserError
from quantization.schemes import MODES, Scheme, legal_combinations

VERSION = 1  # of the recipe format; a reader refuses the others
_FOLDER = Path(__file__).with_name("recipes")
_KEYS = {"name", "version", "description", "rules"}


@dataclass(frozen=True)
class Rule:
    """Weights whose name matches `pattern` (a glob, case-sensitive) are stored by `scheme`; `why` is for the reader."""

    pattern: str
    scheme: Scheme
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"pattern": self.pattern, "scheme": self.scheme.to_json()}
        return document | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; `name` is what `--quant` takes and what the manifest records."""

    name: str
    version: int
    rules: tuple[Rule, ...]
    description: str = ""

    def to_json(self) -> dict[str, Any]:
        """The document that `recipe_from_json` reads back."""
        return {
            "name": self.name,
            "version": self.version,
            "description": self.description,
            "rules": [rule.to_json() for rule in self.rules],
        }

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of the first rule that matches a weight's name, or None."""
        return next((rule.scheme for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def plan(self, shapes: Mapping[str, tuple[int, ...]], elsewhere: tuple[str, ...] = ()) -> dict[str, Scheme]:
        """Each weight's scheme. `elsewhere` are names, or beginnings of names, that a rule may be about all the same.

        Raises UserError with every rule that matches nothing, and every weight that has no rule or that its scheme
        cannot store.
        """
        plan: dict[str, Scheme] = {}
        faults = [
            f"rule {number} matches no weight: {rule.pattern!r}"
            for number, rule in enumerate(self.rules, 1)
            if not any(fnmatchcase(name, rule.pattern) for name in (*shapes, *elsewhere))
            and not rule.pattern.startswith(elsewhere)
        ]
        for name, shape in shapes.items():
            scheme = self.scheme(name)
            if scheme is None:
                faults.append(f'{name}: no rule matches (end the recipe with a rule for "*")')
            elif fault := scheme.fault(shape):
                faults.append(f"{name} {list(shape)}: {fault}")
            else:
                plan[name] = scheme
        if faults:
            raise UserError(f"recipe {self.name} does not fit this model: {_listed(faults)}")
        return plan


def named_recipes() -> dict[str, Recipe]:
    """The recipes that come with the project, by name."""
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.json"))}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A named recipe, or one from a .json file. Raises UserError with every fault of the file at once."""
    text = str(name_or_path)
    if "/" in text or text.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"recipe {path}: no such file")
        return _read(path)
    path = _FOLDER / f"{text}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.json")))
        raise UserError(f"unknown recipe {text!r}: expected {known}, or the path of a .json file")
    return _read(path)


def _read(path: Path) -> Recipe:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=refuse_repeats)
    except (OSError, ValueError) as error:
        raise UserError(f"recipe {path}: not readable as JSON ({error})") from None
    return recipe_from_json(document, where=f"recipe {path}")


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`: raise ValueError for a key given twice."""
    repeated = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if repeated:
        raise ValueError(f"key {', '.join(sorted(repeated))} given twice")
    return dict(pairs)


def recipe_from_json(document: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from its JSON document. Raises UserError with every fault and the legal combinations."""
    if not isinstance(document, dict):
        raise UserError(f"{where}: expected an object with name, version, rules, got {type(document).__name__}")
    faults = [f"unknown key {key!r} (known: {', '.join(sorted(_KEYS))})" for key in sorted(set(document) - _KEYS)]
    name, version, rules = document.get("name"), document.get("version"), document.get("rules")
    description = document.get("description", "")
    if not isinstance(name, str) or not name:
        faults.append(f"name: expected a non-empty string, got {name!r}")
    if type(version) is not int or version != VERSION:
        faults.append(f"version: expected {VERSION}, got {version!r}")
    if not isinstance(description, str):
        faults.append(f"description: expected a string, got {description!r}")
    if not isinstance(rules, list) or not rules:
        faults.append("rules: expected a non-empty list of {pattern, scheme}")
        rules = []
    read = tuple(_rule(rule, i, faults) for i, rule in enumerate(rules))
    if faults:
        raise UserError(f"{where}: {_listed(faults)}")
    return Recipe(str(name), VERSION, tuple(rule for rule in read if rule), description)


def _rule(document: Any, index: int, faults: list[str]) -> Rule | None:
    """One rule, or None after adding its faults to the list."""
    where, before = f"rule {index + 1}", len(faults)
    if not isinstance(document, dict):
        faults.append(f"{where}: expected an object with pattern and scheme, got {document!r}")
        return None
    unknown = sorted(set(document) - {"pattern", "scheme", "why"})
    faults.extend(f"{where}: unknown key {key!r} (known: pattern, scheme, why)" for key in unknown)
    pattern, why = document.get("pattern"), document.get("why", "")
    if not isinstance(pattern, str) or not pattern:
        faults.append(f"{where}: pattern: expected a glob over weight names, got {pattern!r}")
    if not isinstance(why, str):
        faults.append(f"{where}: why: expected a string, got {why!r}")
    scheme = _scheme(document.get("scheme"), where, faults)
    return Rule(str(pattern), scheme, why) if scheme and len(faults) == before else None


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
