"""A model card, the README.md of a hub's repository, from an artefact's manifest.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards; huggingface_hub.ModelCardData). `apple-amlr`
is its name of Apple's research licence: apple/FastVLM-0.5B, README.md.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, TemplateError
from markupsafe import Markup

from app_bridge import licence
from app_bridge.publishing.checks import card_faults
from app_bridge.validation import check_quantization
from benchmarks import environment
from benchmarks.parity import report
from benchmarks.parity.verdict import LABELS
from benchmarks.quality import evaluate
from fastvlm.common import documents
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_text
from fastvlm.common.page import templates
from fastvlm.common.units import format_bytes
from model_export import artefact as exported
from model_export import contract
from quantization.catalogue import LOADERS

FILE = "README.md"
RESEARCH_LICENCE = "apple-amlr"
PLACEHOLDER = "ORG/NAME"  # the repository of a card that was made for none
_NOT_IN_CARD = ("bytes", "peak_gb", "load_s", "encode_s", "prefill_", "decode_")  # sizes are the manifest's; no times


def make(
    artefact: Path,
    manifest: Mapping[str, Any],
    repository: str | None = None,
    quality: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> str:
    """Return the card's front matter and Markdown. `quality` is `read_quality`'s.

    Raises UserError when the manifest lacks what every export records, or when the text tells a path of this machine.
    """
    try:
        text = _render(artefact, manifest, repository, quality, base_model)
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{artefact / contract.MANIFEST}: lacks what a card tells ({error}): export again with this version"
        ) from error
    if faults := card_faults(text):
        raise UserError(f"the card of {artefact}: {'; '.join(faults)}")
    return text


def read_quality(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's figures of the one evaluated candidate that is this artefact, by its size in bytes.

    Raises UserError for a file that is not `fastvlm evaluate --json`'s, or evaluates other models.
    """
    size = sum(entry["size"] for entry in manifest["files"].values())
    try:
        document = documents.loads(read_text(path).strip().splitlines()[-1])
        measured = [entry for entry in document["candidates"] if "failed" not in entry]
        sizes = [entry["figures"]["bytes"] for entry in measured]
        if sizes.count(size) != 1:
            raise UserError(
                f"--quality {path}: expected one candidate that is this artefact ({size} bytes), got"
                f" {sizes.count(size)} (candidates of {', '.join(map(str, sizes)) or 'nothing'}): evaluate this one"
            )
        entry, reference = measured[sizes.index(size)], document["reference"]["figures"]
        figures, about = entry["figures"], entry["about"]
        rows = [
            (label, _figure(key, reference.get(key)), _figure(key, figures[key]))
            for key, label in evaluate.LABELS.items()
            if key in figures and key != "questions" and not key.startswith(_NOT_IN_CARD)
        ]
        runners = {key: ", ".join(sorted(set(about[key].values()))) for key in ("runners", "reference_runners")}
        machine = environment.machine_line(document["environment"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        got = error.strerror if isinstance(error, OSError) else "is something else"
        raise UserError(f"--quality {path}: {got}: expected the JSON that `fastvlm evaluate --json` prints") from error
    return {"rows": rows, "figures": figures, "about": about, "machine": machine, **runners}


def _render(
    artefact: Path,
    manifest: Mapping[str, Any],
    repository: str | None,
    quality: Mapping[str, Any] | None,
    base_model: str | None,
) -> str:
    vision, llm, parity = manifest["vision"], manifest["llm"], manifest.get("parity")
    shape = contract.output_shape(vision["image_size"], vision["channels"])
    block, faults = check_quantization.parse_block(llm.get("quantization"))
    if faults:
        raise TypeError(f"quantization: {'; '.join(faults)}")
    settings = block.settings() if block else set()
    text = _environment().get_template("card.md.j2").render(
        **{key: manifest[key] for key in ("config", "image", "llm", "vision", "sources", "versions")},
        fine_tuned=exported.fine_tuned(manifest["sources"]),
        metadata=Markup(_metadata(artefact, manifest, base_model)),
        title=(repository or f"/FastVLM, {llm['recipe']['name']}, {vision['image_size']} px").partition("/")[2],
        repository=repository or PLACEHOLDER,
        base_model=base_model,
        research_only=licence.research_only(artefact),
        licence_name=f"{exported.APPLE_LICENCE} License Agreement",
        attribution=exported.APPLE_ATTRIBUTION,
        licence_file=licence.licence_file(artefact),
        sizes=_sizes(manifest),
        total=sum(entry["size"] for entry in manifest["files"].values()),
        parity=parity,
        labels=LABELS,
        picture_sources=report.SOURCES,
        on_mac="Core ML" in str([each and each["runners"] for each in (parity, quality)]),
        quality=quality,
        mlx_lm=json.dumps(contract.MLX_LM_CONFIG),
        shape=list(shape),
        app_shape=list(contract.APP_OUTPUT_SHAPE) if shape != contract.APP_OUTPUT_SHAPE else None,
        loaders=[(known, known.reads(settings)) for known in LOADERS if known.layout == manifest["config"]["layout"]],
        notice=(artefact / contract.NOTICE).read_text("utf-8", errors="replace"),
    )  # fmt: skip
    return text.rstrip("\n") + "\n"


def _environment() -> Environment:
    """Every value becomes plain text in Markdown, unless a filter made it something else."""
    pages = templates(Path(__file__).parent / "templates").overlay(autoescape=False, finalize=_plain)
    pages.filters |= {
        "code": _code,
        "fenced": _fenced,
        "human": format_bytes,
        "figure": lambda metric: report.figure(metric["value"], metric["unit"]),
        "bound": report.bound,
        "safe": Markup,
    }
    return pages


def _metadata(artefact: Path, manifest: Mapping[str, Any], base_model: str | None) -> str:
    """The front matter, without its fences."""
    name, research_only = licence.licence_file(artefact), licence.research_only(artefact)
    smaller = manifest["llm"].get("quantization") or manifest["vision"].get("compression")
    made = "quantized" if smaller else "finetune" if exported.fine_tuned(manifest["sources"]) else None
    relation: dict[str, Any] = {"base_model_relation": made} if base_model and made else {}
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


def _sizes(manifest: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(name, bytes, description) of the encoder and each file of weights, then of all the rest together."""
    rest = "*.json, …"
    parts = dict.fromkeys(sorted(manifest["llm"]["files"]), "the language model, for MLX")
    parts |= {contract.PROJECTOR_WEIGHTS: "the projector", contract.PACKAGE: "the image encoder, for Core ML"}
    parts = dict(sorted(parts.items())) | {rest: "configuration, tokenizer, licence"}
    sizes = dict.fromkeys(parts, 0)
    for name, entry in manifest["files"].items():
        top = name.split("/")[0]
        sizes[top if top in parts else rest] += entry["size"]
    return [(name, sizes[name], description) for name, description in parts.items()]


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2%}" if key.endswith("top1") or key in ("same_answers", "exact") else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """A value as Markdown that shows it as it is, on one line (CommonMark: any punctuation may be escaped)."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> Markup:
    """The text as code, between more backticks than it has in a row."""
    text = " ".join(value.split()).replace("|", "\\|")
    ticks = _ticks(text, 1)
    return Markup(f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`")


def _fenced(value: str) -> Markup:
    """The text, unchanged, as a fenced block."""
    ticks = _ticks(value, 3)
    return Markup(f"{ticks}text\n{value.rstrip()}\n{ticks}")


def _ticks(text: str, least: int) -> str:
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
