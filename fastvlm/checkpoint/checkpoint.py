"""Find and check a FastVLM checkpoint in either layout, and read its tensors under canonical names. Never writes.

`open_checkpoint` looks at names, shapes, headers and small files only; values are read when asked for.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.checkpoint import folder_kind, layouts, naming
from fastvlm.checkpoint.configuration import ModelConfig, checked_by_transformers, configuration_of, hf_config_of
from fastvlm.checkpoint.shapes import shapes
from fastvlm.checkpoint.weights import TensorInfo, Weights, scan
from fastvlm.common.documents import Fault, read_json
from fastvlm.common.dtypes import DTYPES, Array
from fastvlm.common.errors import UserError
from fastvlm.common.files import beside_faults
from fastvlm.data.preprocessing import Preprocessor, preprocessor_of, read_image_processor

if TYPE_CHECKING:
    import torch
    from transformers import FastVlmConfig, PreTrainedTokenizerBase

__all__ = ["Checkpoint", "Examination", "TensorInfo", "examine", "open_checkpoint"]

_TRAINING_PARTS = (".conv_kxk.", ".conv_scale.", ".identity.", ".large_conv.", ".small_conv.", ".pos_enc.")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder.

    `tensors` holds exactly the parameters and buffers that inference uses, under canonical names; a tied checkpoint has
    no `lm_head.weight` in it even if the file repeats the embeddings. `config` has config.json's checked settings;
    `dtype` is that of most weights; `model_config` says what the weights are (form, tying), whatever config.json
    claims.
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
    _weights: Weights = field(repr=False, compare=False)

    @property
    def image_size(self) -> int:
        """The resolution in pixels."""
        return self.preprocessor.image_size

    @property
    def image_strategy(self) -> str:
        """How a picture becomes square: see `preprocessing.STRATEGIES`."""
        return self.preprocessor.image_strategy

    @cached_property
    def hf_config(self) -> "FastVlmConfig":
        """`model_config` as Transformers has it."""
        return hf_config_of(self.model_config)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Some rows of a tensor by canonical name, in memory of their own; bfloat16 as its bits, uint16."""
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
        return layouts.load_tokenizer(self.path, self.image_token_id)

    def nonfinite(self, advance: Callable[..., Any] | None = None) -> list[str]:
        """Read every weight and return the tensors that hold NaN or infinity; `advance()` after each tensor."""
        bad = []
        for name in self.tensors:
            count = sum(int((~chunk.isfinite()).sum()) for chunk in self.read(name).flatten().split(1 << 24))
            if count:
                bad.append(f"{name} ({count} of {self.tensors[name].size})")
            if advance is not None:
                advance()
        return bad

    def check_finite(self, advance: Callable[..., Any] | None = None) -> None:
        """UserError naming every tensor that `nonfinite` finds."""
        bad = self.nonfinite(advance)
        if bad:
            raise UserError(f"cannot use checkpoint {self.path}: {nonfinite_fault(bad)}")


def nonfinite_fault(bad: list[str]) -> Fault:
    """The fault for tensors that hold NaN or infinity."""
    return Fault(f"NaN or infinite weights in {len(bad)} tensors", tuple(bad))


@dataclass
class Examination:
    """What `examine` found: a checkpoint if there is no fault; `kind` when the folder is something else altogether."""

    path: Path
    kind: folder_kind.FolderKind | None = None
    layout: str | None = None
    checkpoint: Checkpoint | None = None
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def open_checkpoint(path: str | os.PathLike[str], image_strategy: str | None = None) -> Checkpoint:
    """Check the folder at `path` and return it; UserError with every fault if it can't be used.

    `image_strategy` overrides what the folder says of pictures.
    """
    examination = examine(path, image_strategy)
    if examination.checkpoint is None:
        faults = "; ".join(map(str, examination.faults))
        raise UserError(f"cannot use checkpoint {path}: {faults}")
    return examination.checkpoint


