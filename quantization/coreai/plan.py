"""Which weight of a Core AI bundle gets which form: a recipe's rules over names, and the size that comes of it.

A name is the bundle's part and the layer's path in its module: `decoder.model.layers.0.mlp.up_proj`, `decoder.lm_head`,
`embedding`, `vision.fastvit.stages.0...`, `vision.linear_0` (the projector).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

from annotated_types import MinLen

from fastvlm.common.errors import UserError
from quantization.coreai.forms import FORMS, PLAIN, Form, fault, nbytes

_STRICT = {"extra": "forbid"}  # how pydantic reads the class below from JSON
DECODER, EMBEDDING, VISION = "decoder.", "embedding", "vision."
# Bytes of operations, names, biases and norms that a program has for each of its weights, from the demo checkpoint's:
# a decoder has attention and rotary embeddings beside its matrices.
_TEXT = {DECODER: 1700, EMBEDDING: 3000, VISION: 800}


@dataclass(frozen=True)
class FormRule:
    """Weights whose name matches `pattern` (a glob, case-sensitive) take `form`; `why` is for the reader."""

    pattern: Annotated[str, MinLen(1)]
    form: Form
    why: str = ""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not self.pattern.startswith((DECODER, EMBEDDING, VISION, "*")):
            raise ValueError(f"expected a pattern that begins with {DECODER}, {EMBEDDING}, {VISION} or *")

    def to_json(self) -> dict[str, Any]:
        return {"pattern": self.pattern, "form": self.form.name} | ({"why": self.why} if self.why else {})


@dataclass(frozen=True)
class Plan:
    """Name -> form of the weights that take one, and name -> reason of those that stay float16."""

    forms: Mapping[str, Form]
    kept: Mapping[str, str]

    def of(self, part: str) -> dict[str, Form]:
        """The forms of one part, by the layer's path in its module ("" is the module itself)."""
        return {name.removeprefix(part): form for name, form in self.forms.items() if name.startswith(part)}


def plan(rules: Sequence[FormRule], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Resolve a recipe's rules; the first that matches decides.

    Args:
        shapes: name -> shape (O, I, ...) of every weight of the bundle that could take a form, of all its parts.

    Raises:
        UserError: with every pattern that matches no weight.
    """
    unused = [rule.pattern for rule in rules if not any(fnmatchcase(name, rule.pattern) for name in shapes)]
    if unused:
        raise UserError(
            f"Core AI forms: match no weight: {', '.join(unused)}; a weight is {next(iter(shapes), 'none')}"
        )
    return resolve(rules, shapes)


def resolve(rules: Sequence[FormRule], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """As `plan`, for some of a bundle's weights: a pattern may match none."""
    forms, kept = {}, {}
    for name, shape in shapes.items():
        form = next((rule.form for rule in rules if fnmatchcase(name, rule.pattern)), None)
        if form is None:
            kept[name] = "no rule matches it"
        elif reason := fault(shape, form):
            kept[name] = reason
        else:
            forms[name] = form
    return Plan(forms, kept)


def stored_bytes(forms: Mapping[str, Form], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size of a float16 bundle's programs: these weights, those without a form included, and what goes with them.

    Tests hold it to within 2 % of the files.
    """
    texts = sum(size for part, size in _TEXT.items() for name in shapes if name.startswith(part))
    return texts + sum(nbytes(shape, forms.get(name, FORMS[PLAIN])) for name, shape in shapes.items())
