"""`python -m app_bridge card`: a model card, the README.md of a hub's repository, from an artefact's manifest.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards; huggingface_hub.ModelCardData). `apple-amlr`
is its name of Apple's research licence: apple/FastVLM-0.5B, README.md.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from markupsafe import Markup

from app_bridge.validation import licence
from fastvlm.common.cli import add_common, log
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output, read_text
from fastvlm.common.page import templates
from fastvlm.common.staging import write_file
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import LOADERS, human

FILE = "README.md"
RESEARCH_LICENCE = "apple-amlr"
ANYWHERE = "ORG/NAME"  # the repository of a card that was made for none
# A path that begins at a root or a home: nobody else's business, and true on one machine only. At the start any folder
# is a root; within a text only what is one on most machines, or links from a hub's root were paths, too.
_PATH = re.compile(
    r"\A/[\w.-]+(?:/\S*)?|file:/+\S*|(?<![\w./~-])(?:/(?:home|Users|root|tmp|private|var|mnt|media|opt|work|data|scratch|srv"
    r"|Volumes)/|~(?:[a-z_][\w-]*)?/|[A-Za-z]:[\\/](?!/))\S*"
)
_NOT_IN_CARD = ("bytes", "peak_gb", "load_s", "encode_s", "prefill_", "decode_")  # sizes are the manifest's; no times


def add_parser(verbs: Any) -> None:
    """Add the verb `card`."""
    text = "write a model card with the parity, quality and size figures of an artefact"
    parser = verbs.add_parser("card", help=text, description=text)
    add = parser.add_argument
    add("artefact", type=Path, metavar="ARTEFACT", help="what `python -m model_export all` wrote")
    add("--output", type=Output(), metavar="FILE", help="where it goes (default: stdout)")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--quality", type=Path, metavar="FILE", help="the JSON that `python -m quantization evaluate --json` printed")
    add("--base-model", metavar="ORG/NAME", help="the hub repository of the checkpoint (the export does not know it)")
    add("--repo", metavar="ORG/NAME", help="where it will be published (for its title and the download command)")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the card of an artefact that is as it was exported; UserError with everything that is wrong."""
    print_utf8()
    faults = [fault for name in (args.base_model, args.repo) if name is not None for fault in name_faults(name)]
    if args.output is not None and (fault := _output_fault(args.output, args.overwrite)):
        faults.append(f"--output {args.output}: {fault}")
    if faults:
        raise UserError("; ".join(faults))
    manifest = exported.read_manifest(args.artefact)
    quality = read_quality(args.quality, manifest) if args.quality else None
    if faults := exported_faults(args.artefact, manifest):
        raise UserError("; ".join(faults))
    licence.say(args.artefact)
    text = make(args.artefact, manifest, args.repo, quality, args.base_model)
    for finding in licence.check(args.artefact, manifest):
        log(f"it can't be published: {finding.line()}")
    if args.output is not None:
        write_file(args.output, text.encode())
        print(f"{args.output}: {len(text.encode())} bytes")
    elif not args.json:
        print(text, end="")
    return {"output": str(args.output) if args.output else None, "card": text}


def print_utf8() -> None:
    """From here on, print in UTF-8 whatever the locale, as a card's file is."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


def _output_fault(output: Path, overwrite: bool) -> str | None:
    """Why a card can't be written there."""
    if output.is_dir():
        return "is a folder: expected the name of a file"
    if not output.parent.is_dir():
        return f"no such folder: {output.parent}: expected one that exists"
    if os.path.lexists(output) and not overwrite:
        return "exists, perhaps with changes of yours: choose another, or replace it with --overwrite"
    return None


def make(
    artefact: Path,
    manifest: Mapping[str, Any],
    repository: str | None = None,
    quality: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> str:
    """The card's text: front matter and Markdown. `quality` is `read_quality`'s.

    UserError when the manifest lacks what every export records, or when a path of this machine would be told.
    """
    try:
        text = _render(artefact, manifest, repository, quality, base_model)
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{artefact / contract.MANIFEST}: lacks what a card tells ({error}): export again with this version"
        ) from error
    if faults := check(text):
        raise UserError(f"the card of {artefact}: {'; '.join(faults)}")
    return text


