"""An adapter put into a checkpoint: its tensors, and its settings. What doesn't fit is listed, all at once."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastvlm.checkpoint import layouts, naming
from fastvlm.checkpoint.adapter import Adapter, Parts
from fastvlm.checkpoint.configuration import configuration_of
from fastvlm.checkpoint.merging import Added, Factors, LowRank, Replaced
from fastvlm.checkpoint.shapes import shapes
from fastvlm.checkpoint.tensors import form_of, is_training, resolve_tie
from fastvlm.checkpoint.weights import TensorInfo, Weights
from fastvlm.common.documents import Unreadable, load_object, object_or_empty, shown
from fastvlm.common.findings import Finding, Steps, collect
from fastvlm.data.preprocessing import Preprocessor, preprocessor_of

_QUANTIZATION = ("quantization_config", "quantization")
_OF_TRANSFORMERS = ("language_model.", "multi_modal_projector.", "timm_model.")  # in names, and not in LLaVA's
_VOCABULARY = (naming.EMBEDDINGS, naming.LM_HEAD)  # what a resized vocabulary gives other rows


def settings_of(document: dict[str, Any], adapter: Adapter, path: Path) -> Steps[tuple[dict[str, Any], Adapter]]:
    """config.json's document for the checkpoint at `path`: the adapter's own where it brings one of the same layout, as
    LLaVA's loader takes it."""
    named, own_name = Path(adapter.base or "").name, path.resolve().name
    if named and named.casefold() != own_name.casefold():  # what doesn't fit has other shapes
        yield Finding("adapter-base", "adapter", f"the base {named}", f"{own_name}, by its name", severity="warning")
    if "config" not in adapter.brings:
        return document, adapter
    file = adapter.path / "config.json"
    try:
        own = load_object(file)
    except Unreadable as error:
        yield error.finding(str(file))
        return document, adapter
    if own.get("model_type") == document.get("model_type"):  # how the base was loaded for training isn't what it is
        return {key: value for key, value in own.items() if key not in _QUANTIZATION}, adapter
    got, expected = shown(own.get("model_type")), f"{shown(document.get('model_type'))}: the checkpoint's file is used"
    yield Finding("config-ignored", f"{file}: model_type", got, expected, severity="warning")
    return document, replace(adapter, brings=adapter.brings - {"config"})


def same_pictures(adapter: Adapter, preprocessor: Preprocessor) -> Iterable[Finding]:
    """Yield a finding where the adapter has a config.json of the other layout, which is not used, and that says that it
    was trained on pictures of another size or shape."""
    own = object_or_empty(adapter.path / "config.json")
    if "config" in adapter.brings or own.get("model_type") not in layouts.LAYOUTS:
        return
    config, _ = collect(layouts.read_config(own, own["model_type"]))
    trained, _ = collect(preprocessor_of(config, {}))
    sizes = [(each.image_size, each.image_strategy) for each in (trained, preprocessor) if each is not None]
    if len(set(sizes)) > 1:
        got, expected = (f"pictures of {size} pixels, {strategy}" for size, strategy in sizes)
        remedy = "give the checkpoint in the layout that it was trained in"
        yield Finding("adapter-pictures", str(adapter.path / "config.json"), got, f"{expected}, the base's", remedy)


def merge(
    adapter: Adapter,
    weights: Weights,
    tensors: Mapping[str, TensorInfo],
    tied: bool,
    config: dict[str, Any],
    layout: str,
) -> Steps[tuple[dict[str, TensorInfo], str, bool, dict[str, Any]]]:
    """Tensors, form of the tower, tie of the head and settings of what an adapter makes of a checkpoint's."""

    def towers(form: str) -> Collection[str]:
        try:
            names = shapes(configuration_of(config, layout, form, tied))
        except Exception:  # what timm raises for widths that don't go together; `tensors.compare` says so
            return ()
        return [name for name in names if name.startswith(naming.VISION)]

    merged = yield from fit(adapter.parts, tensors, tied, towers)
    form, _ = collect(form_of(merged, False))
    still, _ = collect(resolve_tie(weights, merged, config, layout))
    if tied and not still:
        got, expected = "changes of one of the two", "one matrix, as in the base: lm_head gets its own"
        yield Finding("adapter-unties", "embeddings and lm_head", got, expected, severity="warning")
    settings: dict[str, Any] = {"tie_word_embeddings": still}
    before, after = (held.get(naming.EMBEDDINGS) for held in (tensors, merged))
    if before is not None and after is not None and before.shape != after.shape:  # the vocabulary was resized
        settings["vocab_size"] = after.shape[0]
    if layout != "llava_qwen2":
        settings = {"tie_word_embeddings": still, "text_config": config.get("text_config", {}) | settings}
    return merged, form, still, config | settings


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
