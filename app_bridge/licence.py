"""The licence files that have to travel with the weights, and the research-only term of Apple's licence.

No flag overrides these findings. What Apple's licence asks of anyone who passes a model on is in the paragraph
"Distribution" of LICENSE_MODEL in https://github.com/apple/ml-fastvlm: the agreement's text, its attribution notice,
and a statement of what was modified.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app_bridge.rules import finding
from fastvlm.common.cli import log
from fastvlm.common.files import LICENCES, read_small
from fastvlm.common.findings import Finding
from model_export import artefact as exported
from model_export import contract

# How the licence of Apple's code begins (LICENSE beside LICENSE_MODEL in apple/ml-fastvlm): it grants no weights.
_OF_CODE = "This Apple software is supplied to you by Apple"
_CHANGES = re.compile(re.escape(exported.CHANGES) + r"\n- \S")  # the heading and at least one entry


def check(artefact: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    """Return everything that forbids bundling or publishing the artefact; empty when nothing does.

    Only files that the export wrote count: a licence added afterwards is not in the manifest. In an artefact made
    elsewhere every file counts, and nothing records what was changed in its weights.
    """
    ours, notice = exported.is_ours(manifest), _text(artefact / contract.NOTICE)
    licences = [name for name in manifest["files"] if "/" not in name and _is_licence(name)]
    texts = {name: text for name in licences if (text := _text(artefact / name))}
    changed = {
        name
        for name in (*licences, contract.NOTICE)
        if ours and name in manifest["files"] and _differs(artefact / name, manifest["files"][name]["sha256"])
    }
    findings = [finding("licence-changed", name, "other bytes than the export wrote") for name in sorted(changed)]
    elsewhere, values = (
        "" if ours else "/elsewhere",
        {"notice": contract.NOTICE, "sentence": repr(exported.APPLE_ATTRIBUTION)},
    )
    if not changed & {*licences} and all(_OF_CODE in text for text in texts.values()):
        got = _instead_of_licence(artefact, licences, texts)
        findings.append(finding(f"licence-missing{elsewhere}", "LICENSE*", got, **values))
    if contract.NOTICE in changed:
        return findings
    if any(map(exported.is_apples, texts.values())) and exported.APPLE_ATTRIBUTION not in notice:
        got = "a notice without it" if notice else "no text"
        findings.append(finding(f"licence-attribution-missing{elsewhere}", contract.NOTICE, got, **values))
    if ours and not _CHANGES.search(_raw(artefact / contract.NOTICE)):
        got = "nothing of what was changed" if notice else "no text"
        findings.append(finding("licence-change-record-missing", contract.NOTICE, got))
    return findings


def licence_file(artefact: Path) -> str | None:
    """Return the file name of the weights' licence: Apple's research licence, or else the first that is not of code."""
    texts = {name: _text(artefact / name) for name in _in_folder(artefact)}
    return min(texts, key=lambda name: (not exported.is_apples(texts[name]), _OF_CODE in texts[name]), default=None)


def research_only(artefact: Path) -> bool:
    """Return whether the weights' licence is Apple's research licence."""
    name = licence_file(artefact)
    return name is not None and exported.is_apples(_text(artefact / name))


def research_term(artefact: Path) -> str | None:
    """Return the research-only term in our own words, with the file that has its text; None for other licences."""
    if not research_only(artefact):
        return None
    return (
        "For research only: no product, no service and nothing commercial may use this model or what is made of it"
        f" ({exported.APPLE_LICENCE} License Agreement).\nIts text is {licence_file(artefact)} in the model's folder:"
        f" pass it and {contract.NOTICE} on with the model."
    )


def log_research_term(artefact: Path) -> None:
    """Print the research-only term on stderr where it applies."""
    if (text := research_term(artefact)) is not None:
        log(text)


def _is_licence(name: str) -> bool:
    return name.lower().startswith(LICENCES)


def _in_folder(artefact: Path) -> list[str]:
    """The names of all licences in the folder, whoever put them there."""
    return sorted(path.name for path in artefact.iterdir() if path.is_file() and _is_licence(path.name))


def _instead_of_licence(artefact: Path, licences: list[str], texts: Mapping[str, str]) -> str:
    if texts:
        return f"{', '.join(texts)}: Apple's licence of its code, not of weights"
    if licences:
        return f"{', '.join(licences)} without a text"
    added = _in_folder(artefact)
    return f"{', '.join(added)}, which the export did not write" if added else "none"


def _differs(path: Path, sha256: str) -> bool:
    return path.is_file() and exported.hash_file(path)["sha256"] != sha256


def _raw(path: Path) -> str:
    return read_small(path).decode(errors="replace") if path.is_file() else ""


def _text(path: Path) -> str:
    """A file's text with every run of white space as one blank; "" where there is no such file."""
    return " ".join(_raw(path).split())