def check(text: str) -> list[str]:
    """What is wrong with a card: front matter that the hub can't read, no licence in it, a path of this machine."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from yaml import YAMLError

    faults = []
    if not REGEX_YAML_BLOCK.match(text):
        faults.append("it has no front matter: expected it to begin with YAML between two lines `---`")
    else:
        try:
            data: Any = ModelCard(text).data
            if data.license == "other" and not (data.license_name and data.license_link):
                faults.append("its front matter says `license: other`: expected `license_name` and `license_link`, too")
        except (ValueError, TypeError, YAMLError) as error:
            faults.append(f"its front matter is not what the hub reads: {' '.join(str(error).split())}")
    lines = ((number, machine_path(line)) for number, line in enumerate(text.splitlines(), 1))
    return faults + [f"line {number} tells a path of this machine, {path}" for number, path in lines if path]


def machine_path(text: str) -> str | None:
    """The first absolute path in a text of one line, None without one."""
    found = _PATH.search(text)
    return found[0] if found else None


def exported_faults(artefact: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Why an artefact is not what was exported for the app, whole: another layout, one half, files that differ."""
    faults = []
    try:
        exported.check_for_app(artefact, manifest)
    except UserError as error:
        faults.append(str(error))
    return faults + [f"{artefact}: {fault}" for fault in exported.verify_aloud(artefact, manifest)]


