"""What Xcode makes of the files in a framework's folder: resources, all in one place, whatever folder they came from.

Two of one name fail the build ("Multiple commands produce", as two README.md do in
https://github.com/rudrankriyam/Foundation-Models-Framework-Lab/issues/33).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastvlm.common.files import read_small
from fastvlm.common.findings import Finding

# Folders that Xcode takes for one resource; what is a Core ML model becomes NAME.mlmodelc.
_OPAQUE = (".xcassets", ".bundle", ".framework", ".xcdatamodeld")
_COMPILED = (".mlpackage", ".mlmodel", ".mlmodelc")
# What Xcode builds instead of copying it, or takes for the product's own.
_BUILT = {
    ".swift", ".metal", ".m", ".mm", ".c", ".cc", ".cpp", ".h", ".hpp", ".s", ".modulemap", ".storyboard", ".xib",
    ".xcassets", ".xcdatamodeld", ".intentdefinition",
}  # fmt: skip
# What a framework's folder has besides its binary; on iOS the resources are beside these ("Placing content in a
# bundle", developer.apple.com/documentation/bundleresources).
_OF_FRAMEWORK = ("info.plist", "headers", "privateheaders", "modules", "_codesignature", "assets.car")


def model_path(app: Path, folder: str) -> Path:
    """Return the absolute path of an app's model, `folder` below the app. A model that is a link stays a link."""
    path = app.expanduser() / folder
    return Path(os.path.realpath(path.parent), path.name)


def resource(name: str) -> str:
    """What the file `name` (with forward slashes) is called among the resources."""
    whole = Path(_whole(name))
    return f"{whole.stem}.mlmodelc" if whole.suffix in _COMPILED else whole.name


def check(names: Iterable[str]) -> list[Finding]:
    """Files of a model that become resources of one name, or none."""
    found = _by_resource(names)
    built = [
        Finding("resource-built", whole, "what Xcode compiles or merges", "only files that it copies", "export again")
        for same in found.values() for whole in sorted(same)
        if Path(whole).suffix.lower() in _BUILT or whole.lower().endswith("info.plist")
    ]  # fmt: skip
    return built + [
        Finding(
            "name-twice", " and ".join(sorted(same)), f"{len(same)} resources of one name",
            "one: Xcode puts them into one folder", "export again",
        )
        for same in found.values() if len(same) > 1
    ]  # fmt: skip


def group(folder: Path) -> Path | None:
    """The folder around `folder` whose files all become resources, as a project beside it says; None: there is none."""
    for one in folder.parents:
        path = rf'isa = PBXFileSystemSynchronizedRootGroup;[^}}]*\bpath = "?{re.escape(one.name)}"?;'
        for project in one.parent.glob("*.xcodeproj/project.pbxproj"):
            if re.search(path, read_small(project).decode(errors="replace")):
                return one
    return None


def collisions(files: Iterable[str], folder: Path, framework: Path) -> list[Finding]:
    """What of the framework around `folder` Xcode would refuse, or the app trip over, with these files in `folder`."""
    around = [path for path in sorted(framework.rglob("*")) if not path.is_dir() and not path.is_relative_to(folder)]
    ours, theirs = _by_resource(files), _by_resource(path.relative_to(framework).as_posix() for path in around)
    own = dict.fromkeys(_OF_FRAMEWORK, "the framework's own") | {framework.name.lower(): "the framework's binary"}
    others = own | {key: " and ".join(sorted(names)) for key, names in theirs.items()}
    findings = [
        Finding(
            "resource-stray-weights", f"{framework.name}/{name}", "weights outside the model's folder",
            "none: the app loads every .safetensors in its framework", "move it out of the folder",
        )
        for key, names in theirs.items() if key not in ours for name in sorted(names) if name.endswith(".safetensors")
    ]  # fmt: skip
    return findings + [
        Finding(
            "resource-collision", f"{framework.name}: {others[key]}",
            f"the same name as the model's {' and '.join(sorted(ours[key]))}",
            "one resource of a name: Xcode puts all into one folder", "move it out of the folder",
        )
        for key in sorted(set(ours) & set(others))
    ]  # fmt: skip


def _by_resource(names: Iterable[str]) -> dict[str, set[str]]:
    """A resource's name, in lower case as macOS compares it -> what becomes it. What is hidden becomes none."""
    found: dict[str, set[str]] = {}
    for name in names:
        if not any(part.startswith(".") for part in name.split("/")):
            found.setdefault(resource(name).lower(), set()).add(_whole(name))
    return found


def _whole(name: str) -> str:
    """The file, or the outermost folder around it that is one resource."""
    parts = name.split("/")
    ends = (index for index, part in enumerate(parts, 1) if Path(part).suffix in (*_OPAQUE, *_COMPILED))
    return "/".join(parts[: next(ends, None)])
