"""The forms of the encoder's weights, by `--vision-quant` or a recipe: rules from layers' names to forms."""

from dataclasses import dataclass

from fastvlm.common.arguments import nearest
from fastvlm.common.errors import UserError
from quantization.coreml.compression import COMPRESSIONS, Compression
from quantization.recipe import load_recipe

NONE = "fp16"  # the name of leaving weights as they are
FORMS = (NONE, *COMPRESSIONS)


@dataclass(frozen=True)
class VisionQuant:
    """Ordered rules: the first glob that matches a layer's name (timm's) decides; a layer without one stays fp16."""

    name: str
    rules: tuple[tuple[str, Compression | None], ...] = ()

    @property
    def targets(self) -> dict[str, str]:
        """Form -> the deployment target that it needs."""
        return {form.name: form.target for _, form in self.rules if form is not None}

    def to_json(self) -> dict[str, str]:
        """Pattern -> form."""
        return {pattern: form.name if form else NONE for pattern, form in self.rules}


def load(text: str) -> VisionQuant:
    """A form's name, for all layers; `fp16`; or a recipe's .json file, of which the encoder's rules count here.

    Raises UserError with every fault.
    """
    if text == NONE:
        return VisionQuant(NONE)
    if not text.endswith(".json"):
        if text not in COMPRESSIONS:
            raise UserError(f"got {text}, expected {', '.join(FORMS)}, or a recipe's .json file{nearest(text, FORMS)}")
        return VisionQuant(text, (("*", COMPRESSIONS[text]),))
    rules = of_recipe(text)
    if not rules.rules:
        raise UserError(f"{text}: the recipe has no rule for the encoder: expected patterns vision_encoder.*")
    return rules


def usable(text: str) -> str:
    """The argparse type of a flag that takes what `load` takes: the text as it is."""
    load(text)
    return text


def of_recipe(text: str) -> VisionQuant:
    """The encoder's rules of a recipe (its name or .json file). Raises UserError with every fault."""
    recipe = load_recipe(text)
    forms = {name: COMPRESSIONS.get(name) for _, name in recipe.vision}
    return VisionQuant(
        recipe.name if recipe.vision else NONE, tuple((glob, forms[name]) for glob, name in recipe.vision)
    )
