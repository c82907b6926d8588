"""`evaluate`: candidates against a reference, each in a process of its own, so that its peak memory is its own.

As a program (`python -m benchmarks.quality.evaluate JOB`) it is that process: the last line of stdout is one JSON
document.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.quality import text_model
from fastvlm.common import children
from fastvlm.common.cli import log, progress, quiet_libraries
from fastvlm.common.errors import CheckFailed, UserError
from fastvlm.common.terminal import print_table
from fastvlm.data import conversations
from fastvlm.data.scenes import knows_demo
from model_export import contract
from model_export.config import LLM_RUNNERS, VISION_RUNNERS

DEMO, DRAWN, TEXT_ONLY = "demo", "drawn", "text"  # sources of samples beside folders and files
_COUNTS = {DEMO: 200, DRAWN: 16}  # of questions; a folder's or file's: all
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


@dataclass(frozen=True)
class Job:
    """One model to ask. `results` is the reference's file (`quality.reference_results`): written if `is_reference`.

    `samples`: "demo", "drawn", "text" (a text model, which continues the text), or a folder's or file's path; `count`
    of them at most (None: a default). `text`: a file's path; None: the answers are scored. Runners and resolution as in
    `model_export.runtime.load`.
    """

    model: str
    results: str
    is_reference: bool = False
    samples: str = DEMO
    count: int | None = None
    text: str | None = None
    vision: str = "auto"
    llm: str = "auto"
    resolution: int | None = None


def evaluate(job: Job) -> dict[str, Any]:
    """Do the job in this process: `quality.reference_results` or `quality.quality` with sizes and `load_s`."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM  # noqa: F401  imported before the clock runs

    from benchmarks.quality import quality

    folder = Path(job.model)
    start = time.perf_counter()
    model = text_model.load(folder, job.vision, job.llm, job.resolution)
    loaded = time.perf_counter() - start
    text = quality.read_text(Path(job.text)) if job.text else None
    if isinstance(model, text_model.TextModel):
        if text is None:
            raise UserError(f"{folder}: a text model: expected a text to score")
        samples = quality.continuations(model.tokenizer, text)
    else:
        samples = choose(job.samples, job.count)
    if job.is_reference:
        result = quality.reference_results(model, samples, text, Path(job.results))
    else:
        result = quality.quality(model, samples, Path(job.results))
    result["figures"] |= sizes(folder)
    result["timings"] |= {"load_s": quality.figure(loaded)}
    return result


def measured(job: Job) -> dict[str, Any]:
    """`evaluate` in a process of its own; its timings have `peak_gb`, too. Raises what that raised."""
    command = [sys.executable, "-m", "benchmarks.quality.evaluate", json.dumps(asdict(job))]
    done = children.run(command, log)
    result = done.document(f"{job.model}: its evaluation")
    result["timings"]["peak_gb"] = float(f"{done.peak_gb:.4g}")
    return result


def choose(source: str, count: int | None = None) -> list[conversations.Sample]:
    """The samples of a source (see `Job`). Raises UserError."""
    count = _COUNTS.get(source) if count is None else count
    if source == DEMO:
        return conversations.demo_samples(count or 0)
    if source == DRAWN:
        return conversations.drawn_samples(count or 0)
    return conversations.load(source)[:count]


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of a model's folder, all files (but export.json, whose figures' digits are no weights) and by part."""
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(folder / contract.MANIFEST, None)
    total = {"bytes": sum(files.values())}
    for part, patterns in (
        ("vision", (f"{contract.PACKAGE}/*", contract.VISION_WEIGHTS)),
        ("language", (contract.WEIGHTS_GLOB,)),
        ("projector", (contract.PROJECTOR_WEIGHTS,)),
    ):
        found = [size for path, size in files.items() if any(_under(path, folder, glob) for glob in patterns)]
        if found:
            total[f"bytes_{part}"] = sum(found)
    return total


def _under(path: Path, folder: Path, glob: str) -> bool:
    relative = path.relative_to(folder)
    return relative.match(glob) if "/" not in glob else relative.parts[0] == glob.partition("/")[0]


# The verb


def add_evaluate(verbs: Any) -> None:
    """Add the verb to a command line's subparsers (which add the common flags)."""
    text = "what a candidate keeps of its reference: logits, perplexity, answers; and its size, memory and rates"
    parser = verbs.add_parser("evaluate", help=text, description=f"Measure {text}.")
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


def _main(job: str) -> int:
    quiet_libraries()
    return children.answer(lambda: evaluate(Job(**json.loads(job))))


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
