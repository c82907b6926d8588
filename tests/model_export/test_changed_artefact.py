"""An artefact whose export.json or package was changed in one value: `inspect` and `load` say so in a line."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coremltools.proto import Model_pb2

from fastvlm.common.errors import UserError
from model_export import contract, mil
from model_export.artefact import check_parts, read_manifest
from model_export.encoder.package import SPECIFICATION

pytestmark = pytest.mark.slow

OTHERS = (None, 5, -1, 1e400, "x", [], {}, [{}], {"a": []}, True)


@pytest.fixture
def artefact(tiny_artefact: Path, tmp_path: Path) -> Path:
    """A copy to change, without its language model's weights."""
    return Path(shutil.copytree(tiny_artefact, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")))


def places(value: Any, below: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*below, key)
        if isinstance(inner, (dict, list)) and key != "files":
            yield from places(inner, (*below, key))


def test_a_manifest_changed_in_any_value_is_understood_or_one_line(artefact: Path, cli: Any) -> None:
    manifest, refused = json.loads((artefact / contract.MANIFEST).read_text()), set()
    shutil.rmtree(artefact / contract.PACKAGE)
    rng = random.Random(0)
    for place in places(manifest):
        for other in (..., rng.choice(OTHERS)):
            changed = json.loads(json.dumps(manifest))
            *above, last = place
            parent = changed
            for key in above:
                parent = parent[key]
            if other is ...:
                del parent[last]
            else:
                parent[last] = other
            (artefact / contract.MANIFEST).write_text(json.dumps(changed))
            answer = cli("inspect", artefact)
            assert answer.code == 0 or (answer.code == 2 and answer.err.count("\n") == 1), (place, other, answer)
            refused |= {place} if answer.code else set()
    assert {("vision",), ("vision", "resolutions"), ("llm", "recipe", "name"), ("files",)} <= refused


@pytest.mark.parametrize("key", ["vision", "llm", "image", "config"])
def test_a_manifest_that_lacks_a_part_is_no_whole_model(key: str, artefact: Path) -> None:
    document = read_manifest(artefact)
    check_parts(artefact, document)  # the control
    del document[key]
    with pytest.raises(UserError, match=f"export.json: no {key}: export again"):
        check_parts(artefact, document)


def test_a_package_changed_in_any_field_is_understood_or_one_line(artefact: Path, cli: Any) -> None:
    """A field of its description or of its program, unset or with an extreme value."""
    package = artefact / contract.PACKAGE
    whole = (package / SPECIFICATION).read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(40):
        model = Model_pb2.Model()
        model.ParseFromString(whole)
        what = change(model, rng)
        (package / SPECIFICATION).write_bytes(model.SerializeToString())
        answer = cli("inspect", package)
        assert answer.code == 0 or (answer.code == 2 and answer.err.count("\n") == 1), (what, answer)
        try:
            mil.load(package)
        except mil.MILError as error:
            refused += 1
            assert "\n" not in str(error), what
    assert refused > 6


def change(message: Any, rng: random.Random) -> str:
    """Change one field somewhere below the message; which it was."""
    path: list[str] = []
    while fields := message.ListFields():
        field, value = rng.choice(fields)
        path.append(field.name)
        entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        texts = {field.CPPTYPE_STRING: ("", "x", "é"), field.CPPTYPE_BOOL: (True, False)}
        extreme = rng.choice(texts.get(field.cpp_type, (0, 1, 2**31 - 1, 65568)))
        if rng.random() < 0.1 or isinstance(value, bytes):
            message.ClearField(field.name)
            break
        if entry:
            key = rng.choice(sorted(value))
            path.append(str(key))
            if not hasattr(value[key], "ListFields"):
                value[key] = "x"
                break
            message = value[key]
        elif field.cpp_type == field.CPPTYPE_MESSAGE:
            message = rng.choice(value) if hasattr(value, "add") else value
        elif hasattr(value, "append"):
            if not isinstance(value[0], bytes):
                value[0] = extreme
            break
        else:
            setattr(message, field.name, extreme)
            break
    return ".".join(path)
