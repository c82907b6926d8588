"""What `benchmarks ttft` measures: runners and points, what has to be exported for them, and the run's document."""

import datetime
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.ttft import run
from benchmarks.ttft.document import FORMAT
from benchmarks.ttft.run import Effort, Specification
from benchmarks.ttft.runner import DELAY
from fastvlm.common import threads
from fastvlm.common.children import ROOT
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.data.prompt import encode_prompt, render_prompt
from model_export.config import COMPUTE_UNITS

PROMPT, QUESTION = "Describe the image.", "What is the main colour?"
TOKENS = 16  # decoded in each round after the first one
BEST = "-best"  # behind the name of Transformers' runner with the best setting found
MLX_VLM_PYTHON = "FASTVLM_MLX_VLM_PYTHON"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to measure. `resolutions` and `prompt_lengths` (text tokens) empty: the checkpoint's own, and `PROMPT`'s."""

    checkpoint: Path
    artefacts: tuple[Path, ...] = ()
    recipes: tuple[str, ...] = ("fp16",)
    resolutions: tuple[int, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    picture: Path | None = None
    threads: int | None = None
    effort: Effort = field(default_factory=Effort)
    search: bool = True
    compiled: bool = False
    work: Path = Path("build/benchmarks")


def measure(asked: Asked, say: Say = log) -> dict[str, Any]:
    """Measure every point; the document. Raises UserError for what can't be measured at all."""
    from benchmarks.ttft import search as ttft_search

    before, identity = environment.load(), _identity(asked.checkpoint)
    native = _native(asked.checkpoint)
    resolutions = asked.resolutions or (native,)
    prompts = [_prompt(asked.checkpoint, length) for length in asked.prompt_lengths or (None,)]
    with tempfile.TemporaryDirectory(prefix="ttft-") as folder:
        picture = _picture(asked.picture, Path(folder) / "picture.png")
        common = {"picture": str(picture), "tokens": TOKENS, "threads": asked.threads, **prompts[0]}
        names = _wanted(asked.patterns, _names(asked))
        specifications = _runners(asked, resolutions, native, names, identity, say)
        searches = []
        for base in [one for one in specifications if one["name"].endswith(BEST)]:
            found = ttft_search.search(
                {**base, **common, "resolution": resolutions[0]}, asked.compiled, asked.effort.budget, say
            )
            searches.append(found)
            base.update(found["best"])
        points: list[dict[str, Any]] = []
        for resolution in resolutions:
            for prompt in prompts:
                here = {**common, **prompt, "resolution": resolution}
                # peers have sizes of their own, the same at every point
                there = [one for one in specifications if one["kind"] != "peer" or not points]
                points.append(_point(there, here, asked.effort, Path(folder), say))
    number = asked.threads or threads.count()
    document = {
        "benchmark": "ttft", "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), "commit": _commit(),
        "delay": os.environ.get(DELAY, ""),
        "checkpoint": identity, "picture": asked.picture.name if asked.picture else "a drawn scene",
        "tokens": TOKENS, "effort": asdict(asked.effort), "threads": number,
        "environment": environment.describe() | {"torch_threads": number},
        "load_before": before, "load_after": environment.load(),
        "search": searches, "points": points,
    }  # fmt: skip
    runners = [runner for point in points for runner in point["runners"]]
    if all("error" in one for one in runners) or any(one.get("passed") is False for one in runners):
        document["passed"] = False
    if asked.against:
        from benchmarks.peers import peers

        document["peers"] = peers.section(document)
    return document


