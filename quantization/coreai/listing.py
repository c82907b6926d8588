"""What `fastvlm recipes` says of Core AI: each recipe's forms and sizes, and what the Neural Engine refuses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastvlm.common.terminal import Console, print_table
from fastvlm.common.units import format_bytes
from quantization.coreai.forms import FORMS, PLAIN
from quantization.coreai.plan import DECODER, EMBEDDING, VISION, FormRule, resolve, stored_bytes

_LANGUAGE = "language_model."
_EMBEDDINGS, _LM_HEAD = f"{_LANGUAGE}model.embed_tokens.weight", f"{_LANGUAGE}lm_head.weight"


def language_shapes(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The matrices of a bundle's decoder and embeddings, from those of the MLX artefact: name -> shape.

    A tied model has one matrix for both there; each of a bundle's programs has its own.
    """
    matrices: dict[str, tuple[int, ...]] = {
        name: shape for name, shape in weights.items() if name.startswith(_LANGUAGE) and len(shape) == 2
    }
    embeddings = matrices.pop(_EMBEDDINGS)
    matrices.setdefault(_LM_HEAD, embeddings)
    decoder = {DECODER + name.removeprefix(_LANGUAGE).removesuffix(".weight"): matrices[name] for name in matrices}
    return {**decoder, EMBEDDING: embeddings}


def size(rules: Sequence[FormRule], weights: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a bundle's decoder and embeddings under a recipe's rules, from the MLX artefact's weights."""
    shapes = language_shapes(weights)
    return stored_bytes(resolve(rules, shapes).forms, shapes)


def print_recipes(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """A table of the recipes that have Core AI forms, from what `quantization.catalogue.describe` says of each."""
    rows = [row for row in rows if row.get("coreai")]
    if not rows:
        return
    parts = {"decoder, embedding": (DECODER, EMBEDDING), "vision": (VISION,)}
    sizes = list(rows[0]["coreai_bytes"])
    cells = [
        [row["name"], *(_forms(row["coreai"], part) for part in parts.values())]
        + [format_bytes(row["coreai_bytes"][name]) for name in sizes]
        for row in rows
    ]
    print_table("Core AI's forms", ["recipe", *parts, *sizes], cells, sizes, console)
    console.print("Sizes are of decoder and embeddings, which a tied model stores twice.", markup=False)
    for form in FORMS.values():
        if form.refused:
            text = f"{form.name}: the Neural Engine's compiler is reported to refuse it ({form.refused})"
            console.print(text, markup=False)


def _forms(rules: Sequence[Mapping[str, str]], parts: tuple[str, ...]) -> str:
    """The forms of the rules about these parts, in order; float16 only where it is the only one."""
    forms = dict.fromkeys(rule["form"] for rule in rules if rule["pattern"].startswith((*parts, "*")))
    return ", ".join([form for form in forms if form != PLAIN] or [PLAIN])
