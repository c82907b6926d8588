"""The app's Swift packages: the versions that its sources build with, as far as any source reports them.

packages.json has the versions that exist, what they ask of each other, the parts of their interfaces that came and went
and that an app may use, and the combinations that are reported to work. An app is matched with them by what its sources
use (`AppFacts.api`).
"""

import json
import re
from collections.abc import Collection, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from app_bridge.app.facts import AppFacts, Package
from app_bridge.rules import finding
from fastvlm.common import findings
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding
from quantization.catalogue import LOADERS, Loader

TABLE = Path(__file__).parent / "packages.json"


def used(names: Collection[str]) -> tuple[str, ...]:
    """The interfaces of the table that sources with these names (`f(a:b:)`, `await f`, members and types) use."""
    return tuple(
        sorted(api["name"] for api in _table()["apis"] if api["uses"] in names and api.get("unless") not in names)
    )


def check(facts: AppFacts) -> list[Finding]:
    """Return the findings about the app's packages; packages that the table doesn't have get none."""
    chosen = _chosen(facts)
    if chosen is None:
        return _without_set(facts)
    names = {package.name for package in facts.packages}
    problems = [
        finding("package-missing", _where(name), "none in the project file", wanted=_pinned(chosen, name), name=name)
        for name in chosen["pins"]
        if name not in names and not any(_stands_for(package, name, facts) for package in facts.packages)
    ]
    for package in facts.packages:
        if package.name in _table()["packages"]:
            problems += _check(package, facts, chosen)
    breaking = {error.where for error in findings.errors(problems)}
    for pair, conflict in _conflicts(facts, chosen):
        if not breaking & pair:  # else they have their error
            problems = [each for each in problems if each.where not in pair] + [conflict]
    return problems


def loader(facts: AppFacts) -> Loader:
    """The one of quantization.catalogue.LOADERS that is in the app's packages. UserError if that can't be said."""
    chosen = _chosen(facts)
    if chosen is None:
        raise UserError(_no_set(facts).line())
    return next(each for each in LOADERS if each.name == chosen["loader"])


def allows(package: Package, version: str) -> bool:
    """Whether a requirement that isn't one version allows it (a major version 0 is one like any other)."""
    if not _is_version(package.minimum):
        return False
    major, minor = package.minimum.split(".")[:2]
    end = {
        "upToNextMajorVersion": f"{int(major) + 1}",
        "upToNextMinorVersion": f"{major}.{int(minor) + 1}",
        "versionRange": package.maximum,
    }
    return _within(version, package.minimum, end[package.kind])