def name_faults(name: str) -> list[str]:
    """Why `name` is no ORG/NAME of a hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return [f"{error}"]
    return [] if name.count("/") == 1 else [f"{name!r}: expected ORG/NAME, a user or an organization and a name"]


def read_quality(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The candidate of an evaluation that is this artefact (by its bytes), as rows for the card.

    Raises UserError for what is no such JSON, or an evaluation of others.
    """
    from benchmarks import environment
    from benchmarks.quality.evaluate import LABELS

    size = sum(entry["size"] for entry in manifest["files"].values())
    try:
        document = json.loads(read_text(path).strip().splitlines()[-1])
        reference = document["reference"]
        measured = [one for one in document["candidates"] if "failed" not in one]
        found = [one for one in measured if one["figures"]["bytes"] == size]
        sizes = [one["figures"]["bytes"] for one in measured]
        rows = [
            (label, _share(key, reference["figures"].get(key)), _share(key, one["figures"][key]))
            for one in found[:1]
            for key, label in LABELS.items()
            if key in one["figures"] and key != "questions" and not key.startswith(_NOT_IN_CARD)
        ]
        if found:
            about = found[0]["about"]
            runners = [", ".join(sorted(set(about[key].values()))) for key in ("runners", "reference_runners")]
            machine = environment.machine_line(document["environment"])
            said = {"runners": runners[0], "reference_runners": runners[1], "machine": machine, "about": about}
    except (OSError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        broken = "is no JSON" if isinstance(error, RecursionError | ValueError) else "is something else"
        got = error.strerror if isinstance(error, OSError) else broken
        raise UserError(
            f"--quality {path}: {got}: expected the JSON that `python -m quantization evaluate --json` prints"
        ) from error
    if len(found) != 1:
        raise UserError(
            f"--quality {path}: expected one candidate that is this artefact ({size} bytes), got {len(found)}"
            f" (candidates of {', '.join(map(str, sizes)) or 'nothing'}): evaluate this one"
        )
    return {"rows": rows, "figures": found[0]["figures"], **said}


def _render(
    artefact: Path,
    manifest: Mapping[str, Any],
    repository: str | None,
    quality: Mapping[str, Any] | None,
    base_model: str | None,
) -> str:
    from app_bridge.validation import check_quantization  # torch behind it
    from benchmarks.parity.compare import LABELS
    from benchmarks.parity.report import SOURCES

    vision, llm, parity = manifest["vision"], manifest["llm"], manifest.get("parity")
    shape = contract.output_shape(vision["image_size"], vision["channels"])
    name, research_only = licence.file(artefact), licence.research_only(artefact)
    block, faults = check_quantization.parse_block(llm.get("quantization"))
    if faults:
        raise TypeError(f"quantization: {'; '.join(faults)}")
    settings = block.settings() if block else set()
    pictures = parity and " and ".join(f"{count} {SOURCES[source]}" for source, count in parity["pictures"].items())
    text = _environment().get_template("card.md.j2").render(
        **{key: manifest[key] for key in ("config", "image", "llm", "vision", "sources")},
        versions=", ".join(f"{package} {version}" for package, version in manifest["versions"].items()),
        parameters=f"{llm['parameters']:,}",
        metadata=Markup(_metadata(manifest, research_only, name, base_model)),
        title=(repository or f"/FastVLM, {llm['recipe']['name']}, {vision['image_size']} px").partition("/")[2],
        repository=repository or ANYWHERE,
        base_model=base_model,
        research_only=research_only,
        licence_name=f"{exported.APPLE_LICENCE} License Agreement",
        attribution=exported.APPLE_ATTRIBUTION,
        licence_file=name,
        sizes=_sizes(manifest),
        total=human(sum(entry["size"] for entry in manifest["files"].values())),
        parity=parity,
        metrics=[(label, parity["metrics"][key]) for key, label in LABELS.items()] if parity else [],
        pictures=pictures,
        on_mac="Core ML" in str([each and each["runners"] for each in (parity, quality)]),
        quality=quality,
        mlx_lm=json.dumps(contract.MLX_LM_CONFIG),
        shape=list(shape),
        app_shape=list(contract.APP_OUTPUT_SHAPE) if shape != contract.APP_OUTPUT_SHAPE else None,
        loaders=[(one, one.reads(settings)) for one in LOADERS if one.layout == manifest["config"]["layout"]],
        notice=(artefact / contract.NOTICE).read_text("utf-8", errors="replace"),
    )  # fmt: skip
    return text.rstrip("\n") + "\n"


def _environment() -> Environment:
    """Every value becomes plain text in Markdown, unless a filter made it something else."""
    from benchmarks.parity.report import bound, figure

    pages = templates(Path(__file__).parent / "templates").overlay(autoescape=False, finalize=_plain)
    pages.filters |= {
        "code": _code,
        "fenced": _fenced,
        "human": human,
        "figure": lambda metric: figure(metric["value"], metric["unit"]),
        "bound": bound,
        "safe": Markup,
    }
    return pages


def _metadata(manifest: Mapping[str, Any], research_only: bool, name: str | None, base_model: str | None) -> str:
    """The front matter, without its fences."""
    from huggingface_hub import ModelCardData

    smaller = manifest["llm"].get("quantization") or manifest["vision"].get("compression")
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if base_model and smaller else {}
    data = ModelCardData(
        license=RESEARCH_LICENCE if research_only else "other" if name else None,
        license_name=f"see-{name}" if name and not research_only else None,
        license_link=name,
        base_model=base_model,
        pipeline_tag="image-text-to-text",
        library_name="mlx",
        tags=["mlx", "coreml", "fastvlm", "llava_qwen2"],
        **relation,
    )
    return str(data.to_yaml())


def _sizes(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, size, what it is) of the encoder and each file of weights, then all the rest in a row."""
    weights = {name: "the language model, for MLX" for name in manifest["llm"]["files"]}
    weights |= {contract.PROJECTOR_WEIGHTS: "the projector", contract.PACKAGE: "the image encoder, for Core ML"}
    sizes: dict[str, int] = {}
    for name, entry in manifest["files"].items():
        top = name.split("/")[0]
        sizes[top if top in weights else ""] = sizes.get(top if top in weights else "", 0) + entry["size"]
    rest = sizes.pop("", 0)
    rows = [(name, human(size), weights[name]) for name, size in sorted(sizes.items())]
    return [*rows, ("*.json, …", human(rest), "configuration, tokenizer, licence")]


def _share(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2%}" if key.endswith("top1") or key in ("same_answers", "exact") else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """A value as Markdown that shows it as it is, on one line (CommonMark: any punctuation may be escaped)."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> Markup:
    """As code: between more backticks than it has in a row."""
    text = " ".join(value.split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`")


def _fenced(value: str) -> Markup:
    """As a block of text, as it is."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return Markup(f"{ticks}text\n{value.rstrip()}\n{ticks}")
