"""Package versions against what is reported of them."""

import dataclasses
import json

import pytest

from app_bridge.app import facts, packages
from app_bridge.app.facts import AppFacts, Package
from app_bridge.app.swift import Program
from app_bridge.install import guide
from fastvlm.common.errors import UserError
from quantization.catalogue import LOADERS

PUBLISHED = facts.table()
# what the sources of ml-fastvlm pull requests 59 and 78 use, by the names in packages.json
PULL_59 = (
    "LMInput.ProcessedImage(pixels:frames:)",
    "LoRAModel without loraLayers",
    "createAttentionMask(h:cache:returnArray:)",
    "loadContainer(configuration:)",
    "registerModelType without await",
)
PULL_78 = (
    "LMInput.ProcessedImage(pixels:frames:)",
    "LoRAModel.loraLayers",
    "Memory.cacheLimit",
    "loadContainer(from:using:)",
)
GOOD = {"mlx-swift-examples": "2.21.2", "mlx-swift": "0.21.3", "swift-transformers": "0.1.19"}
GOOD_59 = {"mlx-swift-examples": "2.25.7", "mlx-swift": "0.25.6", "swift-transformers": "0.1.23"}
GOOD_78 = {"mlx-swift-lm": "3.31.4", "mlx-swift": "0.31.4", "swift-transformers": "1.3.3"}


def app(pins: dict[str, str], api: tuple[str, ...] = PUBLISHED.api, kind: str = "exactVersion") -> AppFacts:
    """The app with these packages: name -> version, or "requirement: version"."""
    found = []
    for name, version in pins.items():
        own, _, least = version.rpartition(": ")
        found.append(Package(name, f"https://example.com/{name}", own or kind, least))
    return dataclasses.replace(PUBLISHED, packages=tuple(found), api=api)


def said(app: AppFacts) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.rule, finding.where.rpartition(" ")[2]) for finding in packages.check(app)]


def test_the_published_app_may_float_and_has_no_error() -> None:
    assert said(PUBLISHED) == [
        ("warning", "package-unknown-version", "mlx-swift"),
        ("warning", "package-may-float", "mlx-swift-examples"),
        ("warning", "package-unknown-version", "swift-transformers"),
    ]
    lines = "\n".join(finding.line() for finding in packages.check(PUBLISHED))
    for name, version in GOOD.items():
        assert f"give {name} the rule Exact Version {version}" in lines
    assert "2.25.4 to 2.29.1" in lines and "asMessages" in lines


@pytest.mark.parametrize(("pins", "api"), [(GOOD, PUBLISHED.api), (GOOD_59, PULL_59), (GOOD_78, PULL_78)])
def test_what_is_reported_to_work_is_not_mentioned(pins: dict[str, str], api: tuple[str, ...]) -> None:
    assert said(app(pins, api)) == []
    resolved = app(dict.fromkeys(pins, "upToNextMajorVersion: 0.1.0"), api)
    fixed = tuple(dataclasses.replace(each, resolved=pins[each.name]) for each in resolved.packages)
    assert said(dataclasses.replace(resolved, packages=fixed)) == []
    others = (*fixed, Package("AcknowList", "https://example.com/AcknowList", "exactVersion", "3.3.0"))
    assert said(dataclasses.replace(resolved, packages=others)) == []


# (name, version or requirement, sources) -> what is found of that package among good ones
CASES = [
    ("mlx-swift-examples", "2.25.4", PUBLISHED.api, "package-known-to-break"),
    ("mlx-swift-examples", "2.25.7", PUBLISHED.api, "package-known-to-break"),
    ("mlx-swift-examples", "upToNextMinorVersion: 2.25.4", PUBLISHED.api, "package-known-to-break"),
    ("mlx-swift-examples", "upToNextMinorVersion: 2.21.2", PUBLISHED.api, None),
    ("mlx-swift-examples", "upToNextMajorVersion: 2.21.2", PUBLISHED.api, "package-may-float"),
    ("mlx-swift-examples", "branch: main", PUBLISHED.api, "package-known-to-break"),
    ("mlx-swift-examples", "branch: develop", PUBLISHED.api, "package-unknown-version"),
    ("mlx-swift-examples", f"revision: {'0123456789' * 4}", PUBLISHED.api, "package-unknown-version"),
    ("mlx-swift-examples", "revision: 592b4ad", PUBLISHED.api, "package-unknown-version"),
    ("mlx-swift-examples", "2.21.3", PUBLISHED.api, "package-unknown-version"),
    ("mlx-swift-examples", "1.18.2", PUBLISHED.api, "package-unknown-version"),
    ("mlx-swift-examples", "2.21.2", PULL_59, "package-known-to-break"),
    ("mlx-swift-examples", "2.25.5", PULL_59, "package-unknown-version"),
    ("mlx-swift-examples", "upToNextMajorVersion: 2.21.2", PULL_59, "package-may-float"),
    ("mlx-swift-lm", "2.29.2", PULL_78, "package-known-to-break"),
    ("mlx-swift-lm", "3.31.5", PULL_78, "package-unknown-version"),
    ("mlx-swift-lm", "upToNextMajorVersion: 3.31.3", PULL_78, None),
    ("mlx-swift", "0.29.1", PULL_78, "package-known-to-break"),
    ("mlx-swift", "0.31.6", PULL_78, "package-unknown-version"),
    ("mlx-swift", "0.25.2", PUBLISHED.api, None),
    ("mlx-swift", "0.29.1", PUBLISHED.api, "package-unknown-version"),
    ("swift-transformers", "0.1.24", PUBLISHED.api, "package-unknown-version"),
    ("swift-transformers", "upToNextMinorVersion: 1.3.0", PULL_78, None),
]


