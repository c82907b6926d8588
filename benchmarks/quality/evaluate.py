"""`evaluate`: candidates against a reference, as a table of figures and the answers that differ."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.quality import text_model
from benchmarks.quality.job import DEMO, DRAWN, TEXT_ONLY, Job, choose, measured
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.terminal import print_table
from fastvlm.data import conversations
from fastvlm.data.scenes import knows_demo
from model_export import contract
from model_export.config import LLM_RUNNERS, VISION_RUNNERS

_SHOWN = 3  # disagreements a candidate
LABELS = {
    "first_kl_mean": "first token: KL, nats",
    "first_kl_p99": "… 99th percentile",
    "first_top1": "… same token",
    "prompt_kl_mean": "prompt: KL, nats",
    "prompt_kl_p99": "… 99th percentile",
    "prompt_top1": "… same tokens",
    "answer_kl_mean": "answer: KL, nats",
    "answer_kl_p99": "… 99th percentile",
    "answer_top1": "… same tokens",
    "text_kl_mean": "text: KL, nats",
    "text_kl_p99": "… 99th percentile",
    "text_top1": "… same tokens",
    "perplexity": "perplexity",
    "perplexity_ratio": "… / reference's",
    "same_answers": "same answers",
    "exact": "right answers",
    "questions": "questions",
    "bytes_vision": "encoder (MB)",
    "bytes_language": "language model (MB)",
    "bytes_projector": "projector (MB)",
    "bytes": "all files (MB)",
    "peak_gb": "peak memory (GB)",
    "load_s": "load (s)",
    "encode_s": "encode (s)",
    "prefill_tokens_per_s": "prefill (tokens/s)",
    "decode_tokens_per_s": "decode (tokens/s)",
}
_SHARES = ("first_top1", "prompt_top1", "answer_top1", "text_top1", "same_answers", "exact")


def add_evaluate(verbs: Any) -> None:
    """Add the verb to a command line's subparsers (which add the common flags)."""
    text = "what a candidate keeps of its reference: logits, perplexity, answers; and its size, memory and rates"
    parser = verbs.add_parser("evaluate", description=f"Measure {text}.")
    parser.add_argument(
        "--model", required=True, nargs="+", type=Path, metavar="FOLDER", help="artefacts, or mlx-lm folders"
    )
    parser.add_argument(
        "--reference",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="what they should be: a checkpoint (PyTorch in float32), an artefact, or an mlx-lm folder",
    )
    parser.add_argument(
        "--samples",
        metavar="SOURCE",
        help="a folder of pictures, a LLaVA-format .json or .jsonl file, demo, or drawn (default: demo where the"
        " reference speaks its language, else drawn; a text model continues the text)",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help="questions at most (default: 200 of the demo, 16 drawn, all of yours)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="scored for the perplexity (default: the answers)")
    parser.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="of the artefacts' pictures (default: their native one)"
    )
    parser.add_argument("--vision", choices=VISION_RUNNERS, default="auto", help="what runs the encoders")
    parser.add_argument("--llm", choices=LLM_RUNNERS, default="auto", help="what runs the language models")
    parser.add_argument(
        "--min-agreement",
        type=float,
        metavar="X",
        help="exit 1 if less than this share of answers (of a text model: likeliest tokens) is the reference's",
    )
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, ask the reference, then each candidate; print the table."""
    with progress("check models and samples"):
        kinds = _check(args)
        text_only = kinds[args.reference] == "text"
        source = args.samples or (DEMO if knows_demo(args.reference) else DRAWN)
        if not text_only:
            conversations.check(choose(source, args.count))
            source = source if source in (DEMO, DRAWN) else str(Path(source).resolve())
    common = {
        "samples": TEXT_ONLY if text_only else source,
        "count": args.count,
        "text": str(args.text.resolve()) if args.text else None,
        "vision": args.vision,
        "llm": args.llm,
    }
    with tempfile.TemporaryDirectory(prefix="evaluate.") as work:
        common["results"] = str(Path(work, "reference.zip"))
        reference = _timed(Job(str(args.reference.resolve()), is_reference=True, **common))
        candidates = []
        for name, model in zip(_names(args.model), args.model):
            try:
                found = _timed(Job(str(model.resolve()), resolution=args.resolution, **common))
            except CheckFailed as error:  # of this one; the others go on
                found = {"failed": str(error)}
            candidates.append({"name": name} | found)
    document: dict[str, Any] = {"reference": {"name": args.reference.resolve().name} | reference}
    document |= {"candidates": candidates, "environment": environment.describe()}
    short = []
    if args.min_agreement is not None:
        key = "text_top1" if text_only else "same_answers"
        whole = [one for one in candidates if "failed" not in one]
        short = [one["name"] for one in whole if one["figures"][key] < args.min_agreement]
        document["passed"] = not short
    failed = [one for one in candidates if "failed" in one]
    if failed:
        document["passed"] = False
    if not args.json:
        _print(document)
    for name in short:
        log(f"{name}: agreement below {args.min_agreement:g}")
    for one in failed:
        log(f"error: {one['name']}: {one['failed']}")
    return document


def _timed(job: Job) -> dict[str, Any]:
    with progress(f"{'reference' if job.is_reference else 'candidate'} {Path(job.model).name}"):
        return measured(job)


def _names(models: list[Path]) -> list[str]:
    """What tells the candidates apart: the folders' names, or whole paths where two share one."""
    names = [model.resolve().name for model in models]
    return names if len(set(names)) == len(names) else [str(model) for model in models]


