"""The resources that Xcode makes of a framework's files: all in one place, whatever folder they came from.

Two of one name fail the build ("Multiple commands produce", as two README.md do in
https://github.com/rudrankriyam/Foundation-Models-Framework-Lab/issues/33).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from app_bridge.rules import finding
from fastvlm.common.files import read_small
from fastvlm.common.findings import Finding

# Folders that Xcode takes for one resource; what is a Core ML model becomes NAME.mlmodelc.
_OPAQUE = (".xcassets", ".bundle", ".framework", ".xcdatamodeld")
_COMPILED = (".mlpackage", ".mlmodel", ".mlmodelc")
# Suffixes of files that Xcode builds instead of copying them, or takes for the product's own.
_BUILT = {
    ".swift", ".metal", ".m", ".mm", ".c", ".cc", ".cpp", ".h", ".hpp", ".s", ".modulemap", ".storyboard", ".xib",
    ".xcassets", ".xcdatamodeld", ".intentdefinition",
}  # fmt: skip
# Entries of a framework's folder besides its binary; on iOS the resources are beside these ("Placing content in a
# bundle", developer.apple.com/documentation/bundleresources).
_OF_FRAMEWORK = ("info.plist", "headers", "privateheaders", "modules", "_codesignature", "assets.car")


def model_path(app: Path, folder: str) -> Path:
    """Return the absolute path of an app's model, `folder` below the app. A model that is a link stays a link."""
    path = app.expanduser() / folder
    return Path(os.path.realpath(path.parent), path.name)


def resource(name: str) -> str:
    """The name of the resource that the file `name` (with forward slashes) becomes."""
    whole = Path(_whole(name))
    return f"{whole.stem}.mlmodelc" if whole.suffix in _COMPILED else whole.name


def check(names: Iterable[str]) -> list[Finding]:
    """Files of a model that become resources of one name, or none."""
    groups = [sorted(same) for same in _by_resource(names).values()]
    built = [
        finding("resource-built", whole, "what Xcode compiles or merges")
        for same in groups
        for whole in same
        if Path(whole).suffix.lower() in _BUILT or whole.lower().endswith("info.plist")
    ]
    return built + [
        finding("name-twice", " and ".join(same), f"{len(same)} resources of one name") for same in groups if same[1:]
    ]


def group(folder: Path) -> Path | None:
    """The folder around `folder` whose files all become resources, as a project beside it says; None: there is none."""
    for above in folder.parents:
        path = rf'isa = PBXFileSystemSynchronizedRootGroup;[^}}]*\bpath = "?{re.escape(above.name)}"?;'
        for project in above.parent.glob("*.xcodeproj/project.pbxproj"):
            if re.search(path, read_small(project).decode(errors="replace")):
                return above
    return None


def collisions(files: Iterable[str], folder: Path, framework: Path) -> list[Finding]:
    """Return findings about the framework's other files that clash with `files` in `folder`, or that the app loads."""
    around = [path for path in sorted(framework.rglob("*")) if not path.is_dir() and not path.is_relative_to(folder)]
    ours, theirs = _by_resource(files), _by_resource(path.relative_to(framework).as_posix() for path in around)
    own = dict.fromkeys(_OF_FRAMEWORK, "the framework's own") | {framework.name.lower(): "the framework's binary"}
    others = own | {key: " and ".join(sorted(names)) for key, names in theirs.items()}
    stray = [
        finding("resource-stray-weights", f"{framework.name}/{name}", "weights outside the model's folder")
        for key, names in theirs.items()
        if key not in ours
        for name in sorted(names)
        if name.endswith(".safetensors")
    ]
    return stray + [
        finding(
            "resource-collision",
            f"{framework.name}: {others[key]}",
            f"the same name as the model's {' and '.join(sorted(ours[key]))}",
        )
        for key in sorted(set(ours) & set(others))
    ]


def _by_resource(names: Iterable[str]) -> dict[str, set[str]]:
    """Map a resource's name, in lower case as macOS compares it, to the files that become it, hidden ones left out."""
    sources: dict[str, set[str]] = {}
    for name in names:
        if not any(part.startswith(".") for part in name.split("/")):
            sources.setdefault(resource(name).lower(), set()).add(_whole(name))
    return sources


def _whole(name: str) -> str:
    """The file, or the outermost folder around it that is one resource."""
    parts = name.split("/")
    ends = (index for index, part in enumerate(parts, 1) if Path(part).suffix in (*_OPAQUE, *_COMPILED))
    return "/".join(parts[: next(ends, None)])
