"""The files that a fine-tune leaves: weights in the form of its kind, tokenizer, evaluation and calibration data."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.common.documents import dump
from fastvlm.common.dtypes import torch_dtype
from fastvlm.common.errors import UserError
from fastvlm.common.files import leaving, licence_files, small_files, stays_inside
from fastvlm.data.default_questions import EVALUATION, TRAINING
from fastvlm.data.records import Record, as_llava, evenly, question_faults
from fastvlm.finetune.model import Trainee, projector_tensors
from fastvlm.finetune.plan import sha256

PROJECTOR = "mm_projector.safetensors"
CALIBRATION = 128  # training records that are kept for calibration
_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|vocab\.json|merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template\.jinja"
)


def write(trainee: Trainee, folder: Path) -> None:
    """Write weights, tokenizer, records and licences into the staged folder."""
    plan = trainee.plan
    copied = [path for path in small_files(plan.checkpoint.path) if _TOKENIZER.fullmatch(path.name)]
    if plan.settings.kind == "projector":
        save_file(projector_tensors(trainee), folder / PROJECTOR, {"format": "pt"})
    elif plan.settings.kind == "adapter":
        _write_adapter(trainee, folder)
    else:
        copied = [path for path in small_files(plan.checkpoint.path) if not path.name.endswith(".index.json")]
        _write_checkpoint(trainee, folder)
    copied += [path for path in licence_files(plan.checkpoint.path) if path.is_file()]
    for path in copied:
        if path.is_symlink() and not stays_inside(path):
            raise UserError(f"{path}: {leaving(path)}")
        shutil.copyfile(path, folder / path.name)
    dump(folder / EVALUATION, _asked(plan.evaluation.records))
    dump(folder / TRAINING, _asked(evenly([r for r in plan.training.records if r.images], CALIBRATION)))


def round_to_stored(trainee: Trainee) -> None:
    """Give a whole checkpoint's trained weights the values that they have in its files, whose dtype is the original's:
    what is asked afterwards is what was written."""
    if trainee.plan.settings.kind != "checkpoint":
        return
    stored = torch_dtype(trainee.plan.checkpoint.dtype)
    for parameter in trainee.parameters().values():
        parameter.data = parameter.detach().to(stored).to(parameter.dtype)


def _write_adapter(trainee: Trainee, folder: Path) -> None:
    trainee.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub for the base's size
    (folder / "README.md").unlink(missing_ok=True)  # an empty form of a model card
    path = folder / "adapter_config.json"
    document = json.loads(path.read_text())
    document["base_model_name_or_path"] = str(trainee.plan.checkpoint.path.resolve())
    document["target_modules"] = sorted(document["target_modules"])  # a set: another order in each process
    dump(path, document)


def _write_checkpoint(trainee: Trainee, folder: Path) -> None:
    """One file of weights with the original's own names and dtype, so that all its other files stay true."""
    checkpoint: Checkpoint = trainee.plan.checkpoint
    trained = trainee.parameters()
    tensors = {}
    for name, info in checkpoint.tensors.items():
        value = trained[name].detach().cpu() if name in trained else checkpoint.read(name)
        rows = info.shape[0] - 1 if info.extended else None  # a row that the file doesn't have
        tensors[info.source] = value[:rows].to(torch_dtype(info.dtype)).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _asked(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Those that can be asked of an exported model, in LLaVA's format."""
    return [as_llava(record) for record in records if not question_faults(record)]


def file_hashes(paths: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {path.name: sha256(path) for path in sorted(paths)}