def _check(package: Package, facts: AppFacts, chosen: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings about one package, compared with the combination that the sources are for."""
    fixed, allowed = _fixed(package), _allowed(package)
    broken = {version: why for version in allowed if (why := _broken(package.name, version, facts))}
    strange = [version for version in allowed if version not in broken and not _good(package.name, version, chosen)]
    pin, got = chosen["pins"].get(package.name), _requirement(package)
    rule, remedy = "", f"replace {package.name} by {', '.join(chosen['pins'])}"
    if pin:
        remedy = f"in Xcode give {package.name} the rule Exact Version {pin} and commit Package.resolved"
    breaks = f"breaks the sources' {', '.join(dict.fromkeys(why for each in broken.values() for why in each))}"
    if allowed and len(broken) == len(allowed):
        rule, got = "package-known-to-break", f"{got}, which {breaks}"
    elif broken:
        first, *rest = broken
        span = f"{first} to {rest[-1]}" if rest else first
        rule, got = "package-may-float", f"{got}, which allows {span}: {breaks}"
    elif strange or not allowed:
        rule = "package-unknown-version"
        got += "" if fixed or not allowed else f", which allows {strange[-1]}, not reported to work"
    if rule:
        yield finding(rule, _where(package.name), got, wanted=_pinned(chosen, package.name), remedy=remedy)


def _conflicts(facts: AppFacts, chosen: dict[str, Any]) -> Iterator[tuple[set[str], Finding]]:
    """Pairs of packages of which no two versions that the app allows go together: both `where`s and the finding."""
    requires, packages = _table()["requires"], {package.name: package for package in facts.packages}
    pins = ", ".join(f"{each} {pin}" for each, pin in chosen["pins"].items())
    for name, other in product(requires["packages"], packages):
        asking = _allowed(packages[name]) if name in packages else []
        spans = [requires["versions"].get(version, {}).get(other) for version in asking]
        offered = [version for version in _allowed(packages[other]) if _is_version(version)]
        if not spans or not offered or None in spans:  # nothing asked, or nothing known
            continue
        if any(_within(version, *span) for span in spans for version in offered):
            continue
        requirement = f"{asking[-1]}, which asks for {other} from {spans[-1][0]} to below {spans[-1][1]}"
        got = f"{requirement}, and {_requirement(packages[other])}"
        where, wanted = f"Swift packages {name} and {other}", f"{pins} ({chosen['name']})"
        yield {_where(name), _where(other)}, finding("package-conflict", where, got, wanted=wanted)


def _allowed(package: Package) -> list[str]:
    """The versions that Xcode may take, of those that the table knows."""
    fixed = _fixed(package)
    return [fixed] if fixed else [version for version in _known(package.name) if allows(package, version)]


def _where(name: str) -> str:
    return f"Swift package {name}"


def _pinned(chosen: dict[str, Any], name: str) -> str:
    """The version of a package in a combination; the whole combination for a package that it lacks."""
    return f"{chosen['pins'].get(name) or ', '.join(chosen['pins'])} ({chosen['name']})"


def _stands_for(package: Package, name: str, facts: AppFacts) -> bool:
    """Whether a package has the libraries of the one named, and every interface that the sources use."""
    same = any({package.name, name} <= {*api["packages"]} for api in _table()["apis"])
    return same and any(not _broken(package.name, version, facts) for version in _allowed(package))


def _without_set(facts: AppFacts) -> list[Finding]:
    """The findings where no combination that is reported to work has every interface that the sources use. Versions
    that have them all the same are doubtful only."""
    providers = {name for api in _table()["apis"] if api["name"] in facts.api for name in api["packages"]}
    having = [package for package in facts.packages if package.name in providers]
    good = {p: [v for v in _allowed(p) if _is_version(v) and not _broken(p.name, v, facts)] for p in having}
    if not having or not all(good.values()):
        return [_no_set(facts)]
    doubt, has = "package-unknown-version/sets", "with the interfaces that the sources use"
    return [
        finding(doubt, _where(p.name), f"{_requirement(p)}, {has}", name=p.name, version=versions[-1])
        for p, versions in good.items()
    ]


def _no_set(facts: AppFacts) -> Finding:
    names, got = ", ".join(each["name"] for each in _table()["sets"]), f"sources that use {', '.join(facts.api)}"
    return finding("package-known-to-break/sets", "Swift packages", got, wanted=names)


def _chosen(facts: AppFacts) -> dict[str, Any] | None:
    """The combination that has every interface that the sources use; of several, the one nearest to the app's own."""
    sets = [
        each for each in _table()["sets"] if not any(_broken(name, pin, facts) for name, pin in each["pins"].items())
    ]

    def distance(each: dict[str, Any]) -> tuple[int, int]:
        missing = {*each["pins"]} - {package.name for package in facts.packages}
        return len(missing), sum(not _good(p.name, _fixed(p) or p.minimum, each) for p in facts.packages)

    return min(sets, key=distance, default=None)


def _broken(name: str, version: str, facts: AppFacts) -> list[str]:
    """The interfaces that the sources use and this version (or branch) of a package doesn't have."""
    if version in (moved := _table()["packages"].get(name, {}).get("moved", {})):
        return [moved[version]]
    return [
        api["name"]
        for api in _table()["apis"]
        if api["name"] in facts.api
        and name in api["packages"]
        and _is_version(version)
        and not _within(version, api.get("since", "0"), api.get("until"))
    ]


def _good(name: str, version: str, chosen: dict[str, Any]) -> bool:
    least, most = chosen["good"].get(name, ("", ""))
    return bool(least) and version in _known(name) and SpecifierSet(f">={least},<={most}").contains(version)


def _known(name: str) -> list[str]:
    """The versions of a package that the table has."""
    versions: list[str] = _table()["packages"].get(name, {"versions": []})["versions"]
    return versions


def _within(version: str, least: str, end: str | None) -> bool:
    return SpecifierSet(f">={least}" + (f",<{end}" if end else "")).contains(version)


def _is_version(text: str) -> bool:
    """Whether it is a release, such as 2.21.2: no branch, no revision (which may be one number)."""
    return re.fullmatch(r"[0-9]+(\.[0-9]+)+", text) is not None


def _fixed(package: Package) -> str | None:
    """The one version (or branch, revision, folder) that it can be."""
    single = package.kind in ("exactVersion", "branch", "revision", "local")
    return package.resolved or (package.minimum if single else None)


def _requirement(package: Package) -> str:
    if package.resolved:
        return f"{package.resolved} in Package.resolved"
    most = f" up to {package.maximum}" if package.maximum else ""
    return f"{package.kind} {package.minimum}{most}{'' if _fixed(package) else ' and no Package.resolved'}"


@cache
def _table() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return document
