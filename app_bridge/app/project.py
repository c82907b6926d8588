"""An app's Xcode project: its folders, build settings, entitlements and Swift packages."""

import json
import plistlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from openstep_parser import OpenStepDecoder  # pbxproj's own reader; plain dictionaries are all that is needed

from app_bridge.app.facts import Package
from fastvlm.common.errors import UserError
from fastvlm.common.files import read_small

APPLICATION = "com.apple.product-type.application"
MEMORY_LIMIT = "com.apple.developer.kernel.increased-memory-limit"
# Below the synchronized group. Any would do, Xcode flattens resources; app/README.md and .gitignore say this one.
MODEL_FOLDER = "model"
_PLATFORMS = {
    "iphoneos": ("iOS", "IPHONEOS_DEPLOYMENT_TARGET"),
    "macosx": ("macOS", "MACOSX_DEPLOYMENT_TARGET"),
    "xros": ("visionOS", "XROS_DEPLOYMENT_TARGET"),
}
_RESOLVED = (  # where Xcode keeps Package.resolved, of a project and of a workspace beside it
    "*.xcodeproj/project.xcworkspace/xcshareddata/swiftpm",
    "*.xcworkspace/xcshareddata/swiftpm",
)
_ROOTS = ("$(SRCROOT)/", "$(PROJECT_DIR)/", "${SRCROOT}/", "${PROJECT_DIR}/")
_REQUIREMENTS = {  # kind -> (the version it names, the version that is too new)
    "upToNextMajorVersion": ("minimumVersion", None),
    "upToNextMinorVersion": ("minimumVersion", None),
    "exactVersion": ("version", None),
    "versionRange": ("minimumVersion", "maximumVersion"),
    "branch": ("branch", None),
    "revision": ("revision", None),
}

Object = dict[str, Any]


class Unclear(Exception):
    """Something in the project that can't be read: one line with what, where, got and expected."""


