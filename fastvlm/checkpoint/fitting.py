"""An adapter's parts put into a checkpoint's tensors: what doesn't fit is listed, all at once."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.adapter import Parts
from fastvlm.checkpoint.merging import Added, Factors, LowRank, Replaced
from fastvlm.checkpoint.tensors import is_training
from fastvlm.checkpoint.weights import TensorInfo
from fastvlm.common.findings import Finding, Steps

_OF_TRANSFORMERS = ("language_model.", "multi_modal_projector.", "timm_model.")  # in names, and not in LLaVA's
_VOCABULARY = (naming.EMBEDDINGS, naming.LM_HEAD)  # what a resized vocabulary gives other rows


def fit(
    parts: Parts, tensors: Mapping[str, TensorInfo], tied: bool, towers: Callable[[str], Collection[str]]
) -> Steps[dict[str, TensorInfo]]:
    """The tensors with an adapter's parts in them, by canonical name.

    `tied`: the head is the embeddings; `towers` gives the names of a whole vision tower in a form.

    PEFT trains a tied head and its embeddings apart from each other where an adapter names one of them, but for rows of
    tokens and with `ensure_weight_tying`. So does this: then the head gets a tensor of its own.
    """
    fitting = _Fitting(dict(tensors))
    yield from _take_tower(fitting, parts.whole, towers)
    embeddings = tensors.get(naming.EMBEDDINGS)
    if tied and embeddings is not None:
        fitting.tensors[naming.LM_HEAD] = embeddings
    yield from _missing(parts, tensors)
    for name, info in parts.whole.items():
        fitting.replace(name, info)
    for module, factors in parts.factors.items():
        fitting.multiply(f"{module}.weight", factors)
    for name, (info, scale) in parts.added.items():
        fitting.add(name, info, scale)
    for module, (index, values) in parts.tokens.items():
        fitting.put_rows(f"{module}.weight", index, values)
    yield from fitting.findings()
    _settle_head(fitting, parts, tied)
    return fitting.tensors


def _missing(parts: Parts, tensors: Mapping[str, TensorInfo]) -> Iterable[Finding]:
    """Modules that the adapter's settings call trained and saved, and of which it has nothing."""
    held = [*parts.whole, *(f"{module}." for module in parts.tokens)]
    llava = not any(part in name for name in (*held, *parts.factors) for part in _OF_TRANSFORMERS)
    names = [naming.to_llava(name) if llava else name for name in tensors]

    def has(module: str, where: Iterable[str]) -> bool:
        return any(f".{module}." in f".{name}" for name in where)

    absent = tuple(module for module in parts.saved if has(module, names) and not has(module, held))
    if absent:
        got, expected = f"none of {len(absent)} modules in modules_to_save", "their trained weights"
        remedy = "save the adapter again with all of its shards gathered"
        yield Finding("adapter-module-missing", "adapter's tensors", got, expected, remedy, details=absent)


def _take_tower(
    fitting: "_Fitting", whole: Mapping[str, TensorInfo], towers: Callable[[str], Collection[str]]
) -> Iterable[Finding]:
    """Take a vision tower in another form than the base's where it is whole, and yield a finding where it isn't."""
    names = {naming.of_trained(name, fitting.tensors): name for name in whole if not naming.is_ignored(name)}
    own = {name for name in fitting.tensors if name.startswith(naming.VISION)}
    brought = {name: source for name, source in names.items() if name is not None and name.startswith(naming.VISION)}
    if brought.keys() <= own:
        return
    form = "training" if any(map(is_training, brought)) else "folded"
    missing = sorted(set(towers(form)) - brought.keys())
    got = f"a vision tower in the {form} form"
    if missing or not set(towers(form)):
        expected = "one in the checkpoint's form, or all of it"
        yield Finding(
            "adapter-tower", "adapter", f"{got}, without {len(missing)} tensors", expected, details=tuple(missing)
        )
        fitting.left_out.update(brought.values())
        return
    yield Finding("adapter-tower", "adapter", got, "the checkpoint's: it takes its place whole", severity="warning")
    fitting.tensors = {name: info for name, info in fitting.tensors.items() if name not in own}
    fitting.tensors |= {name: whole[source] for name, source in brought.items()}
    fitting.left_out.update(brought.values())


