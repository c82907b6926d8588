"""Adapters: what a fine-tune left beside a checkpoint, read whole and checked, before it is fitted to one.

`adapter_folder.read` tells the kind by the files and hands over to its reader, and `fitting.fit` puts what was found
into a checkpoint's tensors. Values are read when they are asked for, and nothing is ever written.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvlm.checkpoint.merging import Factors
from fastvlm.checkpoint.weights import TensorInfo


@dataclass
class Parts:
    """What an adapter holds, by the names that its tensors or modules had in the model that was trained.

    Args:
        whole: tensors that take the place of the base's.
        factors: products that are added to a module's weight.
        added: tensors that are added to the base's, and what they are multiplied by.
        tokens: rows of a module's weight that take the place of the base's: their numbers, their values.
        saved: modules that it says it holds whole.
        tied: what is done to the embeddings is done to the head, too, where both are one matrix.
    """

    whole: dict[str, TensorInfo] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    added: dict[str, tuple[TensorInfo, float]] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    tied: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read.

    `kind` in a few words ("PEFT LoRA"); `base`: the model that it says it is for; `files`: those that hold it. `brings`
    are the small files of a checkpoint that it has and that are used instead of the base's: "config", "tokenizer" and
    "processor".
    """

    path: Path
    kind: str
    base: str | None
    files: tuple[Path, ...]
    brings: frozenset[str] = frozenset()
    parts: Parts = field(default_factory=Parts, repr=False, compare=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What it changes: numbers of tensors and rows, ranks and scales."""
        parts = self.parts
        facts = {
            "adapted_matrices": len(parts.factors),
            "ranks": sorted({factors.rank for factors in parts.factors.values()}),
            "scales": sorted({round(factors.scale, 6) for factors in parts.factors.values()}),
            "replaced_tensors": len(parts.whole),
            "token_rows": sum(len(index) for index, _ in parts.tokens.values()),
            "brings": sorted(self.brings),
        }
        return {name: fact for name, fact in facts.items() if fact}