def check(asked: Asked) -> list[str]:
    """Every fault of what is asked that shows without the checkpoint."""
    from benchmarks.peers import peers
    from fastvlm.data import pictures

    faults = []
    for path in asked.artefacts:
        try:
            held = _manifest(path)["vision"]["resolutions"]
        except UserError as error:
            faults.append(f"--artefact {error}")
            continue
        if absent := [str(size) for size in asked.resolutions if size not in held]:
            expected = f"expected some of {', '.join(map(str, held))}, or another export"
            faults.append(f"--resolution {', '.join(absent)}: {path} wasn't exported for it, {expected}")
    if unknown := [name for name in asked.against if name not in peers.names()]:
        faults.append(f"--against: got {', '.join(unknown)}, expected some of {', '.join(peers.names())}")
    try:
        if asked.picture:
            pictures.check([asked.picture])
    except UserError as error:
        faults.append(f"--image-file: {error}")
    if not any(fault.startswith("--artefact") for fault in faults):
        try:
            names = _names(asked) if asked.patterns else list(_recipes(asked))
            _wanted(asked.patterns, names)
        except UserError as error:
            faults.append(str(error))
    return faults


def _point(
    specifications: Sequence[Specification], here: Mapping[str, Any], effort: Effort, folder: Path, say: Say
) -> dict[str, Any]:
    text = here["text_tokens"]
    say(f"{here['resolution']} pixels, {text or 'the default'} text tokens")
    whole = []
    for one in specifications:
        kept = str(folder / f"{one['name'].replace('/', ' ')}.npz")
        if one["kind"] == "peer":
            whole.append({**one, "keep": kept, "threads": here["threads"], **({"text_tokens": text} if text else {})})
        else:
            whole.append({**here, **one, "keep": kept})
    found, turns = run.measure(whole, effort, say)
    for runner, one in zip(found, specifications):
        runner |= {"kind": one["kind"], "recipe": one.get("recipe")}
    _compare(found, whole)
    return {
        "resolution": here["resolution"], "text_tokens": text, "prompt": here["prompt"], "question": here["question"],
        "turns": turns, "runners": found,
    }  # fmt: skip


def _compare(found: Sequence[dict[str, Any]], specifications: Sequence[Specification]) -> None:
    """How far each runner's features and logits are from Transformers' in float32, in dB, where that ran."""
    import numpy as np

    from benchmarks.metrics import snr_db

    paths = {one["name"]: Path(one["keep"]) for one in specifications}
    if (reference := paths.get("transformers-cpu")) is None or not reference.is_file():
        return
    with np.load(reference) as expected:
        for runner in found:
            if not (path := paths[runner["name"]]).is_file() or path == reference:
                continue
            with np.load(path) as got:
                same = {
                    name: snr_db(expected[name], got[name]) for name in got if got[name].shape == expected[name].shape
                }
            runner["snr_db"] = {name: value if np.isfinite(value) else None for name, value in same.items()}
    for path in paths.values():
        path.unlink(missing_ok=True)


# What runs


def _names(asked: Asked) -> list[str]:
    """Every runner that there could be here."""
    peers = _peers(asked.against)
    names = [f"{recipe}/{name}" for recipe in _recipes(asked) for name in _backends()]
    for device in _devices():
        names += [f"transformers-{device}", *([f"transformers-{device}{BEST}"] if asked.search else [])]
    return [*names, "mlx-vlm", *peers]


