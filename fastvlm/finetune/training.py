"""Training by Transformers' Trainer: batches, states that a killed run goes on from, losses."""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  named where it is missing; Trainer would say so only later, and in other words
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fastvlm.common.cli import Step, log, progress
from fastvlm.common.errors import CheckFailed
from fastvlm.data.labels import NOT_LEARNT, Encoded, collate
from fastvlm.data.records import Record
from fastvlm.finetune.model import Pictures, Trainee
from fastvlm.finetune.plan import Part

Example = tuple[Record, Encoded]
_SAID = 5  # one of so many logged losses is printed, too
_STATE = "trainer_state.json"  # what Trainer writes last into a state's folder


def train(trainee: Trainee, pictures: Pictures, states: Path, dtype: str) -> list[dict[str, float]]:
    """Train to the end, from the newest whole state in `states` if there is one; returns Trainer's log.

    A state is Trainer's own: the optimizer, the schedule, the random numbers and the place in the data, with the
    trained weights. It ends with the same weights as a run that was never stopped, on the same machine.
    """
    plan, settings = trainee.plan, trainee.plan.settings
    logged, saved = settings.rhythm(plan.steps)
    arguments = TrainingArguments(
        output_dir=str(states),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.rates[0],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * plan.steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=trainee.device == "cpu",
        logging_steps=logged,
        logging_nan_inf_filter=False,  # which hides them
        save_steps=saved,
        save_total_limit=1,
        # After each epoch; "epoch" itself comes after the state of that step is saved, and would be left out behind it.
        eval_strategy="steps" if plan.evaluation.records else "no",
        eval_steps=plan.steps // settings.epochs,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would copy the model to every GPU that it sees
    optimizer = torch.optim.AdamW(trainee.groups(), weight_decay=0.0)
    with _quiet(), trainee.on_features(), progress("train (steps)", plan.steps) as advance:
        trainer = _Trainer(
            trainee,
            arguments,
            _Batches(pictures, plan.checkpoint.tokenizer().pad_token_id or 0),
            _Examples(plan.training),
            _Examples(plan.evaluation),
            optimizer,
            advance,
        )
        trainer.train(resume_from_checkpoint=newest(states))
    return trainer.state.log_history


def newest(states: Path) -> str | None:
    """The newest whole state; others, which a killed run left half written, are removed."""
    whole = []
    for folder in states.glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / _STATE).read_text())["global_step"], str(folder)))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    return max(whole)[1] if whole else None


class _Examples(Dataset[Example]):
    """Records with their ids and labels."""

    def __init__(self, part: Part) -> None:
        self._examples = list(zip(part.records, part.encoded))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


class _Batches:
    """Examples into one batch of tensors; logits are computed from the first place on that any row learns."""

    def __init__(self, pictures: Pictures, pad_token: int) -> None:
        self._pictures, self._pad_token = pictures, pad_token

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        shown = [self._pictures(path) for record, _ in examples for path in record.images]
        arrays = collate([encoded for _, encoded in examples], self._pad_token, "right", shown)
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        learnt = (batch["labels"] != NOT_LEARNT).any(0).nonzero()
        first = max(int(learnt[0]) - 1, 0)  # the place before a token is the one that predicts it
        batch["labels"] = batch["labels"][:, first:].contiguous()
        batch["logits_to_keep"] = batch["labels"].shape[1]  # a vocabulary of logits a place: most of a batch's memory
        return batch


class _Trainer(Trainer):
    """Trainer whose states hold the trained weights alone, whatever they are."""

    def __init__(
        self,
        trainee: Trainee,
        arguments: TrainingArguments,
        batches: _Batches,
        training: _Examples,
        evaluation: _Examples,
        optimizer: torch.optim.Optimizer,
        advance: Step,
    ) -> None:
        self._trainee = trainee
        super().__init__(
            model=trainee.model,
            args=arguments,
            data_collator=batches,
            train_dataset=training,
            eval_dataset=evaluation if len(evaluation) else None,
            optimizers=(optimizer, None),  # type: ignore[arg-type]
            callbacks=[_Progress(advance)],
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._trainee.tower.eval()  # training_step has just put the whole model into training mode
        return super().compute_loss(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        self._trainee.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._trainee.restore(Path(resume_from_checkpoint))


class _Progress(TrainerCallback):
    """Says how far training is, and what the losses are."""

    def __init__(self, advance: Step) -> None:
        self._advance, self._logged = advance, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            log(f"goes on from step {state.global_step} of the run that was stopped")
            self._advance.at(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not all(math.isfinite(logs[key]) for key in ("loss", "grad_norm", "eval_loss") if key in logs):
            raise CheckFailed(
                f"step {state.global_step}: the loss or its gradients aren't finite: choose a smaller --learning-rate,"
                " or --dtype float32"
            )
        for key, word in (("loss", "loss"), ("eval_loss", "evaluation loss")):
            if key in logs and (key != "loss" or self._logged % _SAID == 0):
                log(f"step {state.global_step}/{state.max_steps}: {word} {float(logs[key]):.4f}")
        self._logged += "loss" in logs


class _quiet:
    """Keeps Trainer's and Transformers' notes to themselves; what matters is an error or in `_Progress`."""

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        self._levels = {name: logging.getLogger(name).level for name in ("transformers", "accelerate", "peft")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        self._caught.__exit__(*error)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)


def losses(history: Sequence[dict[str, float]], key: str = "loss") -> list[dict[str, float]]:
    """The steps and values of one loss in Trainer's log: "loss" of training, "eval_loss" of evaluation."""
    return [{"step": entry["step"], "loss": float(entry[key])} for entry in history if key in entry]
