"""Find and check a FastVLM checkpoint in either layout, and read its tensors under canonical names. Never writes.

`open_checkpoint` looks at names, shapes, headers and small files only; values are read when asked for.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import adapter_folder, folder_kind, layouts, naming
from fastvlm.checkpoint.adapter import Adapter
from fastvlm.checkpoint.configuration import (
    ModelConfig,
    checked_by_transformers,
    configuration_of,
    hf_config_of,
)
from fastvlm.checkpoint.fitting import fit
from fastvlm.checkpoint.shapes import shapes
from fastvlm.checkpoint.tensors import canonical, compare, dtype_of, form_of, resolve_tie
from fastvlm.checkpoint.weights import TensorInfo, Weights, scan
from fastvlm.common.documents import Unreadable, load_object, shown
from fastvlm.common.dtypes import Array
from fastvlm.common.errors import UserError
from fastvlm.common.files import check_small_files
from fastvlm.common.findings import Finding, Steps, collect, errors
from fastvlm.data.preprocessing import Preprocessor, preprocessor_of, read_image_processor

if TYPE_CHECKING:
    import torch
    from transformers import FastVlmConfig, PreTrainedTokenizerBase

_QUANTIZATION = ("quantization_config", "quantization")

__all__ = ["Checkpoint", "Examination", "TensorInfo", "examine", "open_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder.

    `tensors` holds exactly the parameters and buffers that inference uses, under canonical names; a tied checkpoint has
    no `lm_head.weight` in it even if the file repeats the embeddings. `config` has config.json's checked settings;
    `dtype` is that of most weights; `model_config` says what the weights are (form, tying), whatever config.json
    claims. With an `adapter`, all of this is the merged model's: tensors that it changes are merged, in float32, when
    they are read, and `files` has its files, too.
    """

    path: Path
    layout: str
    form: str
    config: dict[str, Any]
    dtype: str
    preprocessor: Preprocessor
    image_token_id: int
    tied: bool
    model_config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    warnings: tuple[str, ...]
    adapter: Adapter | None
    _weights: Weights = field(repr=False, compare=False)

    @property
    def image_size(self) -> int:
        """The resolution in pixels."""
        return self.preprocessor.image_size

    @property
    def image_strategy(self) -> str:
        """How a picture becomes square: see `preprocessing.STRATEGIES`."""
        return self.preprocessor.image_strategy

    @property
    def tokenizer_path(self) -> Path:
        """The folder with the tokenizer's files: the adapter's where it brings a tokenizer, else the checkpoint's."""
        return _place(self.path, self.adapter, "tokenizer")

    @property
    def config_path(self) -> Path:
        """The config.json that was read: the adapter's where it brings one."""
        return _place(self.path, self.adapter, "config") / "config.json"

    @cached_property
    def hf_config(self) -> "FastVlmConfig":
        """`model_config` as Transformers' class."""
        return hf_config_of(self.model_config)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the tensor with this canonical name, copied; bfloat16 as its bits, uint16."""
        return self._weights.rows(self.tensors[name], start, stop)

    def read(self, name: str, mapped: bool = False, alone: bool = False) -> "torch.Tensor":
        """One tensor by canonical name, in the file's dtype; `mapped` leaves it in the file (don't change it then), and
        `alone` in a mapping that ends with it."""
        return self._weights.read(self.tensors[name], mapped, alone)

    def unmap(self) -> None:
        """Give back the memory of files that were read mapped, where no tensor uses it any more."""
        self._weights.unmap()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, with `<image>` at `image_token_id`, read once; UserError if the files don't give one."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return layouts.load_tokenizer(self.tokenizer_path, self.image_token_id)

    def check_finite(self, advance: Callable[..., Any] | None = None) -> Iterator[Finding]:
        """Read every weight and yield a finding where tensors hold NaN or infinity; `advance()` after each tensor."""
        bad = []
        for name in self.tensors:
            count = sum(int((~chunk.isfinite()).sum()) for chunk in self.read(name).flatten().split(1 << 24))
            if count:
                bad.append(f"{name} ({count} of {self.tensors[name].size})")
            if advance is not None:
                advance()
        if bad:
            got = f"NaN or infinite values in {len(bad)} tensors"
            yield Finding("weights-not-finite", str(self.path), got, "finite weights", details=tuple(bad))


@dataclass
class Examination:
    """The result of `examine`: a checkpoint if there is no error; `kind` where the folder is of another kind."""

    path: Path
    kind: folder_kind.FolderKind | None = None
    layout: str | None = None
    checkpoint: Checkpoint | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        """The findings that keep the checkpoint from being used."""
        return errors(self.findings)

    @property
    def warnings(self) -> list[Finding]:
        """The findings with which it can be used."""
        return [finding for finding in self.findings if finding.severity == "warning"]


def open_checkpoint(
    path: str | os.PathLike[str], image_strategy: str | None = None, adapter: Path | None = None
) -> Checkpoint:
    """Check the folder at `path` and return it; UserError with every fault if it can't be used.

    `image_strategy` overrides what the folder says of pictures; `adapter` is the folder of one that is merged into the
    checkpoint as it is read.
    """
    examination = examine(path, image_strategy, adapter)
    if examination.checkpoint is None:
        what = f"checkpoint {folder_kind.as_typed(path)}" + (f" with adapter {adapter}" if adapter else "")
        raise UserError(f"cannot use {what}: {'; '.join(map(str, examination.faults))}")
    return examination.checkpoint


def examine(
    path: str | os.PathLike[str], image_strategy: str | None = None, adapter: Path | None = None
) -> Examination:
    """Check the folder at `path`, collecting every finding instead of stopping at the first; see `open_checkpoint`."""
    examination = Examination(Path(path))
    if not examination.path.is_dir():
        examination.findings = [folder_kind.not_a_folder(path)]
        return examination
    try:
        steps = _steps(examination, image_strategy, adapter)
        examination.checkpoint, examination.findings = collect(steps)
    except _OtherKind as other:
        examination.kind, examination.findings = other.kind, [other.kind.finding()]
    if examination.faults or examination.checkpoint is None:
        examination.checkpoint = None
    else:
        examination.checkpoint = replace(examination.checkpoint, warnings=tuple(map(str, examination.warnings)))
    return examination


class _OtherKind(Exception):
    """The folder is something else than a checkpoint: then that alone is the finding."""

    def __init__(self, kind: folder_kind.FolderKind) -> None:
        self.kind = kind


def _refuse_other(path: Path, config: Any = None, tensors: Collection[str] = ()) -> None:
    """Raise _OtherKind where the folder's files, `config` or `tensors` show another kind."""
    if (kind := folder_kind.identify(path, config, tensors)) is not None:
        raise _OtherKind(kind)