def _wanted(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match a pattern (all without one), whole or behind their recipe, and all peers: `--against` asked
    for them. UserError for a pattern that matches none."""
    found = {one: [name for name in names if any(fnmatchcase(part, one) for part in _parts(name))] for one in patterns}
    if missing := [pattern for pattern, hits in found.items() if not hits]:
        raise UserError(f"--runner: no runner {', '.join(missing)} here, expected some of {', '.join(names)}")
    chosen = {name for hits in found.values() for name in hits}
    return [name for name in names if not patterns or name in chosen or name.startswith("peer:")]


def _parts(name: str) -> tuple[str, str]:
    return name, name.rpartition("/")[2]


def _backends() -> dict[str, dict[str, Any]]:
    """The artefact's backends that run on this system, by name."""
    found: dict[str, dict[str, Any]] = {
        f"executor-{compute}": {"vision": "executor", "llm": "torch", "compute": compute}
        for compute in ("as-typed", "bfloat16", "int8", "auto")
    }
    if importlib.util.find_spec("mlx_lm"):
        found["executor-mlx"] = {"vision": "executor", "llm": "mlx", "compute": "as-typed"}
        if sys.platform == "darwin":
            found |= {f"coreml-{one}": {"vision": "coreml", "llm": "mlx", "units": one} for one in COMPUTE_UNITS}
    return found


@cache
def _devices() -> list[str]:
    """What PyTorch computes on here. Asked in a process of its own: torch's memory isn't the controller's."""
    code = "import torch; print(torch.cuda.is_available(), torch.backends.mps.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    cuda, mps = (done.stdout.split() or ["False", "False"])[-2:]
    return ["cpu", *(["cuda"] if cuda == "True" else []), *(["mps"] if mps == "True" else [])]


def _peers(against: Sequence[str]) -> list[str]:
    from benchmarks.peers import peers

    known = [name for name in against if name in peers.names()]  # `check` refuses others
    return [f"peer:{name}" for name in dict.fromkeys([*known, *map(peers.against, known)])]


def _runners(
    asked: Asked, resolutions: Sequence[int], native: int, names: Sequence[str], identity: Mapping[str, Any], say: Say
) -> list[dict[str, Any]]:
    """The specification of each wanted runner; what has to be exported is exported once."""
    found: list[dict[str, Any]] = []
    sizes = sorted(set(resolutions) - {native})
    for recipe, (document, artefact) in _recipes(asked).items():
        backends = {name: options for name, options in _backends().items() if f"{recipe}/{name}" in names}
        if not backends:
            continue
        folder = artefact or _exported(asked, identity, document, {"resolutions": sizes} if sizes else {}, say)
        _same_weights(folder, identity)
        base = {"kind": "artefact", "recipe": recipe, "artefact": str(folder), "files": str(folder)}
        found += [{**base, "name": f"{recipe}/{name}", **options} for name, options in backends.items()]
    checkpoint = str(asked.checkpoint.resolve())
    for name in (name for name in names if name.startswith("transformers-")):
        device = name.split("-")[1]
        found.append(
            {"kind": "checkpoint", "name": name, "checkpoint": checkpoint, "files": checkpoint, "device": device}
        )
    if "mlx-vlm" in names:
        found.append(_mlx_vlm(asked, identity, say))
    return found + [{"kind": "peer", "name": name} for name in names if name.startswith("peer:")]


def _mlx_vlm(asked: Asked, identity: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The specification of mlx-vlm: one runner, by the first recipe."""
    recipe, (document, _) = next(iter(_recipes(asked).items()))
    one: dict[str, Any] = {"kind": "mlx-vlm", "name": "mlx-vlm", "recipe": recipe}
    if "rules" not in document:
        return {**one, "absent": f"{recipe}: was made elsewhere, by a recipe that isn't known: no export for mlx-vlm"}
    python = os.environ.get(MLX_VLM_PYTHON) or (sys.executable if importlib.util.find_spec("mlx_vlm") else "")
    if not python:
        return {
            **one,
            "absent": f"mlx-vlm is not installed: {MLX_VLM_PYTHON} names the Python of an environment with it",
        }
    try:
        folder = str(_exported(asked, identity, document, {"layout": "mlx-vlm"}, say, ("llm",)))
    except Exception as error:
        return {**one, "absent": str(error)}
    return {**one, "artefact": folder, "files": folder, "python": python}


def _exported(
    asked: Asked, identity: Mapping[str, Any], recipe: Mapping[str, Any], options: dict[str, Any], say: Say,
    parts: tuple[str, ...] = ("vision", "llm"),
) -> Path:  # fmt: skip
    """The artefact of a recipe in the work folder, exported unless the same sources made it from the same."""
    from benchmarks.quality import sweep_point

    options = {"quant": recipe, **options}
    key = sweep_point.digest(identity["sha256"], options, parts, sweep_point.identity())
    settings = {"checkpoint": str(asked.checkpoint.resolve()), "calibration_data": None}
    name = f"{asked.checkpoint.resolve().name}-{recipe['name'].replace('/', '-')}-{key}"
    target = asked.work.resolve() / "artefacts" / name
    if not target.exists():
        say(f"exporting {recipe['name']}{' for mlx-vlm' if 'layout' in options else ''}")
    return sweep_point.once(target, lambda folder: sweep_point.export_apart(settings, parts, options, folder))


def _recipes(asked: Asked) -> dict[str, tuple[dict[str, Any], Path | None]]:
    """A recipe's name -> its document, and the artefact that was made by it, or None. UserError for a name twice.

    The recipe of an artefact made elsewhere isn't known: how its weights are stored names it, and it has no rules.
    """
    from quantization.recipe import load_recipe

    known: list[tuple[dict[str, Any], Path | None]]
    known = [(_recipe(_manifest(path)["llm"]), path) for path in asked.artefacts]
    known = known or [(load_recipe(one).to_json(), None) for one in asked.recipes]
    names = [document["name"] for document, _ in known]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        flag = "--artefact" if asked.artefacts else "--quant"
        raise UserError(
            f"{flag}: recipe {', '.join(twice)} twice: runners are named after their recipe, so measure one at a time"
        )
    return dict(zip(names, known))


def _recipe(language: Mapping[str, Any]) -> dict[str, Any]:
    """What an artefact says of its recipe."""
    return dict(language.get("recipe") or {"name": f"elsewhere-{language['stored_as'].replace(' ', '-')}"})


def _manifest(artefact: Path) -> dict[str, Any]:
    """What an artefact with both parts says of itself. UserError for anything else."""
    from model_export.artefact import check_for_app, read_whole

    document = read_whole(artefact)
    check_for_app(artefact, document)
    return document


def _same_weights(artefact: Path, identity: Mapping[str, Any]) -> None:
    sources = _manifest(artefact).get("sources")
    if sources is None:
        log(f"warning: {artefact}: made elsewhere: whether its weights are those of {identity['name']} is not known")
    elif (made_from := sources["sha256"]) != identity["sha256"]:
        raise UserError(
            f"--artefact {artefact}: made from another checkpoint ({made_from[:12]}…, expected"
            f" {identity['sha256'][:12]}… of {identity['name']}): all runners need the same weights, so name its"
            " --checkpoint"
        )


# What is asked


def _identity(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's name, dtype, and the hash over its files that an artefact's manifest names."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from model_export.artefact import sources

    made = sources(open_checkpoint(checkpoint))
    return {"name": checkpoint.resolve().name, "dtype": made["dtype"], "sha256": made["sha256"]}


def _native(checkpoint: Path) -> int:
    from fastvlm.data.preprocessing import read_preprocessor

    return read_preprocessor(checkpoint).image_size


def _prompt(checkpoint: Path, length: int | None) -> dict[str, Any]:
    """The prompt with so many text tokens (template included), and the second question; None: `PROMPT`."""
    prompt = PROMPT
    if length is not None:
        prompt = _of_length(checkpoint, length)
    rendered = {"rendered_prompt": render_prompt(prompt), "rendered_question": render_prompt(QUESTION)}
    return {"prompt": prompt, "question": QUESTION, "text_tokens": length, **rendered}


def _of_length(checkpoint: Path, length: int) -> str:
    """`PROMPT` made longer word by word until the prompt has `length` tokens of text. UserError where it can't have."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
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


def _picture(path: Path | None, target: Path) -> Path:
    """The picture that every runner opens: the user's (see `check`), or a drawn one."""
    from fastvlm.data import pictures

    if path is not None:
        return path.resolve()
    next(pictures.drawn(1)).save(target)
    return target


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