def _check(args: argparse.Namespace) -> dict[Path, str]:
    """Refuse, all at once, what cannot be compared; returns each folder's `text_model.kind`."""
    faults, kinds = [], {}
    if args.count is not None and args.count < 1:
        faults.append(f"--count: got {args.count}, expected 1 or more")
    if args.min_agreement is not None and not 0 <= args.min_agreement <= 1:
        faults.append(f"--min-agreement: got {args.min_agreement:g}, expected a share from 0 to 1")
    if args.text is not None and not args.text.is_file():
        faults.append(f"--text {args.text}: no such file")
    for folder in dict.fromkeys([args.reference, *args.model]):
        try:
            kinds[folder] = text_model.kind(folder)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    text_only = kinds[args.reference] == "text"
    if text_only and args.text is None:
        faults.append(f"--reference {args.reference}: a text model: expected --text FILE to score")
    for flag in ("samples", "resolution", "count") if text_only else ():
        if getattr(args, flag) is not None:
            faults.append(f"--{flag}: a text model sees no pictures and is asked nothing: leave it out")
    for model in args.model:
        faults += _mismatches(args.reference, model, kinds)
        if args.resolution is not None and kinds[model] == "artefact":
            faults += _resolution_fault(model, args.resolution)
    if faults:
        raise UserError("; ".join(faults))
    return kinds


def _mismatches(reference: Path, model: Path, kinds: dict[Path, str]) -> Iterator[str]:
    """Why a candidate cannot be compared with the reference, as far as small files say."""
    if (kinds[model] == "text") != (kinds[reference] == "text"):
        sees = {"text": "a text model"}
        yield (
            f"--model {model}: {sees.get(kinds[model], 'a FastVLM')}, but the reference is"
            f" {sees.get(kinds[reference], 'a FastVLM')}: compare like with like"
        )
        return
    sizes = [_vocabulary_size(folder) for folder in (model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        yield f"--model {model}: a vocabulary of {sizes[0]} tokens, the reference's has {sizes[1]}"
    tokens = [_tokens(folder) for folder in (model, reference)]
    if None not in tokens and tokens[0] != tokens[1]:
        yield f"--model {model}: its tokenizer is not the reference's: its logits are of other tokens"


def _resolution_fault(model: Path, resolution: int) -> Iterator[str]:
    from model_export.artefact import read_whole
    from model_export.runtime import function_for

    try:
        function_for(read_whole(model), model, resolution)
    except UserError as error:
        yield str(error)


def _vocabulary_size(folder: Path) -> int | None:
    document = text_model.config(folder)
    return (document.get("text_config") or document).get("vocab_size")


def _tokens(folder: Path) -> dict[str, int] | None:
    """The vocabulary without added tokens, or None where tokenizer.json doesn't say (loading it will)."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / contract.TOKENIZER)).get_vocab(with_added_tokens=False)
    except Exception:  # tokenizers raises bare exceptions
        return None


def _print(document: dict[str, Any]) -> None:
    """Figures by candidate, then where they differ from the reference most, then what ran it all."""
    reference = document["reference"]
    candidates = [one for one in document["candidates"] if "failed" not in one]
    if not candidates:
        return
    names = [one["name"] for one in (reference, *candidates)]
    columns = [one["figures"] | one["timings"] for one in (reference, *candidates)]
    rows: list[Sequence[str] | None] = []
    for key, label in LABELS.items():
        if any(key in column for column in columns[1:]):
            rows.append((label, *(_cell(key, column.get(key)) for column in columns)))
            if key in ("questions", "bytes"):
                rows.append(None)
    print_table("evaluate", ("figure", *names), rows, names)
    for one in candidates:
        differing = sorted((answer for answer in one["answers"] if not answer["same"]), key=lambda one: -one["kl"])
        if differing:
            print(
                f"{one['name']}: {len(differing)} of {len(one['answers'])} answers differ from the reference's, by KL:"
            )
        for answer in differing[:_SHOWN]:
            expected = "" if answer["expected"] is None else f" (expected: {_flat(answer['expected'])})"
            print(f"  {_flat(answer['question'])}{expected}")
            print(f"    reference: {_flat(answer['reference'])}")
            print(f"    candidate: {_flat(answer['candidate'])}")
    about = candidates[0]["about"]
    part = f"; KL over {about['rows_kept']} of {about['rows']} rows" if about["rows_kept"] < about["rows"] else ""
    print(f"perplexity of {about['text']}{part}")
    for one in (reference, *candidates):
        print(f"{one['name']}: {', '.join(sorted({*one['about']['runners'].values()}))}")
    print(environment.machine_line(document["environment"]))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key in _SHARES:
        return f"{value:.2%}"
    return f"{value / 1e6:.2f}" if key.startswith("bytes") else f"{value:.4g}"


def _flat(text: str) -> str:
    return " ".join(text.split())[-200:]