@pytest.mark.parametrize(("name", "version", "api", "rule"), CASES)
def test_one_package(name: str, version: str, api: tuple[str, ...], rule: str | None) -> None:
    good = {PUBLISHED.api: GOOD, PULL_59: GOOD_59, PULL_78: GOOD_78}[api]
    severity = "error" if rule == "package-known-to-break" else "warning"
    assert said(app(good | {name: version}, api)) == ([(severity, rule, name)] if rule else [])


@pytest.mark.parametrize(
    ("version", "rule"), [("2.29.2", "package-unknown-version"), ("2.29.3", "package-known-to-break")]
)
def test_a_registry_that_is_an_actor_breaks_calls_without_await(version: str, rule: str) -> None:
    pins = {"mlx-swift-lm": version, "mlx-swift": "0.29.1", "swift-transformers": "1.1.6"}
    found = said(app(pins, ("registerModelType without await",)))
    assert [each for _, each, name in found if name == "mlx-swift-lm"] == [rule]


@pytest.mark.parametrize(
    ("pins", "api", "pair"),
    [
        (GOOD | {"mlx-swift": "0.18.1"}, PUBLISHED.api, "mlx-swift-examples and mlx-swift"),
        (GOOD | {"swift-transformers": "1.0.0"}, PUBLISHED.api, "mlx-swift-examples and swift-transformers"),
        (GOOD_59 | {"mlx-swift-examples": "2.25.8"}, PULL_59, "mlx-swift-examples and swift-transformers"),
        (
            GOOD_59 | {"mlx-swift-examples": "upToNextMinorVersion: 2.25.8"},
            PULL_59,
            "mlx-swift-examples and swift-transformers",
        ),
        (GOOD_59 | {"mlx-swift": "upToNextMajorVersion: 0.29.1"}, PULL_59, "mlx-swift-examples and mlx-swift"),
        (GOOD_78 | {"mlx-swift": "0.31.3"}, PULL_78, "mlx-swift-lm and mlx-swift"),
    ],
)
def test_versions_that_xcode_can_not_resolve(pins: dict[str, str], api: tuple[str, ...], pair: str) -> None:
    (found,) = packages.check(app(pins, api))
    assert (found.severity, found.rule, found.where) == ("error", "package-conflict", f"Swift packages {pair}")
    assert "which asks for" in found.got


def test_no_conflict_where_some_allowed_version_goes_with_some_other() -> None:
    for pins, api in (
        (GOOD_59 | {"mlx-swift-examples": "upToNextMinorVersion: 2.25.4"}, PULL_59),  # 2.25.7, not 2.25.8
        (GOOD_59 | {"mlx-swift": "upToNextMajorVersion: 0.21.2"}, PULL_59),
        (GOOD_78 | {"swift-transformers": "0.1.19"}, PULL_78),  # mlx-swift-lm 3 asks for none
        (GOOD | {"mlx-swift": "branch: main"}, PUBLISHED.api),
    ):
        assert "package-conflict" not in [rule for _, rule, _ in said(app(pins, api))]


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_package(name: str) -> None:
    left = {other: version for other, version in GOOD.items() if other != name}
    assert said(app(left)) == [("error", "package-missing", name)]


def test_the_successor_is_not_for_the_published_sources() -> None:
    found = said(app({"mlx-swift-lm": "3.31.4", "mlx-swift": "0.31.4", "swift-transformers": "1.3.3"}))
    assert ("error", "package-missing", "mlx-swift-examples") in found
    assert ("error", "package-known-to-break", "mlx-swift-lm") in found