def _steps(examination: Examination, image_strategy: str | None, folder: Path | None) -> Steps[Checkpoint | None]:
    path = examination.path
    _refuse_other(path)
    adapter = None if folder is None else (yield from adapter_folder.read(folder))
    document = yield from _read_config(path)
    _refuse_other(path, document)
    layout = None if document is None else (yield from layouts.layout_of(document))
    examination.layout = layout
    if document is None or layout is None:
        return None
    document, adapter = yield from _settings_of(document, adapter)
    yield from _name_findings(path, adapter)
    config, config_findings = collect(layouts.read_config(document, layout))
    weights, weight_findings = collect(scan(path))
    _refuse_other(path, config, weights.tensors)
    yield from (*config_findings, *check_small_files(path), *weight_findings)
    complete = not errors(weight_findings)  # with a shard missing, what the others hold is no news
    tensors, unknown = yield from canonical(weights, layout)
    form, form_findings = collect(form_of(tensors, complete))
    yield from form_findings
    vocabulary, vocabulary_findings = collect(layouts.read_vocabulary(_place(path, adapter, "tokenizer")))
    yield from vocabulary_findings
    processor = yield from read_image_processor(_place(path, adapter, "processor"))
    preprocessor = yield from preprocessor_of(config, processor, image_strategy)
    yield from layouts.check_config(config, layout, form if complete else None)
    if config_findings:  # what the weights should be isn't known
        return None
    tied, tie_findings = collect(resolve_tie(weights, tensors, config, layout))
    yield from tie_findings if complete else ()
    dtype = yield from dtype_of(tensors, config, complete)
    if adapter is not None and complete:
        towers = partial(_tower, config, layout, tied)
        base, was_tied = tensors, tied
        tensors = yield from fit(adapter.parts, base, tied, towers)
        form, tied, config = _as_merged(weights, base, tensors, config, layout)
        if was_tied and not tied:
            got, expected = "changes of one of the two", "one matrix, as in the base: lm_head gets its own"
            yield Finding("adapter-unties", "embeddings and lm_head", got, expected, severity="warning")
    model = yield from checked_by_transformers(configuration_of(config, layout, form, tied))
    if model is None:
        return None
    yield from compare(tensors, unknown, model, tied, complete)
    rows = model.text.vocab_size
    token = yield from layouts.image_token(config, layout, vocabulary, rows)
    if preprocessor is None:
        return None
    if tied:
        tensors.pop(naming.LM_HEAD, None)
    if token == rows:
        _add_row(tensors, rows + 1)
        model = replace(model, text=replace(model.text, vocab_size=rows + 1))
    files = (*weights.files, *(() if adapter is None else adapter.files))
    return Checkpoint(
        path, layout, form, config, dtype, preprocessor, token, tied, model, tensors, files, (), adapter, weights
    )


