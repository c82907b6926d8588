"""The runners of `fastvlm ttft`: those that this machine has, chosen by name, and a specification for each.

What a specification needs is exported here: one artefact for each recipe, and a folder in mlx-vlm's layout.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import shared_exports
from benchmarks.ttft.run import Effort
from fastvlm.common import children
from fastvlm.common.cli import log
from fastvlm.common.errors import UserError
from fastvlm.common.staging import once
from model_export.artefact import check_for_app, check_parts, is_bundle, read_whole
from model_export.config import COMPUTE_UNITS, COREAI_UNITS, INTERPRETER
from model_export.coreai.process import has_system_runtime
from quantization.recipe import load_recipe

BEST = "-best"  # behind the name of Transformers' runner with the best setting that the search found
MLX_VLM_PYTHON = "FASTVLM_MLX_VLM_PYTHON"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """The flags of the verb `ttft`.

    Attributes:
        recipes: exported unless there are `artefacts`.
        format: what is exported, one of `model_export.config.FORMATS`.
        resolutions, prompt_lengths: pixels and text tokens; empty for the checkpoint's own resolution and the prompt
            as it is.
        patterns: of the runners' names; empty for all.
    """

    checkpoint: Path
    effort: Effort
    artefacts: tuple[Path, ...] = ()
    recipes: tuple[str, ...] = ("fp16",)
    format: str = "coreml"
    resolutions: tuple[int, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()
    picture: Path | None = None
    threads: int | None = None
    search: bool = True
    work: Path = Path("build/benchmarks")
    adapter: Path | None = None


@dataclass(frozen=True)
class Source:
    """What runners of ours need: a recipe's name and document, the artefact that it made, or None to export it, and
    the format, which decides the backends."""

    recipe: str
    document: dict[str, Any]
    artefact: Path | None
    format: str


def names(request: Request) -> list[str]:
    """The names of all runners that exist here for a request."""
    ours = [f"{source.recipe}/{name}" for source in sources(request) for name in backends(source.format)]
    transformers = [f"transformers-{device}" for device in devices()]
    if request.search:
        transformers = [name + suffix for name in transformers for suffix in ("", BEST)]
    return [*ours, *transformers, "mlx-vlm"]


def choose(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that match a pattern, whole or behind their recipe; all without a pattern.

    Raises UserError for patterns that match none.
    """
    matches = {
        pattern: {name for name in known if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition("/")[2], pattern)}
        for pattern in patterns
    }
    if missing := [pattern for pattern, hits in matches.items() if not hits]:
        raise UserError(f"--runner: no runner {', '.join(missing)} here, expected some of {', '.join(known)}")
    return [name for name in known if not patterns or name in set().union(*matches.values())]


def backends(artefacts: str = "coreml") -> dict[str, dict[str, Any]]:
    """The backends on this system of artefacts of a format, by name."""
    if artefacts == "coreai":
        of_coreai = {"vision": "coreai", "llm": "coreai"}
        systems = [units for units in COREAI_UNITS if units != INTERPRETER] if has_system_runtime() else []
        own = {"coreai": {**of_coreai, "units": INTERPRETER}}
        return own | {f"coreai-{units}": {**of_coreai, "units": units} for units in systems}
    known: dict[str, dict[str, Any]] = {
        f"executor-{compute}": {"vision": "executor", "llm": "torch", "compute": compute}
        for compute in ("as-typed", "bfloat16", "int8", "auto")
    }
    if importlib.util.find_spec("mlx_lm"):
        known["executor-mlx"] = {"vision": "executor", "llm": "mlx", "compute": "as-typed"}
        if sys.platform == "darwin":
            known |= {f"coreml-{units}": {"vision": "coreml", "llm": "mlx", "units": units} for units in COMPUTE_UNITS}
    return known


@cache
def devices() -> list[str]:
    """PyTorch's devices here. A process of its own asks: torch's memory would be that of the process which measures."""
    code = (
        "import json, torch; print(json.dumps({name: getattr(torch, name).is_available() for name in ('cuda', 'mps')}))"
    )
    available = children.run([sys.executable, "-c", code]).document("PyTorch")
    return ["cpu", *(name for name in available if available[name])]


def sources(request: Request) -> list[Source]:
    """The recipes and artefacts of a request. UserError for a recipe twice in one format.

    An artefact made elsewhere doesn't tell its recipe: the form of its weights names it, and it has no rules.
    """
    known: dict[tuple[str, str], Source] = {}
    for source in request.artefacts or request.recipes:
        if isinstance(source, Path):
            of_artefact = manifest(source)
            language, artefact = of_artefact["llm"], source
            made = "coreai" if is_bundle(of_artefact) else "coreml"
            document = language.get("recipe") or {"name": f"elsewhere-{language['stored_as'].replace(' ', '-')}"}
        else:
            document, artefact, made = load_recipe(source).to_json(), None, request.format
        if (key := (name := document["name"], made)) in known:
            flag = "--artefact" if request.artefacts else "--quant"
            raise UserError(
                f"{flag}: recipe {name} twice: runners are named after their recipe, so measure one at a time"
            )
        known[key] = Source(name, document, artefact, made)
    return [*known.values()]


