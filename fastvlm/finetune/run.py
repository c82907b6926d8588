"""A whole fine-tune: answers before, training, answers after, the finished folder; killed, it goes on where it was."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log, progress
from fastvlm.common.documents import dump, object_or_empty, shown
from fastvlm.common.dtypes import choose_device
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.findings import several
from fastvlm.common.staging import held, remove, staged, write_file
from fastvlm.data.records import evenly
from fastvlm.data.scenes import knows_demo
from fastvlm.finetune import answers, page, result
from fastvlm.finetune.answers import Asked
from fastvlm.finetune.model import Pictures, Trainee, computed_dtype
from fastvlm.finetune.plan import DONE, Plan, pictures_sha256, sha256
from fastvlm.finetune.training import losses, train

_PACKAGES = ("torch", "transformers", "peft", "accelerate")  # whose arithmetic decides the weights
_BEGUN, _BEFORE = "begun.json", "before.json"


@dataclass(frozen=True)
class Exam:
    """What the model answered, before or after: to the evaluation records, and to the demo set if it knows that."""

    answers: list[str]
    demo: dict[str, list[int]] | None


def run(plan: Plan) -> dict[str, Any]:
    """Fine-tune and publish the folder; returns its finetune.json.

    States are kept in `.NAME.resume` beside the folder until that is published. The same command goes on from there.

    Raises:
        UserError: another run is at work, or one with other settings or data was stopped there.
    """
    settings, started = plan.settings, time.monotonic()
    device = choose_device(settings.device)
    dtype = computed_dtype(settings.dtype, device)
    target = settings.output_dir.expanduser().resolve()
    work = target.with_name(f".{target.name}.resume")
    with held(work, f"--output-dir {settings.output_dir}: another fine-tune is at work there: wait until it ends"):
        sources = _sources(plan)
        _go_on(work, {"settings": settings.decisive(), "device": device, "dtype": dtype, **sources})
        with progress(f"load {settings.checkpoint}"):
            trainee = Trainee(plan, device, dtype)
        pictures, asked = Pictures(trainee), _asked(plan)
        seen = dict.fromkeys([*plan.training.pictures, *plan.evaluation.pictures])
        with progress("encode (pictures)", len(seen)) as advance:
            pictures.keep(seen, advance)
        before = _before(work, lambda: _exam("before", trainee, pictures, asked))
        try:
            history = train(trainee, pictures, work / "states", dtype)
        except KeyboardInterrupt:
            log(f"stopped; the same command goes on from the last state in {work}")
            raise
        except CheckFailed:
            remove(work)  # the same flags would end there again
            raise
        result.round_to_stored(trainee)
        after = _exam("after", trainee, pictures, asked)
        document = {
            "format": 1,
            **plan.document(),
            **sources,
            "base": {"path": str(plan.checkpoint.path.resolve()), **sources["base"]},
            "device": device,
            "dtype": dtype,
            "losses": losses(history),
            "evaluation_losses": losses(history, "eval_loss"),
            "accuracy": _accuracy(asked, before, after),
            "seconds": round(time.monotonic() - started, 1),
            "processor_seconds": round(time.process_time(), 1),
        }
        with staged(target, replace=settings.overwrite) as folder:
            result.write(trainee, folder)
            page.write(folder, document, asked, before.answers, after.answers, settings.output_dir)
            dump(folder / DONE, document)
        remove(work)
    return document


def _sources(plan: Plan) -> dict[str, Any]:
    """Hashes of all that is read, and the versions of what computes."""
    settings = plan.settings
    data = {"path": str(settings.data.resolve()), "sha256": sha256(settings.data)}
    data["pictures_sha256"] = pictures_sha256(plan.training.pictures)
    evaluation: dict[str, Any] = {"pictures_sha256": pictures_sha256(plan.evaluation.pictures)}
    if settings.evaluation_data is not None:
        evaluation |= {"path": str(settings.evaluation_data.resolve()), "sha256": sha256(settings.evaluation_data)}
    with progress("hash (checkpoint)"):
        base = {"sha256": result.file_hashes([*plan.checkpoint.files, plan.checkpoint.path / "config.json"])}
    return {
        "data": data,
        "evaluation_data": evaluation,
        "base": base,
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _go_on(work: Path, identity: dict[str, Any]) -> None:
    """Note what this run is, or compare it with the one that was stopped. UserError where they differ."""
    now = _flat(json.loads(json.dumps(identity)))
    if not (begun := object_or_empty(work / _BEGUN)):
        write_file(work / _BEGUN, json.dumps(now, indent=2).encode())
        return
    differ = [
        f"{key}: was {shown(begun.get(key))}, is {shown(now.get(key))}"
        for key in {**now, **begun}
        if not key.endswith(".path") and begun.get(key) != now.get(key)
    ]
    if differ:
        raise UserError(
            f"{work}: a fine-tune that was stopped is kept there, and differs ({several(differ)}): give the same flags"
            " to go on, or delete that folder to begin anew"
        )


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _asked(plan: Plan) -> list[Asked]:
    return [Asked.of(record) for record in evenly(plan.evaluation.records, plan.settings.evaluation_limit)]


def _exam(when: str, trainee: Trainee, pictures: Pictures, asked: list[Asked]) -> Exam:
    given: list[str] = []
    if asked:
        with progress(f"answer {when} training (records)", len(asked)) as advance:
            given = answers.answer(trainee, pictures, asked, trainee.plan.settings.max_new_tokens, advance)
    if not knows_demo(trainee.plan.checkpoint.path):
        return Exam(given, None)
    with progress(f"answer {when} training (demo questions)", answers.DEMO_QUESTIONS) as advance:
        return Exam(given, answers.demo_score(trainee, advance))


def _before(work: Path, examine: Callable[[], Exam]) -> Exam:
    """The answers before training, from the run that was stopped if it had them all."""
    if kept := object_or_empty(work / _BEFORE):
        return Exam(**kept)
    exam = examine()
    write_file(work / _BEFORE, json.dumps({"answers": exam.answers, "demo": exam.demo}).encode())
    return exam


def _accuracy(asked: list[Asked], before: Exam, after: Exam) -> dict[str, Any]:
    """Exact answers before and after, of how many; of the demo set's kinds, too, where the model knows them."""
    document: dict[str, Any] = {"records": len(asked)}
    for when, exam in (("before", before), ("after", after)):
        document[when] = sum(one.right(given) for one, given in zip(asked, exam.answers))
        if exam.demo is not None:
            document.setdefault("demo", {})[when] = exam.demo
    for when, exam in (("before", before), ("after", after)):
        if exam.demo is not None:
            right, total = (sum(numbers) for numbers in zip(*exam.demo.values()))
            log(f"demo questions {when} training: {right} of {total} exact")
        if asked:
            log(f"evaluation records {when} training: {document[when]} of {len(asked)} exact")
    return document
