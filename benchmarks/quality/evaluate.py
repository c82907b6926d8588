"""`evaluate`: candidates against a reference, as a table of figures and the answers that differ."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.quality import job, text_model
from benchmarks.quality.job import Job, measured
from fastvlm.common.arguments import share, whole_number
from fastvlm.common.cli import log, progress
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.terminal import print_table
from fastvlm.data import conversations
from model_export import contract
from model_export.config import LLM_RUNNERS, VISION_RUNNERS
from model_export.coreai import contract as coreai

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
    text = (
        "Measure what a candidate keeps of its reference: logits, perplexity, answers; and its size, memory and rates."
    )
    parser = verbs.add_parser("evaluate", description=text)
    add = parser.add_argument
    add("--model", required=True, nargs="+", type=Path, metavar="FOLDER", help="artefacts, or mlx-lm folders")
    add(
        "--reference",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="what they should be: a checkpoint (PyTorch in float32), an artefact, or an mlx-lm folder",
    )
    add(
        "--samples",
        metavar="SOURCE",
        help="a folder of pictures, a file of records (LLaVA, messages, captions), demo, or drawn (default: demo"
        " where the reference speaks its language, else drawn; a text model continues the text)",
    )
    add(
        "--count",
        type=whole_number(),
        metavar="N",
        help="questions at most (default: 200 of the demo, 16 drawn, all of yours)",
    )
    add("--text", type=Path, metavar="FILE", help="scored for the perplexity (default: the answers)")
    add("--resolution", type=int, metavar="PIXELS", help="of the artefacts' pictures (default: their native one)")
    add("--vision", choices=VISION_RUNNERS, default="auto", help="what runs the encoders")
    add("--llm", choices=LLM_RUNNERS, default="auto", help="what runs the language models")
    add(
        "--min-agreement",
        type=share,
        metavar="X",
        help="exit 1 if fewer of the answers (of a text model: of the most likely tokens) equal the reference's",
    )
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Check everything, ask the reference, then each candidate; print the table."""
    with progress("check models and samples"):
        text_only = _check(args) == "text"
        source = job.TEXT_ONLY if text_only else job.source(args.samples, args.reference)
        if not text_only:
            conversations.check(job.choose(source, args.count))
    common = {
        "samples": source,
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
                result = _timed(Job(str(model.resolve()), resolution=args.resolution, **common))
            except CheckFailed as error:  # of this one; the others go on
                result = {"failed": str(error)}
            candidates.append({"name": name} | result)
    document: dict[str, Any] = {"reference": {"name": args.reference.resolve().name} | reference}
    document |= {"candidates": candidates, "environment": environment.describe()}
    key, least = "text_top1" if text_only else "same_answers", args.min_agreement
    failed = [f"error: {candidate['name']}: {candidate['failed']}" for candidate in candidates if "failed" in candidate]
    short = [
        f"{candidate['name']}: agreement below {least:g}"
        for candidate in candidates
        if least is not None and "failed" not in candidate and candidate["figures"][key] < least
    ]
    if failed or least is not None:
        document["passed"] = not (failed or short)
    if not args.json:
        _print(document)
    for line in (*short, *failed):
        log(line)
    return document


def _timed(measurement: Job) -> dict[str, Any]:
    with progress(f"{'reference' if measurement.is_reference else 'candidate'} {Path(measurement.model).name}"):
        return measured(measurement)


def _names(models: list[Path]) -> list[str]:
    """The candidates' names: their folders', or whole paths where two share one."""
    names = [model.resolve().name for model in models]
    return names if len(set(names)) == len(names) else [str(model) for model in models]


def _check(args: argparse.Namespace) -> str:
    """Refuse, all at once, what cannot be compared; returns the reference's `text_model.kind`."""
    faults, kinds = [], {}
    if args.text is not None and not args.text.is_file():
        faults.append(f"--text {args.text}: no such file")
    for folder in dict.fromkeys([args.reference, *args.model]):
        try:
            kinds[folder] = text_model.kind(folder)
        except UserError as error:
            faults.append(str(error))
    if not faults:
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
    return kinds[args.reference]


def _mismatches(reference: Path, model: Path, kinds: dict[Path, str]) -> Iterator[str]:
    """The reasons why a candidate cannot be compared with the reference, as far as small files show."""
    kind, expected = ("a text model" if kinds[folder] == "text" else "a FastVLM" for folder in (model, reference))
    if kind != expected:
        yield f"--model {model}: {kind}, but the reference is {expected}: compare like with like"
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
    if (folder / coreai.METADATA).exists():
        with suppress(Unreadable, KeyError, TypeError):  # loading it will say
            return load_object(folder / coreai.METADATA)["language"]["vocab_size"]
        return None
    document = text_model.config(folder)
    return (document.get("text_config") or document).get("vocab_size")


def _tokens(folder: Path) -> dict[str, int] | None:
    """The vocabulary without added tokens, or None where tokenizer.json doesn't say (loading it will)."""
    from tokenizers import Tokenizer

    try:
        of_bundle = folder / coreai.TOKENIZER / contract.TOKENIZER
        path = of_bundle if of_bundle.exists() else folder / contract.TOKENIZER
        return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False)
    except Exception:  # tokenizers raises bare exceptions
        return None


def _print(document: dict[str, Any]) -> None:
    """Figures by candidate, then where they differ from the reference most, then what ran it all."""
    reference = document["reference"]
    candidates = [model for model in document["candidates"] if "failed" not in model]
    if not candidates:
        return
    names = [model["name"] for model in (reference, *candidates)]
    columns = [model["figures"] | model["timings"] for model in (reference, *candidates)]
    rows: list[Sequence[str] | None] = []
    for key, label in LABELS.items():
        if any(key in column for column in columns[1:]):
            rows.append((label, *(_cell(key, column.get(key)) for column in columns)))
            if key in ("questions", "bytes"):
                rows.append(None)
    print_table("evaluate", ("figure", *names), rows, names)
    for model in candidates:
        differing = sorted(
            (answer for answer in model["answers"] if not answer["same"]), key=lambda answer: -answer["kl"]
        )
        if differing:
            count = f"{len(differing)} of {len(model['answers'])}"
            print(f"{model['name']}: {count} answers differ from the reference's, by KL:")
        for answer in differing[:_SHOWN]:
            expected = "" if answer["expected"] is None else f" (expected: {_flat(answer['expected'])})"
            print(f"  {_flat(answer['question'])}{expected}")
            print(f"    reference: {_flat(answer['reference'])}")
            print(f"    candidate: {_flat(answer['candidate'])}")
    about = candidates[0]["about"]
    part = f"; KL over {about['rows_kept']} of {about['rows']} rows" if about["rows_kept"] < about["rows"] else ""
    print(f"perplexity of {about['text']}{part}")
    for model in (reference, *candidates):
        print(f"{model['name']}: {', '.join(sorted({*model['about']['runners'].values()}))}")
    print(environment.machine_line(document["environment"]))


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key in _SHARES:
        return f"{value:.2%}"
    return f"{value / 1e6:.2f}" if key.startswith("bytes") else f"{value:.4g}"


def _flat(text: str) -> str:
    return " ".join(text.split())[-200:]
