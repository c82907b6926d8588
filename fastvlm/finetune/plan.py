"""What a fine-tune would do, resolved before any work: data read, checked, encoded and split, everything counted."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fastvlm.common.cli import progress
from fastvlm.common.dtypes import choose_device
from fastvlm.common.errors import UserError
from fastvlm.common.image_tokens import tokens_per_image
from fastvlm.data import records as data
from fastvlm.data.labels import NOT_LEARNT, Encoded, encode_records
from fastvlm.data.records import Record
from fastvlm.finetune.settings import LINEAR, Settings

DONE = "finetune.json"  # in a finished folder
_STATISTICS = (".running_mean", ".running_var")  # BatchNorm's, which training leaves as they are


@dataclass(frozen=True)
class Part:
    """The records of training or of evaluation, and what the model reads of them."""

    records: list[Record]
    encoded: list[Encoded]

    @property
    def pictures(self) -> list[Path]:
        """Each picture once, in the order of the records."""
        return list(dict.fromkeys(path for record in self.records for path in record.images))

    def document(self) -> dict[str, int]:
        """How many records, pictures and tokens, and how many of these are learnt."""
        learnt = sum(label != NOT_LEARNT for _, labels in self.encoded for label in labels)
        return {
            "records": len(self.records),
            "pictures": len(self.pictures),
            "tokens": sum(len(ids) for ids, _ in self.encoded),
            "learnt_tokens": learnt,
        }


@dataclass(frozen=True)
class Plan:
    """A fine-tune whose inputs are checked. `evaluation` may be empty."""

    settings: Settings
    checkpoint: Checkpoint
    training: Part
    evaluation: Part

    @property
    def steps(self) -> int:
        """The optimizer's steps."""
        return self.settings.steps(len(self.training.records))

    def document(self) -> dict[str, Any]:
        """What would be trained, on what."""
        trained, total = parameters(self.checkpoint, self.settings)
        return {
            "settings": self.settings.document(),
            "kind": self.settings.kind,
            "parameters": {"trained": trained, "total": total},
            "steps": self.steps,
            "training": self.training.document(),
            "evaluation": self.evaluation.document(),
        }


def plan(settings: Settings) -> Plan:
    """Check everything and resolve it, without writing. UserError that names every fault of the data at once."""
    target = settings.output_dir.expanduser()
    if target.exists() and not (settings.overwrite and (target / DONE).is_file()):
        remedy = "choose another" if settings.overwrite else "give --overwrite to replace it, or choose another"
        what = f"holds no {DONE}, so no fine-tune wrote it" if settings.overwrite else "exists already"
        raise UserError(f"--output-dir {settings.output_dir}: {what}: {remedy}")
    choose_device(settings.device)  # refuses one that isn't there
    checkpoint = open_checkpoint(settings.checkpoint)
    faults: list[str] = []
    given = _tried(faults, "--data", lambda: data.read_records(settings.data, settings.image_folder)) or []
    kept: list[Record] = []
    if (place := settings.evaluation_data) is not None:
        kept = _tried(faults, "--evaluation-data", lambda: data.read_records(place, settings.image_folder)) or []
    elif settings.evaluation_split:
        given, kept = split(given, settings.evaluation_split, settings.seed)
    everything = [*given, *kept]
    with progress("check (pictures)"):
        _tried(faults, "--data", lambda: data.check(everything))
    with progress("encode (records)", len(everything)) as advance:
        encoded = _tried(faults, "--data", lambda: _encode(checkpoint, everything, advance)) or []
    if faults:
        raise UserError("; ".join(faults))
    if not given:
        raise UserError(f"--data {settings.data}: all records are for evaluation: give a smaller --evaluation-split")
    count = len(given)
    return Plan(settings, checkpoint, Part(given, encoded[:count]), Part(kept, encoded[count:]))


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """The records for training and for evaluation, about a `share` of them, in their order.

    Records that share a picture stay together: an answer about a picture that was trained with proves little.
    """
    leads: dict[Path, Path] = {}  # from a picture to another of its group, up to the one that stands for all

    def lead(path: Path) -> Path:
        while leads.setdefault(path, path) != path:
            path = leads[path]
        return path

    for record in records:
        for path in record.images[1:]:
            leads[lead(path)] = lead(record.images[0])
    owners = [str(lead(record.images[0])) if record.images else f"text {at}" for at, record in enumerate(records)]
    sizes = Counter(owners)
    groups = [*sizes]
    chosen: set[str] = set()
    wanted, taken = share * len(records), 0
    for place in np.random.default_rng([seed, 5]).permutation(len(groups)):
        if taken >= wanted:
            break
        chosen.add(groups[place])
        taken += sizes[groups[place]]
    training = [record for record, owner in zip(records, owners) if owner not in chosen]
    return training, [record for record, owner in zip(records, owners) if owner in chosen]


def parameters(checkpoint: Checkpoint, settings: Settings) -> tuple[int, int]:
    """How many parameters are trained, and how many the model has (LoRA's included)."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if not name.endswith(_STATISTICS)}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    lora = 0
    if settings.kind == "adapter":
        linear = [f"{name}.weight" for name in LINEAR]
        for name, shape in shapes.items():
            if name.startswith(naming.LANGUAGE) and name.endswith(tuple(linear)):
                lora += settings.lora_rank * sum(shape)
    prefixes = trained_prefixes(settings)
    whole = sum(int(np.prod(shape)) for name, shape in shapes.items() if name.startswith(prefixes))
    copies = whole if settings.kind == "adapter" else 0  # PEFT keeps the original beside what it trains in full
    return lora + whole, total + lora + copies


def trained_prefixes(settings: Settings) -> tuple[str, ...]:
    """The beginnings of the canonical names of all weights that are trained themselves."""
    prefixes = [naming.PROJECTOR]
    if settings.kind == "checkpoint":
        prefixes += [naming.LANGUAGE, naming.LM_HEAD]
    if settings.train == "all":
        prefixes.append(naming.VISION)
    return tuple(prefixes)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pictures_sha256(paths: Iterable[Path]) -> str:
    """One sha256 over the content of all pictures, in their order."""
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def _encode(checkpoint: Checkpoint, records: Sequence[Record], advance: Callable[[], Any]) -> list[Encoded]:
    tokenizer: Any = checkpoint.tokenizer()
    longest = min(tokenizer.model_max_length, checkpoint.model_config.text.max_position_embeddings)
    image_tokens = tokens_per_image(checkpoint.image_size)
    return encode_records(records, tokenizer, checkpoint.image_token_id, image_tokens, longest, advance)


def _tried(faults: list[str], flag: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; None, and a fault more, where it raises."""
    try:
        return read()
    except UserError as error:
        faults.append(f"{flag}: {error}")
        return None