class Project:
    """The one project of an app's folder. UserError for what is no project."""

    def __init__(self, app: Path) -> None:
        if not app.is_dir():
            got = "a file" if app.exists() else "a broken link" if app.is_symlink() else "nothing there"
            raise UserError(f"--app: {app}: got {got}, expected the folder that holds the app's .xcodeproj")
        projects = sorted(app.glob("*.xcodeproj"))
        if len(projects) != 1:
            inner = " (did you mean its folder app/?)" if (app / "app").is_dir() else ""
            raise UserError(f"--app: {app}: got {len(projects)} .xcodeproj folders, expected one{inner}")
        self.app = app
        self.file = f"{projects[0].name}/project.pbxproj"
        text = read_text(app, self.file)
        try:
            document = OpenStepDecoder.ParseFromString(text)
            self.objects: dict[str, Object] = document["objects"]
            self.root: Object = self.objects[document["rootObject"]]
            self.targets = [self.objects[each] for each in self.root["targets"]]
            self._folders = dict(self._synchronized(self.objects[self.root["mainGroup"]], PurePosixPath()))
            applications = [each for each in self.targets if each.get("productType") == APPLICATION]
        except Exception as error:  # the parser has no exceptions of its own: whatever a half file makes it run into
            what = "cannot be read as a project file: it is empty, cut off, or of another kind"
            raise UserError(f"{app / self.file}: {what}") from error
        if len(applications) != 1:
            raise UserError(f"{app / self.file}: got {len(applications)} targets of type {APPLICATION}, expected one")
        self.application = applications[0]

    def swift_files(self) -> list[str]:
        """Swift files of the application and its dependencies, relative to the app's folder. Unclear without any."""
        paths: dict[str, None] = {}
        for target in self._reachable(self.application):
            for group in target.get("fileSystemSynchronizedGroups", ()):
                folder = self.app / self._folders[group]
                left_out = set(self._left_out(group, target))
                files = (p for p in sorted(folder.rglob("*.swift")) if p.is_file())
                paths |= {
                    str(p.relative_to(self.app)): None for p in files if str(p.relative_to(folder)) not in left_out
                }
        if not paths:
            raise Unclear(
                f"Swift files: {self.file}: got none, expected folders that Xcode keeps in step with the project"
            )
        return list(paths)

    def model_folder(self, path: str | None) -> str:
        """The model's folder, inside the synchronized one that a source file is in; the application's for None."""
        target = self.application
        groups = [self._folders[each] for each in target.get("fileSystemSynchronizedGroups", ())]
        if path is not None:
            groups = [folder for folder in self._folders.values() if folder in map(str, PurePosixPath(path).parents)]
        if not groups:
            raise Unclear(
                f"model folder: {self.file}: {path or target['name']}: got no folder, expected a synchronized one"
            )
        group = max(groups, key=len)
        names = [name for name, folder in self._folders.items() if folder == group]
        for target in self.targets:
            left_out = [each for name in names for each in self._left_out(name, target)]
            if inner := [each for each in left_out if each.startswith(f"{MODEL_FOLDER}/")]:
                got = f"membershipExceptions: got {', '.join(inner)}, expected no file of the model"
                raise Unclear(f"model folder: {self.file}: {got}")
        return str(PurePosixPath(group) / MODEL_FOLDER)

    def deployment(self, model_folder: str | None) -> dict[str, str]:
        """Platform -> the least version of the application and of the target that the model is built into.

        The class that Xcode makes of the package has to compile in each of their configurations.
        """
        targets = [self.application]
        for target in self._reachable(self.application)[1:]:
            folders = [self._folders[each] for each in target.get("fileSystemSynchronizedGroups", ())]
            if any(PurePosixPath(folder) in PurePosixPath(model_folder or "").parents for folder in folders):
                targets.append(target)
        platforms = {name for value in self.setting("SUPPORTED_PLATFORMS") for name in (value or "").split()}
        versions = {}
        for name, (platform, setting) in _PLATFORMS.items():
            if name in platforms:
                # where a target sets none, Xcode takes the newest
                values = [value for target in targets for value in self.setting(setting, target) if value]
                if not values or not all(part.isdigit() for value in values for part in value.split(".")):
                    raise Unclear(f"deployment target: {self.file}: {setting}: got {values}, expected versions")
                versions[platform] = min(values, key=lambda value: [*map(int, value.split("."))])
        if not versions:
            raise Unclear(f"deployment target: {self.file}: SUPPORTED_PLATFORMS: got none of {', '.join(_PLATFORMS)}")
        return versions

    def increased_memory_limit(self) -> bool:
        """Whether every configuration's entitlements have the increased memory limit."""
        granted = []
        for value in dict.fromkeys(self.setting("CODE_SIGN_ENTITLEMENTS")):
            value = value or ""
            path = next((value.removeprefix(root) for root in _ROOTS if value.startswith(root)), value)
            if path and "$" in path:
                raise Unclear(f"entitlements: {self.file}: got {value!r}, expected a path")
            try:
                granted.append(
                    bool(path) and plistlib.loads(read_text(self.app, path).encode()).get(MEMORY_LIMIT) is True
                )
            except UserError as error:
                raise Unclear(f"entitlements: {error}") from error
            except Exception as error:  # expat's, plistlib's, an AttributeError of a list
                raise Unclear(f"entitlements: {path}: cannot be read as a property list: {error}") from error
        return all(granted)

    def packages(self) -> tuple[Package, ...]:
        """The packages, sorted by name. Unclear for another kind of requirement, and an unusable Package.resolved."""
        resolved, packages = self._resolved(), []
        for each in map(self.objects.__getitem__, self.root.get("packageReferences", ())):
            url = str(each.get("repositoryURL") or each.get("relativePath"))
            name = url.rstrip("/").rpartition("/")[2].removesuffix(".git")
            kind = each.get("requirement", {}).get("kind", "local" if "relativePath" in each else "")
            if kind == "local":
                packages.append(Package(name, url, kind, url, None, resolved.get(name.lower())))
                continue
            least, most = _REQUIREMENTS.get(kind, ("", None))
            rule = each.get("requirement", {})
            if least not in rule or (most and most not in rule):
                raise Unclear(
                    f"packages: {self.file}: {name}: got requirement {rule}, expected one of {', '.join(_REQUIREMENTS)}"
                )
            packages.append(
                Package(name, url, kind, rule[least], rule[most] if most else None, resolved.get(name.lower()))
            )
        return tuple(sorted(packages, key=lambda package: package.name))

    def setting(self, name: str, target: Object | None = None) -> list[str | None]:
        """A target's (or the application's) build setting in each configuration: its own, the project's, or None."""
        owners = (target or self.application, self.root)
        own, outer = ({c["name"]: c for c in self._configurations(each)} for each in owners)
        return [
            self._in(configuration, name) or self._in(outer.get(key, {}), name) for key, configuration in own.items()
        ]

    def _in(self, configuration: Object, name: str) -> str | None:
        """The value of a setting in a configuration, or else in its .xcconfig; None where neither has it."""
        settings: Object = configuration.get("buildSettings", {})
        conditional = [key for key in settings if key.startswith(f"{name}[")]
        if conditional:
            raise Unclear(f"build setting: {self.file}: got {conditional[0]}, expected {name} for all platforms alike")
        if name in settings:
            return str(settings[name])
        relative = configuration.get("baseConfigurationReferenceRelativePath")
        folder = self._folders.get(configuration.get("baseConfigurationReferenceAnchor", ""), "")
        reference = self.objects.get(configuration.get("baseConfigurationReference", ""))
        path = f"{folder}/{relative}" if relative else reference.get("path") if reference else None
        return self._xcconfig(path, name) if path else None

    def _xcconfig(self, path: str, name: str) -> str | None:
        try:
            lines = [line.partition("//")[0].strip() for line in read_text(self.app, path).splitlines()]
        except UserError as error:
            raise Unclear(f"build setting {name}: {error}") from error
        for line in lines:
            key, _, value = line.partition("=")
            if line.startswith("#include") or key.startswith(f"{name}["):
                raise Unclear(f"build setting {name}: {path}: got {line!r}, expected the setting itself")
            if key.strip() == name:
                return value.strip()
        return None

    def _configurations(self, owner: Object) -> list[Object]:
        return [self.objects[each] for each in self.objects[owner["buildConfigurationList"]]["buildConfigurations"]]

    def _reachable(self, target: Object) -> list[Object]:
        """A target and its dependencies, direct and indirect."""
        reachable, left = [], [target]
        while left:
            each = left.pop(0)
            if each not in reachable:
                reachable.append(each)
                inner = (self.objects[dependency].get("target") for dependency in each.get("dependencies", ()))
                left += [self.objects[name] for name in inner if name in self.objects]
        return reachable

    def _synchronized(self, group: Object, folder: PurePosixPath) -> Iterator[tuple[str, str]]:
        """(id, path) of the folders that Xcode keeps in step with the project."""
        for name in group.get("children", ()):
            inner = self.objects[name]
            path = folder / inner.get("path", "")
            if inner["isa"] == "PBXFileSystemSynchronizedRootGroup":
                yield name, str(path)
            elif inner["isa"] == "PBXGroup":
                yield from self._synchronized(inner, path)

    def _left_out(self, group: str, target: Object) -> Iterator[str]:
        for name in self.objects[group].get("exceptions", ()):
            inner = self.objects[name]
            if self.objects.get(inner.get("target", "")) is target:
                yield from inner.get("membershipExceptions", ())

    def _resolved(self) -> dict[str, str]:
        """Package's name in small letters -> version, of Package.resolved; {} where there is none."""
        files = [folder / "Package.resolved" for pattern in _RESOLVED for folder in sorted(self.app.glob(pattern))]
        files = [path for path in files if path.exists() or path.is_symlink()]
        pins_of = {str(path.relative_to(self.app)): self._pins(path) for path in files}
        if any(pins != next(iter(pins_of.values())) for pins in pins_of.values()):
            raise Unclear(f"packages: got {', '.join(pins_of)} with different versions, expected one")
        return next(iter(pins_of.values()), {})

    def _pins(self, path: Path) -> dict[str, str]:
        name = str(path.relative_to(self.app))
        try:
            document = json.loads(read_text(self.app, name))
            version = document["version"]
            pins = document["object"]["pins"] if version == 1 else document["pins"]
            key = "repositoryURL" if version == 1 else "location"
            named = {pin[key].rstrip("/").rpartition("/")[2].removesuffix(".git").lower(): pin["state"] for pin in pins}
            # a branch or a revision has no version; then the revision is what is known
            versions = {name: str(state.get("version") or state["revision"]) for name, state in named.items()}
        except UserError as error:
            raise Unclear(f"packages: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Unclear(
                f"packages: {name}: cannot be read as a Package.resolved: no JSON object with pins"
            ) from error
        if version not in (1, 2, 3):
            raise Unclear(f"packages: {name}: got version {version}, expected 1, 2 or 3")
        return versions


def read_text(app: Path, path: str) -> str:
    """One file of the app. UserError, one line, for one that is missing, unreadable or not UTF-8."""
    try:
        return read_small(app / path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{app / path}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{app / path}: {error.strerror or error}") from error
