"""Adapters: what a fine-tune left beside a checkpoint, read whole and checked, before it is fitted to one.

`read` tells the kind by the files and hands over to its reader; `fastvlm.checkpoint.fitting` puts what it found into a
checkpoint's tensors. Values are read when they are asked for, and nothing is ever written.
"""

from collections.abc import Mapping
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
        factors: products that are added to a module's weight; `embeddings` are those of an embedding.
        added: tensors that are added to the base's, and what they are multiplied by.
        tokens: rows of a module's weight that take the place of the base's: their numbers, their values.
        tied: the same is done to the head where it is the embeddings.
    """

    whole: dict[str, TensorInfo] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    added: dict[str, tuple[TensorInfo, float]] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    tied: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read.

    `kind` in a few words ("PEFT LoRA"); `base`: the model that it says it is for; `files`: those that decide what it
    is; `facts`: what it changes, for a report; `tokenizer_path`: its own folder where it brings a tokenizer.
    """

    path: Path
    kind: str
    base: str | None
    files: tuple[Path, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_path: Path | None = None
    parts: Parts = field(default_factory=Parts, repr=False, compare=False)