def examine(path: str | os.PathLike[str], image_strategy: str | None = None) -> Examination:
    """Check the folder at `path`, collecting every fault and warning instead of stopping at the first."""
    found = Examination(Path(path))
    if not _is_folder(path, found.faults) or _is_other(found):
        return found
    config = _read_config(found.path, found.faults)
    if _is_other(found, config):
        return found
    layout = layouts.layout_of(config, found.faults) if config is not None else None
    found.layout = layout
    if config is None or layout is None:
        return found
    config = layouts.read_config(config, layout, found.faults)
    sound = not found.faults  # else what the weights should be isn't known
    weights = scan(found.path)
    if _is_other(found, config, weights.tensors):
        return found
    found.faults += [Fault(fault) for fault in beside_faults(found.path)]
    found.faults += weights.faults
    found.warnings += weights.warnings
    tensors, unknown = _canonical(weights, layout, found.warnings)
    form = _form(tensors, bool(weights.faults), found)
    vocabulary = layouts.read_vocabulary(found.path, found.faults)
    complete = not weights.faults  # with a shard missing, what the others hold is no news
    processor = read_image_processor(found.path, found.faults)
    preprocessor = preprocessor_of(config, processor, found.faults, found.warnings, image_strategy)
    layouts.check_config(config, layout, form if complete else None, found.faults, found.warnings)
    if not sound:
        return found
    tied = _resolve_tie(weights, tensors, config, layout, found.warnings if complete else [])
    model = checked_by_transformers(configuration_of(config, layout, form, tied), found.faults)
    if model is None:
        return found
    _compare(tensors, unknown, model, tied, complete, found.faults)
    dtype = _dtype(tensors, config, complete, found)
    rows = model.text.vocab_size
    token = layouts.image_token(config, layout, vocabulary, rows, found.faults, found.warnings)
    if not found.faults and preprocessor is not None:
        if tied:
            tensors.pop(naming.LM_HEAD, None)
        if token == rows:
            _add_row(tensors, rows + 1)
            model = replace(model, text=replace(model.text, vocab_size=rows + 1))
        found.checkpoint = Checkpoint(
            found.path, layout, form, config, dtype, preprocessor, token, tied, model, tensors,
            tuple(weights.files), tuple(found.warnings), weights,
        )  # fmt: skip
    return found


def _is_folder(path: str | os.PathLike[str], faults: list[Fault]) -> bool:
    where = Path(path)
    if not where.is_dir():
        faults.append(Fault(folder_kind.of_file(where) if where.exists() else folder_kind.absent(path)))
    return not faults


def _is_other(found: Examination, config: Any = None, tensors: Mapping[str, Any] | None = None) -> bool:
    """Whether the folder is something else by what is known so far; then that alone is the fault."""
    found.kind = folder_kind.identify(found.path, config, tensors or ())
    if found.kind is None:
        return False
    found.faults[:], found.warnings[:] = [Fault(found.kind.line())], []
    return True


def _add_row(tensors: dict[str, TensorInfo], rows: int) -> None:
    """A row for the image token, whose id a loader looks up before the picture's embeddings take its place.

    It repeats the first one: its logit ties with token 0's, so it is never the largest alone, and argmax takes 0.
    """
    for name in {naming.EMBEDDINGS, naming.LM_HEAD} & set(tensors):
        tensors[name] = replace(tensors[name], shape=(rows, *tensors[name].shape[1:]), extended=True)


