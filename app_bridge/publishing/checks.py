"""Faults that forbid publishing an artefact or a card, a line each."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError

from fastvlm.common.errors import UserError
from model_export import artefact as exported

# A path that begins at a root or a home: private, and true on one machine only. At the start of a text any folder is a
# root; within it only what is one on most machines, since links from a hub's root look alike.
_PATH = re.compile(
    r"\A/[\w.-]+(?:/\S*)?|file:/+\S*|(?<![\w./~-])(?:/(?:home|Users|root|tmp|private|var|mnt|media|opt|work|data|scratch|srv"
    r"|Volumes)/|~(?:[a-z_][\w-]*)?/|[A-Za-z]:[\\/](?!/))\S*"
)


def artefact_faults(artefact: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return why an artefact is not a whole model for the app, as it was exported."""
    faults = []
    try:
        exported.check_for_app(artefact, manifest)
    except UserError as error:
        faults.append(str(error))
    changes = exported.verify_aloud(artefact, manifest)
    remedy = "move extra files away, and export again what changed or is missing"
    return faults + ([f"{artefact}: {'; '.join(changes)}: {remedy}"] if changes else [])


def card_faults(text: str) -> list[str]:
    """Return a card's faults: front matter that the hub can't read, a licence without a name, a machine's path."""
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
    """Return the first absolute path in a text of one line, None without one."""
    match = _PATH.search(text)
    return match[0] if match else None


def machine_paths(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, path) for every text in a JSON value that tells a path of this machine."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from machine_paths(item, f"{where}.{key}".strip("."))
    if isinstance(value, str) and (path := machine_path(value)):
        yield where, path
