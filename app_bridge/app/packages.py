"""The app's Swift packages: which versions its sources build with, as far as anybody has said so.

packages.json has the versions that exist, what they ask of each other, the parts of their interfaces that came and went
and that an app may use, and the combinations that are reported to work. An app is matched with them by what its sources
use (`AppFacts.api`).
"""

import json
from collections.abc import Collection, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from app_bridge.app.facts import AppFacts, Package
from fastvlm.common import findings
from fastvlm.common.errors import UserError
from fastvlm.common.findings import Finding
from quantization.catalogue import LOADERS, Loader

TABLE = Path(__file__).parent / "packages.json"

Version = tuple[int, ...]


def used(names: Collection[str]) -> tuple[str, ...]:
    """The interfaces of the table that sources with these names (`f(a:b:)`, `await f`, members and types) use."""
    return tuple(
        sorted(api["name"] for api in _table()["apis"] if api["uses"] in names and api.get("unless") not in names)
    )


def check(facts: AppFacts) -> list[Finding]:
    """What is wrong or doubtful about the app's packages; nothing is said of packages that the table doesn't have."""
    chosen = _chosen(facts)
    if chosen is None:
        return _without_set(facts)
    names = {package.name for package in facts.packages}
    absent = [name for name in chosen["pins"] if name not in names]
    found = [_missing(name, chosen) for name in absent if not any(_stands_for(p, name, facts) for p in facts.packages)]
    for package in facts.packages:
        if package.name in _table()["packages"]:
            found += _check(package, facts, chosen)
    breaking = {finding.where for finding in findings.errors(found)}
    for pair, finding in _conflicts(facts, chosen):
        if not breaking & pair:  # else they have their error
            found = [each for each in found if each.where not in pair] + [finding]
    return found


def loader(facts: AppFacts) -> Loader:
    """What of quantization.catalogue.LOADERS the app's packages read weights as. UserError if that can't be said."""
    chosen = _chosen(facts)
    if chosen is None:
        raise UserError(_no_set(facts).line())
    return next(each for each in LOADERS if each.name == chosen["loader"])


def _check(package: Package, facts: AppFacts, chosen: dict[str, Any]) -> list[Finding]:
    """Of one package, against the combination that the sources are for."""
    fixed, allowed = _fixed(package), _allowed(package)
    broken = {version: why for version in allowed if (why := _broken(package.name, version, facts))}
    strange = [version for version in allowed if version not in broken and not _good(package.name, version, chosen)]
    pin = chosen["pins"].get(package.name)
    expected = f"{pin} ({chosen['name']})" if pin else f"{', '.join(chosen['pins'])} ({chosen['name']})"
    remedy = (
        f"in Xcode give {package.name} the rule Exact Version {pin} and commit Package.resolved"
        if pin
        else f"replace {package.name} by {', '.join(chosen['pins'])}"
    )
    where, got = _where(package.name), _requirement(package)
    if allowed and len(broken) == len(allowed):
        return [
            Finding(
                "package-known-to-break", where, f"{got}, which breaks the sources' {_all(broken)}", expected, remedy
            )
        ]
    if broken:
        some = f"{got}, which allows {_span(broken)}: breaks the sources' {_all(broken)}"
        return [Finding("package-may-float", where, some, expected, remedy, "warning")]
    if strange or not allowed:
        some = got if fixed or not allowed else f"{got}, which allows {strange[-1]}, not reported to work"
        return [Finding("package-unknown-version", where, some, expected, remedy, "warning")]
    return []


def _conflicts(facts: AppFacts, chosen: dict[str, Any]) -> Iterator[tuple[set[str], Finding]]:
    """Pairs of packages of which no two versions that the app allows go together: both `where`s and the finding."""
    requires, packages = _table()["requires"], {package.name: package for package in facts.packages}
    pins = ", ".join(f"{each} {pin}" for each, pin in chosen["pins"].items())
    for name, other in product(requires["packages"], packages):
        asking = _allowed(packages[name]) if name in packages else []
        spans = [requires["versions"].get(version, {}).get(other) for version in asking]
        numbers = [number for version in _allowed(packages[other]) if (number := _version(version))]
        if not spans or not numbers or None in spans:  # nothing asked, or nothing known
            continue
        if any(
            (_version(least) or ()) <= number < (_version(most) or ()) for least, most in spans for number in numbers
        ):
            continue
        asked = f"{asking[-1]}, which asks for {other} from {spans[-1][0]} to below {spans[-1][1]}"
        yield (
            {_where(name), _where(other)},
            Finding(
                "package-conflict",
                f"Swift packages {name} and {other}",
                f"{asked}, and {_requirement(packages[other])}",
                f"{pins} ({chosen['name']})",
                "in Xcode give each the rule Exact Version with that number: these it can't resolve",
            ),
        )


def _allowed(package: Package) -> list[str]:
    """The versions that Xcode may take, of those that the table knows."""
    fixed, known = _fixed(package), _table()["packages"].get(package.name, {"versions": ()})["versions"]
    return [fixed] if fixed else [version for version in known if _allows(package, version)]