def _read_config(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.is_file():
        inner = sorted(child.parent.name for child in path.glob("*/config.json"))
        hint = f"; did you mean its folder {inner[0]}?" if inner else ""
        faults.append(Fault(f"not a checkpoint: {path} has no config.json{hint}"))
        return None
    config = read_json(file, faults)
    if config is not None and not isinstance(config, dict):
        faults.append(Fault("config.json: expected a JSON object"))
        return None
    return config


def _canonical(weights: Weights, layout: str, warnings: list[str]) -> tuple[dict[str, TensorInfo], list[str]]:
    rename = naming.from_llava if layout == "llava_qwen2" else naming.from_transformers
    tensors, unknown = {}, []
    prefix = naming.wrapper_prefix(weights.tensors)
    if prefix:
        warnings.append(f"every tensor name begins with {prefix}, which a training wrapper added: read without it")
    for source, info in weights.tensors.items():
        name = rename(source.removeprefix(prefix))
        if naming.is_ignored(source):
            if source.endswith(naming.IMAGE_NEWLINE):
                warnings.append(f"{source} is not used: it ends the rows of tiles, and a picture is one square here")
            continue
        if name is None or name in tensors:
            unknown.append(source)
        else:
            tensors[name] = info
    return tensors, unknown


def _form(tensors: Mapping[str, TensorInfo], incomplete: bool, found: Examination) -> str:
    """`training` or `folded`, from the names of the vision tensors."""
    vision = [name for name in tensors if name.startswith(naming.VISION)]
    training = [name for name in vision if any(part in name for part in _TRAINING_PARTS)]
    folded = [name for name in vision if ".reparam_conv." in name]
    if training and folded:
        line = "the vision tower is partly folded: fold all branches or none; these are already folded"
        found.faults.append(Fault(line, tuple(folded)))
    elif not vision and not incomplete:
        found.faults.append(Fault("no vision tower among the weights: expected a whole FastVLM, not a part of one"))
    return "training" if training else "folded"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _resolve_tie(
    weights: Weights, tensors: Mapping[str, TensorInfo], config: dict[str, Any], layout: str, warnings: list[str]
) -> bool:
    """Whether lm_head is the embeddings: the weights decide, the config is only compared."""
    said = layouts.says_tied(config, layout)
    head, embeddings = tensors.get(naming.LM_HEAD), tensors.get(naming.EMBEDDINGS)
    tied = head is None or (embeddings is not None and _identical(weights, head, embeddings))
    if said is not None and said != tied:
        why = "lm_head.weight is absent" if head is None else "lm_head.weight repeats the embeddings"
        why = why if tied else "lm_head.weight differs from the embeddings"
        used = "tied" if tied else "untied"
        warnings.append(f"config.json says tie_word_embeddings {str(said).lower()}, but {why}: {used} used")
    return tied


def _identical(weights: Weights, a: TensorInfo, b: TensorInfo) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step = 4096  # different ones differ in the first piece
    return all(
        np.array_equal(weights.rows(a, start, start + step), weights.rows(b, start, start + step))
        for start in range(0, a.shape[0], step)
    )


def _compare(
    tensors: Mapping[str, TensorInfo],
    unknown: list[str],
    model: ModelConfig,
    tied: bool,
    complete: bool,
    faults: list[Fault],
) -> None:
    """Names and shapes against those of Transformers' own class."""
    try:
        expected = shapes(model)
    except Exception as error:  # timm builds the tower, and raises anything for widths that don't go together
        faults.append(Fault(f"config.json: no model can be built of these sizes ({_reason(error)})"))
        return
    if tied and naming.LM_HEAD not in tensors:
        expected.pop(naming.LM_HEAD)
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted([tensors[name].source for name in set(tensors) - set(expected)] + unknown)
    misshapen = [
        f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if missing and complete:
        faults.append(Fault(f"{len(missing)} missing tensors", tuple(missing)))
    if unexpected:
        faults.append(Fault(f"{len(unexpected)} unexpected tensors", tuple(unexpected)))
    if misshapen:
        faults.append(Fault(f"{len(misshapen)} tensors of the wrong shape", tuple(misshapen)))


def _dtype(tensors: Mapping[str, TensorInfo], config: dict[str, Any], complete: bool, found: Examination) -> str:
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size
    other = sorted(name for name in sizes if name not in DTYPES)
    if other:
        names = tuple(info.source for info in tensors.values() if info.dtype in other)
        line = (
            f"weights of type {', '.join(other)}, expected {', '.join(DTYPES)} (give the weights before quantization)"
        )
        found.faults.append(Fault(line, names))
    main = max(sizes, key=lambda name: sizes[name], default="float32")
    if not complete:
        return main
    if len(sizes) > 1:
        parts = ", ".join(f"{name} {count:,}" for name, count in sorted(sizes.items()))
        found.warnings.append(f"mixed weight types ({parts} parameters): read as {main}")
    said = config.get("dtype", config.get("torch_dtype"))
    if isinstance(said, str) and said.removeprefix("torch.") != main:
        found.warnings.append(f"config.json says dtype {said}, but most weights are {main}")
    return main