def _place(path: Path, adapter: Adapter | None, what: str) -> Path:
    """The folder that "config", "tokenizer" or "processor" is read from."""
    return adapter.path if adapter is not None and what in adapter.brings else path


def _settings_of(document: dict[str, Any], adapter: Adapter | None) -> Steps[tuple[dict[str, Any], Adapter | None]]:
    """config.json's document, the adapter's where it brings one of the same layout, as LLaVA's loader takes it."""
    if adapter is None or "config" not in adapter.brings:
        return document, adapter
    try:
        own = load_object(adapter.path / "config.json")
    except Unreadable as error:
        yield error.finding(str(adapter.path / "config.json"))
        return document, adapter
    if own.get("model_type") == document.get("model_type"):  # how the base was loaded for training isn't what it is
        return {key: value for key, value in own.items() if key not in _QUANTIZATION}, adapter
    where = f"{adapter.path / 'config.json'}: model_type"
    got, expected = shown(own.get("model_type")), f"{shown(document.get('model_type'))}: the checkpoint's file is used"
    yield Finding("config-ignored", where, got, expected, severity="warning")
    return document, replace(adapter, brings=adapter.brings - {"config"})


def _name_findings(path: Path, adapter: Adapter | None) -> Iterator[Finding]:
    """A base of another name is only a warning: what doesn't fit has other shapes."""
    named, own = Path("" if adapter is None else adapter.base or "").name, path.resolve().name
    if named and named.casefold() != own.casefold():
        yield Finding("adapter-base", "adapter", f"the base {named}", f"{own}, by its name", severity="warning")


def _tower(config: dict[str, Any], layout: str, tied: bool, form: str) -> Collection[str]:
    """The names of a whole vision tower in a form, none where the settings make none."""
    try:
        return [name for name in shapes(configuration_of(config, layout, form, tied)) if name.startswith(naming.VISION)]
    except Exception:  # what timm raises for widths that don't go together; `compare` says so
        return ()


def _as_merged(
    weights: Weights,
    base: Mapping[str, TensorInfo],
    tensors: Mapping[str, TensorInfo],
    config: dict[str, Any],
    layout: str,
) -> tuple[str, bool, dict[str, Any]]:
    """Form, tying and settings of the tensors that an adapter makes of the base's."""
    form, _ = collect(form_of(tensors, False))
    tied, _ = collect(resolve_tie(weights, tensors, config, layout))
    settings: dict[str, Any] = {"tie_word_embeddings": tied}
    before, after = (held.get(naming.EMBEDDINGS) for held in (base, tensors))
    if before is not None and after is not None and before.shape != after.shape:  # the vocabulary was resized
        settings["vocab_size"] = after.shape[0]
    if layout == "llava_qwen2":
        return form, tied, config | settings
    return form, tied, config | {"tie_word_embeddings": tied, "text_config": config.get("text_config", {}) | settings}


def _add_row(tensors: dict[str, TensorInfo], rows: int) -> None:
    """A row for the image token, whose id a loader looks up before the picture's embeddings take its place.

    It repeats the first one: its logit ties with token 0's, so it is never the largest alone, and argmax takes 0.
    """
    for name in {naming.EMBEDDINGS, naming.LM_HEAD} & set(tensors):
        tensors[name] = replace(tensors[name], shape=(rows, *tensors[name].shape[1:]), extended=True)


def _read_config(path: Path) -> Steps[dict[str, Any] | None]:
    file = path / "config.json"
    if not file.is_file():
        yield folder_kind.without_config(path)
        return None
    try:
        return load_object(file)
    except Unreadable as error:
        yield error.finding(file.name)
        return None
