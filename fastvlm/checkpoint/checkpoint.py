"""Find and check a FastVLM checkpoint in either layout, and read its tensors under canonical names. Never writes.

`open_checkpoint` looks at names, shapes, headers and small files only; values are read when asked for.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.checkpoint import adapter_folder, fitting, folder_kind, layouts, naming
from fastvlm.checkpoint.adapter import Adapter
from fastvlm.checkpoint.configuration import (
    ModelConfig,
    checked_by_transformers,
    configuration_of,
    hf_config_of,
)
from fastvlm.checkpoint.tensors import canonical, compare, dtype_of, form_of, resolve_tie
from fastvlm.checkpoint.weights import TensorInfo, Weights, scan
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.dtypes import Array
from fastvlm.common.errors import UserError
from fastvlm.common.files import check_small_files
from fastvlm.common.findings import Finding, Steps, collect, errors
from fastvlm.data.preprocessing import Preprocessor, preprocessor_of, read_image_processor

if TYPE_CHECKING:
    import torch
    from transformers import FastVlmConfig, PreTrainedTokenizerBase

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
    if adapter is not None:
        document, adapter = yield from fitting.settings_of(document, adapter, path)
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
        tensors, form, tied, config = yield from fitting.merge(adapter, weights, tensors, tied, config, layout)
    model = yield from checked_by_transformers(configuration_of(config, layout, form, tied))
    if model is None:
        return None
    yield from compare(tensors, unknown, model, tied, complete)
    rows = model.text.vocab_size
    token = yield from layouts.image_token(config, layout, vocabulary, rows)
    if preprocessor is None:
        return None
    if adapter is not None:
        yield from fitting.same_pictures(adapter, preprocessor)
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