def manifest(artefact: Path) -> dict[str, Any]:
    """The manifest of an artefact with both parts. UserError for anything else."""
    document = read_whole(artefact)
    (check_parts if is_bundle(document) else check_for_app)(artefact, document)
    return document


def specifications(
    request: Request, chosen: Sequence[str], identity: Mapping[str, Any], sizes: Sequence[int], say: Say
) -> Iterator[dict[str, Any]]:
    """The specification of each chosen runner.

    Args:
        identity: name and hash of the checkpoint. UserError for an artefact that was made from another one.
        sizes: resolutions to export beside the native one; a bundle has one resolution, the first of them.
    """
    for source in sources(request):
        recipe, folder = source.recipe, source.artefact
        mine = {name: options for name, options in backends(source.format).items() if f"{recipe}/{name}" in chosen}
        if mine:
            wanted: dict[str, Any] = {"resolutions": list(sizes)} if sizes else {}
            if source.format == "coreai":
                wanted = {"format": "coreai"} | ({"image_size": sizes[0]} if sizes else {})
            folder = folder or exported(request, identity, source.document, wanted, say)
            check_weights(folder, identity)
        for name, options in mine.items():
            about = {"kind": "artefact", "name": f"{recipe}/{name}", "recipe": recipe}
            yield {**about, "artefact": str(folder), "files": str(folder), **options}
    checkpoint = str(request.checkpoint.resolve())
    adapter = request.adapter and str(request.adapter.resolve())
    for name in chosen:
        if name.startswith("transformers-"):
            about = {"kind": "checkpoint", "name": name, "device": name.split("-")[1]}
            yield {**about, "checkpoint": checkpoint, "adapter": adapter, "files": checkpoint}
        elif name == "mlx-vlm":
            yield mlx_vlm(request, identity, say)


def mlx_vlm(request: Request, identity: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """The specification of mlx-vlm with the first recipe; with "absent" where it can't run."""
    first = sources(request)[0]
    recipe, document = first.recipe, first.document
    specification: dict[str, Any] = {"kind": "mlx-vlm", "name": "mlx-vlm", "recipe": recipe}
    python = os.environ.get(MLX_VLM_PYTHON) or (sys.executable if importlib.util.find_spec("mlx_vlm") else "")
    try:
        if "rules" not in document:
            raise UserError(f"{recipe}: was made elsewhere, by a recipe that isn't known: no export for mlx-vlm")
        if not python:
            raise UserError(f"mlx-vlm is not installed: {MLX_VLM_PYTHON} names the Python of an environment with it")
        folder = str(exported(request, identity, document, {"layout": "mlx-vlm"}, say, ("llm",)))
    except Exception as error:
        return {**specification, "absent": str(error)}
    return {**specification, "artefact": folder, "files": folder, "python": python}


def exported(
    request: Request, identity: Mapping[str, Any], recipe: Mapping[str, Any], options: dict[str, Any], say: Say,
    parts: tuple[str, ...] = ("vision", "llm"),
) -> Path:  # fmt: skip
    """The artefact of a recipe in the work folder, exported unless the same code made it from the same sources."""
    options = {"quant": recipe, **options}
    key = shared_exports.digest(identity["sha256"], options, parts, shared_exports.identity())
    paths = {"checkpoint": request.checkpoint, "adapter": request.adapter, "calibration_data": None}
    settings = {key: path and str(path.resolve()) for key, path in paths.items()}
    name = f"{request.checkpoint.resolve().name}-{recipe['name'].replace('/', '-')}-{key}"
    target = request.work.resolve() / "artefacts" / name
    if not target.exists():
        what = " for mlx-vlm" if "layout" in options else " for Core AI" if "format" in options else ""
        say(f"exporting {recipe['name']}{what}")
    return once(target, lambda folder: shared_exports.export_apart(settings, parts, options, folder))


def check_weights(artefact: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError where an artefact was made from another checkpoint; warn where that isn't known."""
    sources = manifest(artefact).get("sources")
    if sources is None:
        log(f"warning: {artefact}: made elsewhere: whether its weights are those of {identity['name']} is not known")
    elif (made_from := sources["sha256"]) != identity["sha256"]:
        raise UserError(
            f"--artefact {artefact}: made from another checkpoint ({made_from[:12]}…, expected"
            f" {identity['sha256'][:12]}… of {identity['name']}): all runners need the same weights, so name its"
            " --checkpoint"
        )