def _where(name: str) -> str:
    return f"Swift package {name}"


def _missing(name: str, chosen: dict[str, Any]) -> Finding:
    return Finding(
        "package-missing",
        _where(name),
        "none in the project file",
        f"{chosen['pins'][name]} ({chosen['name']})",
        f"add the package {name} in Xcode",
    )


def _stands_for(package: Package, name: str, facts: AppFacts) -> bool:
    """Whether a package has the libraries of the one named, and every interface that the sources use."""
    same = any({package.name, name} <= {*api["packages"]} for api in _table()["apis"])
    return same and any(not _broken(package.name, version, facts) for version in _allowed(package))


def _without_set(facts: AppFacts) -> list[Finding]:
    """Of sources that no combination which is reported to work has the interfaces for: versions that have them are none
    the less in doubt only."""
    asked = {name for api in _table()["apis"] if api["name"] in facts.api for name in api["packages"]}
    having = [package for package in facts.packages if package.name in asked]
    good = {p: [v for v in _allowed(p) if _version(v) and not _broken(p.name, v, facts)] for p in having}
    if not having or not all(good.values()):
        return [_no_set(facts)]
    return [
        Finding(
            "package-unknown-version",
            _where(package.name),
            f"{_requirement(package)}, with the interfaces that the sources use",
            "a combination that is reported to work",
            f"build it once in Xcode with {package.name} {versions[-1]}, and commit Package.resolved",
            "warning",
        )
        for package, versions in good.items()
    ]


def _no_set(facts: AppFacts) -> Finding:
    return Finding(
        "package-known-to-break",
        "Swift packages",
        f"sources that use {', '.join(facts.api)}",
        f"the interfaces of one of {', '.join(each['name'] for each in _table()['sets'])}",
        "no version of the packages has all of these; take the sources of one of them",
    )


def _chosen(facts: AppFacts) -> dict[str, Any] | None:
    """The combination that has every interface that the sources use; of several, the one nearest to the app's own."""
    sets = [
        each for each in _table()["sets"] if not any(_broken(name, each["pins"][name], facts) for name in each["pins"])
    ]

    def distance(each: dict[str, Any]) -> tuple[int, int]:
        missing = {*each["pins"]} - {package.name for package in facts.packages}
        return len(missing), sum(not _good(p.name, _fixed(p) or p.minimum, each) for p in facts.packages)

    return min(sets, key=distance, default=None)


def _broken(name: str, version: str, facts: AppFacts) -> list[str]:
    """The interfaces that the sources use and this version (or branch) of a package doesn't have."""
    if version in (moved := _table()["packages"].get(name, {}).get("moved", {})):
        return [moved[version]]
    number = _version(version)
    return [
        api["name"]
        for api in _table()["apis"]
        if number is not None
        and api["name"] in facts.api
        and name in api["packages"]
        and not (_version(api.get("since", "0.0")) or ()) <= number < (_version(api.get("until", "9999.0")) or ())
    ]


def _good(name: str, version: str, chosen: dict[str, Any]) -> bool:
    number = _version(version)
    least, most = map(_version, chosen["good"].get(name, ("9999.0", "0.0")))
    known = _table()["packages"].get(name, {"versions": ()})["versions"]
    return version in known and bool(number and least and most and least <= number <= most)


def _allows(package: Package, version: str) -> bool:
    """Whether a requirement that isn't one version allows it (a major version 0 is one like any other)."""
    number, least = _version(version), _version(package.minimum)
    if number is None or least is None:
        return False
    least = (*least, 0, 0)[:3]
    most = _version(package.maximum or "") if package.maximum else None
    if package.kind == "upToNextMajorVersion":
        most = (least[0] + 1,)
    elif package.kind == "upToNextMinorVersion":
        most = (least[0], least[1] + 1)
    return least <= number < (most or (10**9,))


def _version(said: str) -> Version | None:
    """(2, 21, 2); None for a branch, a revision or a version before a release."""
    parts = said.split(".")
    digits = len(parts) > 1 and all(part.isascii() and part.isdigit() for part in parts)  # a revision may be one number
    return tuple(map(int, parts)) if digits else None


def _fixed(package: Package) -> str | None:
    """The one version (or branch, revision, folder) that it can be."""
    single = package.kind in ("exactVersion", "branch", "revision", "local")
    return package.resolved or (package.minimum if single else None)


def _requirement(package: Package) -> str:
    if package.resolved:
        return f"{package.resolved} in Package.resolved"
    most = f" up to {package.maximum}" if package.maximum else ""
    return f"{package.kind} {package.minimum}{most}{'' if _fixed(package) else ' and no Package.resolved'}"


def _all(broken: dict[str, list[str]]) -> str:
    return ", ".join(dict.fromkeys(why for each in broken.values() for why in each))


def _span(versions: Collection[str]) -> str:
    first, *rest = versions
    return f"{first} to {rest[-1]}" if rest else first


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found