def _settle_head(fitting: "_Fitting", parts: Parts, tied: bool) -> None:
    """Let a tied head stay one where nothing was done to one of the two alone."""
    touched = fitting.touched.get(naming.EMBEDDINGS, set())
    if tied and naming.LM_HEAD not in fitting.touched and (parts.tied or touched <= {"tokens"}):
        fitting.tensors.pop(naming.LM_HEAD, None)


class _Fitting:
    """The tensors as they change, and what was found on the way."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.touched: dict[str, set[str]] = {}
        self.left_out: set[str] = set()  # whole tensors that are dealt with
        self._unknown: list[str] = []
        self._misshapen: list[str] = []
        self._twice: list[str] = []

    def replace(self, name: str, info: TensorInfo) -> None:
        """Put a whole tensor in the base's place."""
        if name in self.left_out or naming.is_ignored(name) or (target := self._target(name, "whole")) is None:
            return
        base = self.tensors[target].shape
        if info.shape != base and not (target in _VOCABULARY and info.shape[1:] == base[1:]):
            self._misshapen.append(f"{name} {list(info.shape)}, expected {list(base)}")
            return
        self.tensors[target] = info

    def multiply(self, name: str, factors: Factors) -> None:
        """Add a product of two factors."""
        if (target := self._target(name, "factors")) is None:
            return
        base = self.tensors[target].shape
        if len(base) < 2 or not self._fits(factors, base):
            shapes = " and ".join(str(list(info.shape)) for info in (factors.right, factors.left))
            self._misshapen.append(f"{name}: factors of {shapes}, expected some of {list(base)}")
            return
        self._change(target, lambda info: LowRank(info, factors))

    @staticmethod
    def _fits(factors: Factors, base: tuple[int, ...]) -> bool:
        left, right = factors.left.shape, factors.right.shape
        if factors.transposed:
            fits = (left[1:], right[:1], len(left), len(right)) == (base[:1], base[1:], 2, 2)
        else:
            fits = left[0] == base[0] and math.prod(left[2:]) == 1 and right[1:] == base[1:]
        lengths = base[0] if factors.along == "rows" else base[1]
        return fits and (factors.magnitude is None or factors.magnitude.size == lengths)

    def add(self, name: str, info: TensorInfo, scale: float) -> None:
        """Add a tensor."""
        if (target := self._target(name, "added")) is None:
            return
        if info.shape != self.tensors[target].shape:
            self._misshapen.append(f"{name} {list(info.shape)}, expected {list(self.tensors[target].shape)}")
            return
        self._change(target, lambda base: Added(base, info, scale))

    def put_rows(self, name: str, index: tuple[int, ...], values: TensorInfo) -> None:
        """Replace rows."""
        if (target := self._target(name, "tokens")) is None:
            return
        base = self.tensors[target].shape
        if values.shape[1:] != base[1:] or max(index, default=0) >= base[0]:
            got = f"{list(values.shape)} for tokens up to {max(index, default=0)}"
            self._misshapen.append(f"{name}: rows {got}, expected some of {list(base)}")
            return
        self._change(target, lambda info: Replaced(info, index, values))

    def _change(self, target: str, change: Callable[[TensorInfo], LowRank | Added | Replaced]) -> None:
        base = self.tensors[target]
        self.tensors[target] = replace(base, dtype="float32", change=change(base))

    def _target(self, name: str, how: str) -> str | None:
        target = naming.of_trained(name, self.tensors)
        if target is None or target not in self.tensors:
            self._unknown.append(name)
            return None
        if how in self.touched.get(target, ()):
            self._twice.append(name)
            return None
        self.touched.setdefault(target, set()).add(how)
        return target

    def findings(self) -> Iterable[Finding]:
        """What doesn't fit."""
        kinds = {
            "adapter-target-unknown": (self._unknown, "of modules that the checkpoint doesn't have"),
            "adapter-misshapen": (self._misshapen, "that don't fit the checkpoint"),
            "adapter-twice": (self._twice, "for what another one is for, too"),
        }
        for rule, (names, what) in kinds.items():
            if names:
                expected = "those of the model that it was trained on"
                yield Finding(rule, "adapter", f"{len(names)} tensors {what}", expected, details=tuple(names))
