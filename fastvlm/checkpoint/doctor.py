"""`fastvlm doctor PATH`: a checkpoint's contents, all of its faults, and the command that exports it."""

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import some_path
from fastvlm.common.findings import Finding, collect, errors
from fastvlm.common.image_tokens import APP_OUTPUT_SHAPE, tokens_per_image
from fastvlm.data.chat_template import TemplateFault, render

if TYPE_CHECKING:
    from fastvlm.checkpoint.adapter import Adapter
    from fastvlm.checkpoint.checkpoint import Checkpoint
    from fastvlm.checkpoint.folder_kind import FolderKind

# Facts that the report calls otherwise than the document.
_LABELS = {"tied": "tied embeddings", "adapted_matrices": "matrices", "replaced_tensors": "whole tensors"}


@dataclass
class Report:
    """The doctor's findings. Without faults `facts`, `parts` and `export` are filled; `kind`: it is something else.

    `parts` of the model: the number of parameters (and buffers), and their megabytes (10^6 bytes) in the files.
    """

    path: Path
    layout: str | None = None
    kind: "FolderKind | None" = None
    facts: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    export: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "path": str(self.path),
            "usable": not self.faults,
            "layout": self.layout,
            **({"kind": self.kind.name, "base": self.kind.base} if self.kind else {}),
            **self.facts,
            "parts": self.parts,
            "warnings": self.warnings,
            "faults": [
                {"fault": fault.message, **fault.document(), "details": list(fault.details)} for fault in self.faults
            ],
            "export": self.export,
        }

    def text(self) -> str:
        """The report as lines for a person; every fault and every tensor it names has its own."""
        what = ("kind", self.kind.what) if self.kind else ("layout", self.layout or "unknown")
        lines = [f"{'path':<16}{self.path}", f"{what[0]:<16}{what[1]}"]
        facts = {_LABELS.get(name, name.replace("_", " ")): value for name, value in self.facts.items()}
        lines += [
            f"{label:<16}{('no', 'yes')[value] if isinstance(value, bool) else value}" for label, value in facts.items()
        ]
        lines += [
            f"  {name:<14}{part['parameters']:>14,} parameters {part['megabytes']:>10,.1f} MB"
            for name, part in self.parts.items()
            if part["parameters"]
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        for fault in self.faults:
            lines += [f"fault: {fault.message}", *(f"    {detail}" for detail in fault.details)]
        lines += [f"{name.replace('_', ' '):<16}{value}" for name, value in self.export.items()]
        return "\n".join(lines)


def diagnose(
    path: str | os.PathLike[str],
    deep: bool = True,
    advance: Callable[..., Any] | None = None,
    adapter: Path | None = None,
) -> Report:
    """Examine the checkpoint at `path`, never writing to it; with `deep`, every weight is read and must be finite.

    With an `adapter`'s folder, what is examined is the checkpoint that it makes of this one. `advance()` is called
    after each tensor read. Unusable input is in the report's faults, not an exception.
    """
    from fastvlm.checkpoint.checkpoint import examine

    examination = examine(path, adapter=adapter)
    warnings = [str(finding) for finding in examination.warnings]
    report = Report(
        examination.path, examination.layout, examination.kind, warnings=warnings, faults=examination.faults
    )
    checkpoint = examination.checkpoint
    if checkpoint is None:
        if report.kind is not None and adapter is None:
            _look_at_adapter(report)
        return report
    report.facts = {
        **({} if checkpoint.adapter is None else _adapter_facts(checkpoint.adapter)),
        "form": checkpoint.form,
        "dtype": checkpoint.dtype,
        "files": len(checkpoint.files),
        "image_size": checkpoint.image_size,
        "image_tokens": tokens_per_image(checkpoint.image_size),
        "image_strategy": checkpoint.image_strategy,
        "tied": checkpoint.tied,
    }
    report.parts = _parts(checkpoint)
    _look_at_tokenizer(checkpoint, report)
    bad = list(checkpoint.check_finite(advance)) if deep else []
    report.faults += bad
    report.facts["weights"] = "not read" if not deep else "not finite" if bad else "all finite"
    if not report.faults:
        report.export = _export(checkpoint)
    return report


def _look_at_adapter(report: Report) -> None:
    """What an adapter's folder, which is no checkpoint, holds; its own faults where it is damaged."""
    from fastvlm.checkpoint import adapter_folder

    adapter, findings = collect(adapter_folder.read(report.path))
    if adapter is None and all(finding.rule == "adapter-missing" for finding in findings):
        return  # it is something else
    report.warnings += [str(finding) for finding in findings if finding.severity == "warning"]
    report.faults += errors(findings)
    if adapter is not None:
        report.facts = _adapter_facts(adapter)


def _adapter_facts(adapter: "Adapter") -> dict[str, Any]:
    facts = {"adapter": adapter.kind, "adapter_of": adapter.base or "not said", **adapter.facts}
    return {name: ", ".join(map(str, fact)) if isinstance(fact, list) else fact for name, fact in facts.items()}


def _parts(checkpoint: "Checkpoint") -> dict[str, dict[str, Any]]:
    from fastvlm.checkpoint import naming

    prefixes = {
        "vision": naming.VISION,
        "projector": naming.PROJECTOR,
        "embeddings": naming.EMBEDDINGS,
        "lm_head": naming.LM_HEAD,
        "decoder": naming.LANGUAGE,
    }
    parts: dict[str, dict[str, Any]] = {name: {"parameters": 0, "megabytes": 0.0} for name in (*prefixes, "total")}
    for tensor, info in checkpoint.tensors.items():
        part = next(name for name, prefix in prefixes.items() if tensor.startswith(prefix))
        for name in (part, "total"):
            parts[name]["parameters"] += info.size
            parts[name]["megabytes"] += info.nbytes / 1e6
    return parts


def _look_at_tokenizer(checkpoint: "Checkpoint", report: Report) -> None:
    try:
        tokenizer = checkpoint.tokenizer()
    except UserError as error:
        report.faults.append(Finding("tokenizer-invalid", str(report.path), str(error)))
        return
    report.facts |= {
        "tokenizer": f"{len(tokenizer)} tokens for {checkpoint.model_config.text.vocab_size} rows",
        "image_token": f"<image> = {checkpoint.image_token_id}",
        "end_token": f"{tokenizer.eos_token} = {tokenizer.eos_token_id}",
        "chat_template": "none",
    }
    if not tokenizer.chat_template:
        report.warnings.append("no chat template: prompts can only be built with --conv-mode")
        return
    try:
        question = [{"role": "user", "content": "hello"}]
        rendered = render(tokenizer.chat_template, question, tokenizer.special_tokens_map)
    except TemplateFault as error:
        report.faults.append(Finding("chat-template-fails", "chat template", str(error)))
        return
    known = "<|im_start|>user\nhello<|im_end|>" in rendered
    report.facts["chat_template"] = "Qwen's" if known else "present"
    if not known:
        report.warnings.append("the chat template isn't Qwen's (<|im_start|>user ...), which FastVLM was trained with")
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if known and tokenizer.decode(ids) != rendered:
        report.warnings.append("the tokenizer doesn't give the chat template's text back")


def _export(checkpoint: "Checkpoint") -> dict[str, Any]:
    from fastvlm.checkpoint.configuration import loader_faults

    features = (1, tokens_per_image(checkpoint.image_size), checkpoint.model_config.vision_width)
    source, target = shlex.quote(str(checkpoint.path)), shlex.quote(checkpoint.path.resolve().name + "-artefact")
    fold = (
        "branches and BatchNorms are folded first" if checkpoint.form == "training" else "BatchNorms are folded first"
    )
    faults = loader_faults(checkpoint.model_config)
    if faults:
        reason = f"no: the demo app or the MLX loaders don't run it: {'; '.join(faults)}"
        return {"export": reason, "demo_app": "no"}
    app = f"no: it takes features of shape {list(APP_OUTPUT_SHAPE)}, these have {list(features)}"
    adapter = "" if checkpoint.adapter is None else f" --adapter {shlex.quote(str(checkpoint.adapter.path))}"
    return {
        "export": f"yes ({fold})",
        "command": f"fastvlm export --checkpoint {source}{adapter} --output-dir {target}",
        "demo_app": "yes" if features == APP_OUTPUT_SHAPE else app,
    }


def add_parser(subparsers: Any) -> None:
    """Add the verb to the package's command line."""
    parser = subparsers.add_parser("doctor")
    parser.add_argument("path", metavar="PATH", help="a checkpoint's folder, or an adapter's")
    text = "the folder of an adapter: examine the checkpoint that it makes of this one"
    parser.add_argument("--adapter", type=some_path, metavar="FOLDER", help=text)
    parser.add_argument("--quick", action="store_true", help="don't read the weights (no check for NaN)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb: print the report; UserError (exit 2) if the checkpoint can't be used."""
    with progress(f"examining {args.path}") as advance:
        report = diagnose(args.path, deep=not args.quick, advance=advance, adapter=args.adapter)
    if not args.json:
        print(report.text())
    if report.faults:
        count = f"{len(report.faults)} fault{'s' * (len(report.faults) > 1)}, listed above"
        listed = "; ".join(map(str, report.faults)) if args.json else count
        what = f"{args.path} with adapter {args.adapter}" if args.adapter else args.path
        raise UserError(f"cannot use checkpoint {what}: {listed}", report.document())
    return report.document()
