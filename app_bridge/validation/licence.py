"""What has to travel with the weights: their licence, its attribution, a record of what was changed.

No flag overrides these findings. What Apple's licence asks of who passes a model on is in the paragraph "Distribution"
of LICENSE_MODEL in https://github.com/apple/ml-fastvlm: the agreement's text, its attribution notice, and that
derivatives say what was modified.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log
from fastvlm.common.files import read_small
from fastvlm.common.findings import Finding
from model_export import artefact as exported
from model_export import contract

# How the licence of Apple's code begins (LICENSE beside LICENSE_MODEL in apple/ml-fastvlm): it grants no weights.
_OF_CODE = "This Apple software is supplied to you by Apple"
_CHANGES = re.compile(re.escape(exported.CHANGES) + r"\n- \S")  # the heading and at least one
_AGAIN = (
    "put LICENSE_MODEL from https://github.com/apple/ml-fastvlm (for weights of your own: your LICENSE) beside the"
    " checkpoint's weights and export again"
)
_BESIDE = (
    f"put LICENSE_MODEL from https://github.com/apple/ml-fastvlm and a {contract.NOTICE} with the line"
    f" {exported.APPLE_ATTRIBUTION!r} into the artefact's folder (for other weights than Apple's: their LICENSE)"
)


def check(artefact: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    """Everything that keeps the artefact from being passed on, bundled or published; empty when it may be.

    Only files that the export wrote count: a licence put into the artefact afterwards is none of its manifest's. In an
    artefact made elsewhere every file counts, and what was changed in its weights isn't known.
    """
    ours = exported.is_ours(manifest)
    notice = artefact / contract.NOTICE
    listed = [name for name in manifest["files"] if "/" not in name]
    licences = [name for name in listed if name.lower().startswith(exported.LICENCES)]
    findings = [
        Finding(
            "licence-changed", name, "other bytes than the export wrote", "the text as it was exported",
            "export again: to change it, change it beside the checkpoint's weights",
        )
        for name in (*licences, contract.NOTICE)
        if ours and name in manifest["files"] and _differs(artefact / name, manifest["files"][name]["sha256"])
    ]  # fmt: skip
    texts = {name: text for name in licences if (text := _text(artefact / name))}
    changed = {finding.where for finding in findings}  # each has its finding
    if not changed & {*licences} and not any(_OF_CODE not in text for text in texts.values()):
        findings.append(
            Finding(
                "licence-missing",
                "LICENSE*",
                _instead(artefact, licences, texts),
                "the licence of the weights",
                _AGAIN if ours else _BESIDE,
            )
        )
    said = _text(notice)
    if contract.NOTICE in changed:
        return findings
    if any(map(exported.is_apples, texts.values())) and exported.APPLE_ATTRIBUTION not in said:
        findings.append(
            Finding(
                "licence-attribution-missing", contract.NOTICE, "a notice without it" if said else "no text",
                f"the sentence that the weights' licence asks for: {exported.APPLE_ATTRIBUTION!r}",
                "export again: the export writes it where the checkpoint carries the licence"
                if ours
                else f"write that sentence into {contract.NOTICE} in the artefact's folder",
            )
        )  # fmt: skip
    if ours and not _CHANGES.search(_raw(notice)):
        findings.append(
            Finding(
                "licence-change-record-missing", contract.NOTICE,
                "nothing of what was changed" if said else "no text", "a list of what was changed in the weights",
                "export again: the export writes it",
            )
        )  # fmt: skip
    return findings


def file(artefact: Path) -> str | None:
    """The name of the weights' licence, by its text: Apple's research licence, or else the first that isn't of code."""
    texts = {name: _text(artefact / name) for name in _beside(artefact)}
    return min(
        texts, key=lambda name: (not exported.is_apples(texts[name]), _OF_CODE in texts[name], name), default=None
    )


def research_only(artefact: Path) -> bool:
    """Whether the weights' licence is Apple's research licence."""
    name = file(artefact)
    return name is not None and exported.is_apples(_text(artefact / name))


def term(artefact: Path) -> str | None:
    """The research-only term in our own words, with the licence's name and where its text lies; None without one."""
    if not research_only(artefact):
        return None
    return (
        "For research only: no product, no service and nothing commercial may use this model or what is made of it"
        f" ({exported.APPLE_LICENCE} License Agreement).\nIts text is {file(artefact)} in the model's folder:"
        f" pass it and {contract.NOTICE} on with the model."
    )


def say(artefact: Path) -> None:
    """Print the research-only term, where there is one, on stderr."""
    if (text := term(artefact)) is not None:
        log(text)


def _beside(artefact: Path) -> list[str]:
    """The names of all licences in the folder, whoever put them there."""
    files = (path.name for path in artefact.iterdir() if path.is_file())
    return sorted(name for name in files if name.lower().startswith(exported.LICENCES))


def _instead(artefact: Path, licences: list[str], texts: Mapping[str, str]) -> str:
    """What there is in place of a licence of the weights."""
    if texts:
        return f"{', '.join(texts)}: Apple's licence of its code, not of weights"
    if licences:
        return f"{', '.join(licences)} without a text"
    later = _beside(artefact)
    return f"{', '.join(later)}, which the export did not write" if later else "none"


def _differs(path: Path, sha256: str) -> bool:
    return path.is_file() and exported.hash_file(path)["sha256"] != sha256


def _raw(path: Path) -> str:
    return read_small(path).decode(errors="replace") if path.is_file() else ""


def _text(path: Path) -> str:
    """A file's text with every run of white space as one blank; "" where there is no such file."""
    return " ".join(_raw(path).split())
