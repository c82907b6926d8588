"""A run of `fastvlm ttft`: points (resolution and prompt), measured by every chosen runner, as one document."""

import datetime
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.metrics import snr_db
from benchmarks.ttft import figures, run, runners
from benchmarks.ttft.document import FORMAT
from benchmarks.ttft.process import Specification
from benchmarks.ttft.run import Effort
from benchmarks.ttft.runner import DELAY, parse_delays
from benchmarks.ttft.runners import BEST, Request, Say
from benchmarks.ttft.search import search
from fastvlm.checkpoint.adapter_flag import titled
from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common import threads
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.data import pictures
from fastvlm.data.preprocessing import read_preprocessor
from fastvlm.data.prompt import encode_prompt, render_prompt
from model_export.artefact import sources
from model_export.coreai.packages import check_installed

PROMPT, QUESTION = "Describe the image.", "What is the main colour?"
TOKENS = 16  # decoded in each round after the first one


def check(request: Request) -> None:
    """Raise UserError with every fault of a request that shows without the checkpoint."""
    faults: list[str] = []
    for path in request.artefacts:
        with _collected(faults, "--artefact "):
            held = runners.manifest(path)["vision"]["resolutions"]
            if absent := [str(size) for size in request.resolutions if size not in held]:
                expected = f"expected some of {', '.join(map(str, held))}, or another export"
                faults.append(f"--resolution {', '.join(absent)}: {path} wasn't exported for it, {expected}")
    if not any(fault.startswith("--artefact") for fault in faults):
        with _collected(faults):
            known = (
                runners.names(request) if request.patterns else [source.recipe for source in runners.sources(request)]
            )
            runners.choose(request.patterns, known)
    if request.format == "coreai" and len(request.resolutions) > 1:
        faults.append("--resolution with --format coreai: a Core AI bundle has one: measure one at a time")
    if request.format == "coreai" and not request.artefacts:
        with _collected(faults):
            check_installed()
    with _collected(faults):
        parse_delays(os.environ.get(DELAY, ""))
    if faults:
        raise UserError("; ".join(faults))


@contextmanager
def _collected(faults: list[str], flag: str = "") -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:
        faults.append(f"{flag}{error}")


def measure(request: Request, say: Say = log) -> dict[str, Any]:
    """Measure every point; returns the document. Raises UserError for what can't be measured at all."""
    before, identity = environment.load(), identify(request.checkpoint, request.adapter)
    native = read_preprocessor(request.checkpoint).image_size
    resolutions = request.resolutions or (native,)
    prompts = [_prompt(request, length) for length in request.prompt_lengths or (None,)]
    chosen = runners.choose(request.patterns, runners.names(request))
    sizes = sorted(set(resolutions) - {native})
    searches, points = [], []
    with tempfile.TemporaryDirectory(prefix="ttft-") as folder:
        picture = request.picture or Path(folder) / "picture.png"
        if not request.picture:
            next(pictures.drawn(1)).save(picture)
        common = {"picture": str(picture.resolve()), "tokens": TOKENS, "threads": request.threads}
        specifications = list(runners.specifications(request, chosen, identity, sizes, say))
        for specification in specifications:
            if specification["name"].endswith(BEST):
                base = {**common, **prompts[0], "resolution": resolutions[0], **specification}
                searches.append(search(base, request.effort.budget, say))
                specification |= searches[-1]["best"]
        for resolution in resolutions:
            for prompt in prompts:
                conditions = {**common, **prompt, "resolution": resolution}
                points.append(_point(specifications, conditions, request.effort, Path(folder), say))
    count = request.threads or threads.count()
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    document: dict[str, Any] = {
        "benchmark": "ttft", "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastvlm", *sys.argv[1:]]), "commit": commit.stdout.strip() or None,
        "delay": os.environ.get(DELAY, ""),
        "checkpoint": identity, "picture": request.picture.name if request.picture else "a drawn scene",
        "tokens": TOKENS, "effort": asdict(request.effort), "threads": count,
        "environment": environment.describe() | {"torch_threads": count},
        "load_before": before, "load_after": environment.load(),
        "search": searches, "points": points,
    }  # fmt: skip
    measured = [runner for point in points for runner in point["runners"]]
    if all("error" in runner for runner in measured) or any(runner.get("passed") is False for runner in measured):
        document["passed"] = False
    return document | {"ratios": figures.ratios(document)}


def _point(
    specifications: Sequence[Specification], conditions: Mapping[str, Any], effort: Effort, folder: Path, say: Say
) -> dict[str, Any]:
    """Measure a point; each runner gets "snr_db", its features and logits against Transformers' in float32, in dB,
    where both computed them."""
    say(f"{conditions['resolution']} pixels, {conditions['text_tokens'] or 'the default'} text tokens")
    outputs = {runner["name"]: folder / f"{runner['name'].replace('/', ' ')}.npz" for runner in specifications}
    whole = [{**conditions, **runner, "keep": str(outputs[runner["name"]])} for runner in specifications]
    measured, turns = run.measure(whole, effort, say)
    reference = outputs.get("transformers-cpu")
    for runner, specification in zip(measured, whole):
        runner |= {"kind": specification["kind"], "recipe": specification.get("recipe")}
        path = outputs[specification["name"]]
        if reference and reference.is_file() and path.is_file() and path != reference:
            with np.load(reference) as expected, np.load(path) as got:
                errors = {
                    name: snr_db(expected[name], got[name]) for name in got if got[name].shape == expected[name].shape
                }
            runner["snr_db"] = {name: value if np.isfinite(value) else None for name, value in errors.items()}
    for path in outputs.values():
        path.unlink(missing_ok=True)
    point = {key: conditions[key] for key in ("resolution", "text_tokens", "prompt", "question")}
    return point | {"turns": turns, "runners": measured}


def identify(checkpoint: Path, adapter: Path | None = None) -> dict[str, Any]:
    """The checkpoint's name, dtype, and the hash over its files and the adapter's that an artefact's manifest names."""
    made = sources(open_checkpoint(checkpoint, adapter=adapter))
    return {"name": titled(checkpoint, adapter), "dtype": made["dtype"], "sha256": made["sha256"]}


def _prompt(request: Request, length: int | None) -> dict[str, Any]:
    """The prompt with so many text tokens (template included), and the second question; None: `PROMPT`."""
    prompt = PROMPT if length is None else lengthened(request.checkpoint, length, request.adapter)
    rendered = {"rendered_prompt": render_prompt(prompt), "rendered_question": render_prompt(QUESTION)}
    return {"prompt": prompt, "question": QUESTION, "text_tokens": length, **rendered}


def lengthened(checkpoint: Path, length: int, adapter: Path | None = None) -> str:
    """`PROMPT` made longer word by word until the prompt has `length` tokens of text. UserError where it can't have."""
    opened = open_checkpoint(checkpoint, adapter=adapter)
    tokenizer, token = opened.tokenizer(), opened.image_token_id

    def count(text: str) -> int:
        return encode_prompt(tokenizer, text, token, 1).shape[1] - 1

    shortest = count("")
    if length <= shortest:
        raise UserError(f"--prompt-length: got {length}, expected more than the template's {shortest} tokens")
    words = PROMPT.removesuffix(".").split()
    text = ""
    while count(text) < length:  # a word may be several tokens: then letters, each of which is one at most
        longer = f"{text} {words[len(text.split()) % len(words)]}".strip()
        text = longer if count(longer) <= length else text + " a"
    return text if count(text) == length else text.strip()
