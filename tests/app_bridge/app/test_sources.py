"""The facts of an app read from its sources: ours (viewer/), and Apple's where FASTVLM_APP names ml-fastvlm's app/."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from app_bridge.app import facts, sources
from app_bridge.app.differences import differences
from fastvlm.common.errors import UserError
from model_export import contract
from tests.app_bridge.app.app_changes import (
    CHANGES,
    DECODER,
    ENTITLEMENTS,
    PROJECT,
    REFUSED,
    RESOLVED,
    SESSION,
    VIEWING,
)
from tests.app_bridge.app.conftest import VIEWER

TABLE = facts.table()

Change = Callable[[str, str, str], Path]


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return Path(shutil.copytree(VIEWER, tmp_path / "app"))


@pytest.fixture
def change(app: Path) -> Change:
    """`change(file, old, new)`: the app with every `old` in a file replaced."""

    def replace(file: str, old: str, new: str) -> Path:
        text = (app / file).read_text()
        assert old in text, f"{file} has no {old!r}"
        (app / file).write_text(text.replace(old, new))
        return app

    return replace


def refusal(app: Path) -> str:
    with pytest.raises(UserError) as raised:
        sources.read(app)
    said = str(raised.value)
    assert "\n" not in said and str(app) in said
    return said


def test_our_app_has_the_tables_facts() -> None:
    assert differences(sources.read(VIEWER), TABLE) == []
    assert sources.read(VIEWER) == TABLE


def test_apples_app_has_the_tables_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("FASTVLM_APP")
    if not folder:
        pytest.skip("FASTVLM_APP is not set to ml-fastvlm's app/: Apple's sources were not read")
    published = json.loads(sources.PUBLISHED.read_text())
    monkeypatch.setattr(sources, "published", lambda: published)
    assert sources.read(Path(folder)) == TABLE
    published["types"]["Language.Attention"]["members"]["wq"] = "another"
    (changed,) = sources.read(Path(folder)).changed
    assert (changed.what, changed.where) == ("Language.Attention.wq", "FastVLM/FastVLM.swift:67")


def test_the_contract_and_the_table_agree() -> None:
    types = {"Int": int, "String": str, "[CGFloat]": list}
    config = {key.path: key for key in TABLE.config}
    required = {path: types[key.type] for path, key in config.items() if key.required and "." not in path}
    assert required == contract.CONFIG_REQUIRED
    defaults = {path: key.default for path, key in config.items() if not key.required and path != "rope_scaling"}
    assert defaults == contract.CONFIG_DEFAULTS
    decoded = {key.path: types[key.type] for key in TABLE.preprocessor}
    assert decoded | {"processor_class": str} == contract.PREPROCESSOR_REQUIRED
    assert (TABLE.model_type, TABLE.processor_class) == (contract.MODEL_TYPE, contract.PROCESSOR_CLASS)
    assert f"{TABLE.model_class}.mlpackage" == contract.PACKAGE
    assert (TABLE.input_name, TABLE.output_name) == (contract.INPUT, contract.OUTPUT)
    assert {TABLE.input_dtype, TABLE.output_dtype} == {contract.IO_DTYPE}
    assert TABLE.output_shape == contract.APP_OUTPUT_SHAPE
    assert (TABLE.image_token, TABLE.patch_size) == (contract.IMAGE_TOKEN, contract.PATCH_SIZE)
    assert TABLE.bundle_resource == contract.CONFIG
    projector = [layer for layer in TABLE.layers if layer.path.startswith(contract.PROJECTOR_PREFIX)]
    assert {f"{layer.path}.{part}" for layer in projector for part in ("weight", "bias")} == {*contract.PROJECTOR_KEYS}
    others = [layer.path for layer in TABLE.layers if layer not in projector]
    assert all(path.startswith(contract.LANGUAGE_PREFIX) for path in others)


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_difference(name: str, change: Change) -> None:
    """Each either as a fact, which has its new value, or as a declaration, with its place."""
    file, old, new, expected = CHANGES[name]
    app = change(file, old, new)
    read = sources.read(app)
    found = differences(read, TABLE)[: -len(read.changed) or None]
    said = [line.partition(":")[0].replace("language_model.model.layers.{layer}.", "…") for line in found]
    said += [f"!{changed.what}" for changed in read.changed]
    assert list(dict.fromkeys(said)) == expected, found
    assert all(
        changed.facts and changed.where.partition(":")[0] in (file, VIEWING, "Swift sources")
        for changed in read.changed
    )


def test_a_difference_says_only_what_differs(change: Change) -> None:
    """Of several changes: a fact, a field of a key, a module that only one of them has, a declaration."""
    change(DECODER, '"linear_2"', '"linear_1"')
    change(DECODER, "text.channels, bias: false)", "text.channels)")
    change(VIEWING, "imageGridThw:", "frames:")
    change("FastVLM/Settings.swift", "let inner: Int", "let inner: Int?")
    app = change(VIEWING, "[1, 256, 3072]", "[1, 64, 3072]")
    assert differences(sources.read(app), TABLE) == [
        "output_shape: the app has [1, 64, 3072], the table [1, 256, 3072]",
        "config intermediate_size: required: the app has false, the table true",
        "layers multi_modal_projector.linear_1: the app has it, the table nothing",
        "layers multi_modal_projector.linear_2: the app has nothing, the table it",
        'api: the app has ["LMInput.ProcessedImage(pixels:frames:)"], the table '
        '["LMInput.ProcessedImage.imageGridThw"]',
        "Looking.init(text:): differs from the published app at FastVLM/Decoder.swift:15: "
        "check by hand (layers, config)",
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_project_does_not_say_is_refused(name: str, change: Change) -> None:
    file, old, new, said = REFUSED[name]
    assert said in refusal(change(file, old, new))


def test_how_files_are_split_does_not_matter(app: Path) -> None:
    folder = app / "FastVLM"
    text = "".join(path.read_text() for path in sorted(folder.glob("*.swift")))
    for path in folder.glob("*.swift"):
        path.unlink()
    (folder / "deep").mkdir()
    (folder / "deep" / "All.swift").write_text(text)
    assert differences(sources.read(app), TABLE) == []


def test_files_outside_of_the_projects_folders_are_not_read(app: Path) -> None:
    (app / "Old").mkdir()
    shutil.copy(app / DECODER, app / "Old" / "Decoder.swift")
    assert differences(sources.read(app), TABLE) == []


def test_a_file_that_the_target_leaves_out_is_not_read(app: Path, change: Change) -> None:
    shutil.copy(app / DECODER, app / "FastVLM" / "Spare.swift")
    change(
        PROJECT,
        "path = FastVLM; ",
        "path = FastVLM; exceptions = (AA0000000000000000000050, ); ",
    )
    change(
        PROJECT,
        "\t\tAA0000000000000000000022 = {",
        "\t\tAA0000000000000000000050 = {isa = PBXFileSystemSynchronizedBuildFileExceptionSet; membershipExceptions = "
        "(Spare.swift, ); target = AA0000000000000000000002; };\n\t\tAA0000000000000000000022 = {",
    )
    assert differences(sources.read(app), TABLE) == []


def test_the_interfaces_of_mlx_swift_lm_3(change: Change) -> None:
    """As ml-fastvlm pull request 78 describes its changes."""
    change(VIEWING, "factory.typeRegistry", "await factory.typeRegistry")
    change(VIEWING, "factory.processorRegistry", "await factory.processorRegistry")
    change(VIEWING, "from: Data(contentsOf: file)", "from: file")
    change(VIEWING, "imageGridThw:", "frames:")
    change(VIEWING, "prompt.asMessages()", "messages(of: prompt)")
    change(VIEWING, "func loraLinearLayers() -> LoRALinearLayers", "var loraLayers: [Module]")
    change(DECODER, "let mask = ", "let mask: MLXFast.ScaledDotProductAttentionMaskMode = ")
    change(SESSION, "MLX.GPU.set(cacheLimit: 20 << 20)", "MLX.Memory.cacheLimit = 20 << 20")
    app = change(
        SESSION, "loadContainer(configuration: Viewer.folder)", "loadContainer(from: Viewer.folder, using: loader)"
    )
    read = sources.read(app)
    assert [line.partition(":")[0] for line in differences(read, TABLE)] == ["api", "Writer.write(_"]
    assert read.changed[0].facts == ("turn", "turn_separator", "prompt_end", "system_prompt")  # only warned of
    assert read.api == (
        "LMInput.ProcessedImage(pixels:frames:)",
        "LoRAModel.loraLayers",
        "Memory.cacheLimit",
        "loadContainer(from:using:)",
    )


PINS = {"mlx-swift-examples": "2.21.2", "mlx-swift": "0.21.3", "swift-transformers": "0.1.19"}
URLS = {package.name: package.url for package in TABLE.packages}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("place", [RESOLVED, "Viewer.xcworkspace/xcshareddata/swiftpm/Package.resolved"])
def test_package_resolved(app: Path, version: int, place: str) -> None:
    states = {name: {"revision": "0" * 40, "version": pin} for name, pin in PINS.items()}
    states["mlx-swift"] = {"revision": "f" * 40, "branch": "main"}
    document: dict[str, object] = {"originHash": "1", "version": version}
    document["pins"] = [{"identity": n, "location": f"{URLS[n]}.git", "state": state} for n, state in states.items()]
    if version == 1:
        pins = [{"package": "x", "repositoryURL": URLS[name], "state": state} for name, state in states.items()]
        document = {"object": {"pins": pins}, "version": 1}
    (app / place).parent.mkdir(parents=True)
    (app / place).write_text(json.dumps(document))
    found = {package.name: package.resolved for package in sources.read(app).packages}
    assert found == PINS | {"mlx-swift": "f" * 40}


def test_two_package_resolved_that_differ_are_refused(app: Path) -> None:
    for place, version in ((RESOLVED, "1.0.0"), ("Other.xcworkspace/xcshareddata/swiftpm/Package.resolved", "1.0.1")):
        (app / place).parent.mkdir(parents=True)
        pin = {"location": "https://example.com/a", "state": {"version": version}}
        (app / place).write_text(json.dumps({"version": 2, "pins": [pin]}))
    assert "with different versions" in refusal(app)


def test_all_faults_of_the_project_at_once(change: Change) -> None:
    change(ENTITLEMENTS, "<plist", "<list")
    said = refusal(change(PROJECT, "MACOSX_DEPLOYMENT_TARGET = 15.2", "MACOSX_DEPLOYMENT_TARGET = new"))
    assert "deployment target: " in said and "entitlements: " in said


def test_an_app_without_the_models_sources_is_one_line(app: Path) -> None:
    for name in ("Decoder", "Settings", "Viewing"):
        (app / f"FastVLM/{name}.swift").unlink()
    said = refusal(app)
    assert said.endswith("none of its project's 1 Swift files defines the model (registerModelType)")


@pytest.mark.parametrize("file", [DECODER, SESSION, ENTITLEMENTS, PROJECT, RESOLVED])
@pytest.mark.parametrize("fault", ["not UTF-8", "a folder", "truncated", "empty", "a dead link"])
def test_broken_files(app: Path, file: str, fault: str) -> None:
    path = app / file
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b'{"version": 2, "pins": [] }'
    path.unlink(missing_ok=True)
    if fault == "not UTF-8":
        path.write_bytes(before + b"\xff\xfe")
    elif fault == "a folder":
        path.mkdir()
    elif fault == "a dead link":
        path.symlink_to(path.name)
    else:
        path.write_bytes(before[: len(before) * 2 // 3] if fault == "truncated" else b"")
    if file.endswith(".swift") and fault not in ("not UTF-8",):
        found = sources.read(app).changed  # what it declares is missed, and so is a file that is none
        assert {*found} and all(changed.where.startswith(("Swift sources", file)) for changed in found)
    else:
        assert Path(file).name in refusal(app)


@pytest.mark.parametrize("cut", range(0, 100, 14))
def test_a_project_file_cut_anywhere(app: Path, cut: int) -> None:
    whole = (app / PROJECT).read_bytes()
    (app / PROJECT).write_bytes(whole[: len(whole) * cut // 100])
    assert f"{PROJECT}: cannot be read as a project file" in refusal(app)


@pytest.mark.parametrize("what", ["missing", "a file", "a broken link", "no project", "two projects", "the repository"])
def test_no_app(tmp_path: Path, app: Path, what: str) -> None:
    if what == "missing":
        app = app / "nowhere"
    elif what == "a file":
        app = app / PROJECT
    elif what == "a broken link":
        (app / "link").symlink_to("nowhere")
        app = app / "link"
    elif what == "no project":
        shutil.rmtree(app / "Viewer.xcodeproj")
    elif what == "two projects":
        (app / "Other.xcodeproj").mkdir()
    else:
        app = tmp_path
    said = refusal(app)
    if what in ("a file", "a broken link", "missing"):
        assert f": got {what if what != 'missing' else 'nothing there'}, expected the folder" in said
    assert said.startswith("--app: ") and ("app/?" in said) == (what == "the repository")