def test_sources_that_fit_several_are_measured_by_the_nearest() -> None:
    assert said(app(GOOD_59, ())) == said(app(GOOD, ())) == []
    assert packages.loader(app(GOOD_59, ())).name == "app 2.25"


# sources that no combination of the table is for -> pins -> what is said
LATER = (*PULL_59[:1], "LoRAModel.loraLayers", "loadContainer(configuration:)")


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        ("2.30.3", "package-unknown-version"),
        ("upToNextMajorVersion: 2.21.2", "package-unknown-version"),
        ("2.29.1", "package-known-to-break"),
        ("3.31.4", "package-known-to-break"),
    ],
)
def test_a_pin_that_has_the_interfaces_is_no_error(version: str, rule: str) -> None:
    pins = {"mlx-swift-lm": version, "mlx-swift": "0.30.3", "swift-transformers": "1.1.6"}
    (finding,) = packages.check(app(pins, LATER))
    assert (finding.rule, finding.severity) == (rule, "warning" if "unknown" in rule else "error")


def test_the_successor_has_the_same_libraries() -> None:
    pins = {"mlx-swift-lm": "2.29.1", "mlx-swift": "0.29.1", "swift-transformers": "1.0.0"}
    assert {severity for severity, _, _ in said(app(pins, PULL_59))} == {"warning"}


@pytest.mark.parametrize(
    ("line", "breaks"),
    [
        ("let mask = createAttentionMask(h: h, cache: cache)", True),
        ("let mask = (try createAttentionMask(h: h, cache: cache))", True),
        ("let mask: MLXArray? = createAttentionMask(h: h, cache: cache)", False),
        ("let mask = createAttentionMask(h: h, cache: cache) as MLXArray?", False),
        ("return layer(h, mask: createAttentionMask(h: h, cache: cache))", False),
        ("let a: MLXArray? = createAttentionMask(h: h, cache: c)\n let b = createAttentionMask(h: h, cache: c)", True),
    ],
)  # fmt: skip
def test_a_declared_type_chooses_the_overload(line: str, breaks: bool) -> None:
    program = Program({"A.swift": f"func f() {{\n {line}\n}}\n".encode()})
    assert packages.used(program.mentioned()) == (("createAttentionMask(h:cache:) as an MLXArray",) if breaks else ())


def test_sources_that_no_version_fits() -> None:
    mixed = app(GOOD, (*PUBLISHED.api, *PULL_78))
    (finding,) = packages.check(mixed)
    assert (finding.rule, finding.severity) == ("package-known-to-break", "error")
    with pytest.raises(UserError, match="package-known-to-break"):
        packages.loader(mixed)


@pytest.mark.parametrize(
    ("facts_", "name"),
    [
        (PUBLISHED, "demo app"),
        (app(GOOD_59, PULL_59), "app 2.25"),
        (app(GOOD_78, PULL_78), "app 3.31"),
        (guide.own_app(), "app 3.31"),
    ],
)
def test_what_loads_the_weights(facts_: AppFacts, name: str) -> None:
    assert packages.loader(facts_) == next(loader for loader in LOADERS if loader.name == name)


def test_a_requirement_allows_what_xcode_allows() -> None:
    def allowed(kind: str, least: str, most: str | None = None) -> list[str]:
        package = Package("x", "", kind, least, most)
        return [v for v in ("0.1.18", "0.1.20", "0.2.0", "1.0.0", "1.10.0", "2.0.0") if packages.allows(package, v)]

    assert allowed("upToNextMajorVersion", "0.1.19") == ["0.1.20", "0.2.0"]
    assert allowed("upToNextMajorVersion", "1.0") == ["1.0.0", "1.10.0"]
    assert allowed("upToNextMinorVersion", "0.1.18") == ["0.1.18", "0.1.20"]
    assert allowed("versionRange", "0.1.20", "1.10.0") == ["0.1.20", "0.2.0", "1.0.0"]


def test_every_figure_has_a_source() -> None:
    table = json.loads(packages.TABLE.read_text())
    for entry in (*table["packages"].values(), *table["apis"], *table["sets"]):
        assert entry["source"]
    loaders = {loader.name for loader in LOADERS}
    for each in table["sets"]:
        assert each["loader"] in loaders and each["pins"].keys() == each["good"].keys() <= table["packages"].keys()
        assert all(version in table["packages"][name]["versions"] for name, version in each["pins"].items())
    for api in table["apis"]:
        assert {*api["packages"]} <= table["packages"].keys() and ("since" in api) != ("until" in api)
        edge = api.get("since") or api["until"]
        assert any(edge in table["packages"][name]["versions"] for name in api["packages"])
