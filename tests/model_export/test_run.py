"""`inspect` of any ML program, and `run`: its own inputs from files, its outputs to files."""

import json
import re
from pathlib import Path
from typing import Any

import mil_packages as packages
import numpy as np
import pytest
import torch
from mil_packages import mb
from PIL import Image

from model_export.commands import programs, run
from model_export.mil.dtypes import POLICIES

import coremltools as ct  # isort: skip

WEIGHT = np.arange(600, dtype=np.float32).reshape(200, 3)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop with a weight in it: y = n times (x + sums of WEIGHT)."""
    path = tmp_path_factory.mktemp("programs") / "arrays.mlpackage"

    def build(x: Any, n: Any) -> Any:
        rows = mb.reduce_sum(x=mb.linear(x=mb.expand_dims(x=x, axes=[0]), weight=WEIGHT), axes=[0, 1], name="rows")
        loop = mb.while_loop(
            _cond=lambda i, _: mb.less(x=i, y=mb.squeeze(x=n)),
            _body=lambda i, y: (mb.add(x=i, y=1), mb.add(x=y, y=rows, name="inside")),
            loop_vars=(0, x),
        )
        return mb.identity(x=loop[1], name="y")

    packages.save_program(path, build, {"x": np.zeros(3, np.float32), "n": np.zeros(1, np.int32)})
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.mean((2, 3)) / 50, -1)

    path = tmp_path_factory.mktemp("programs") / "classifier.mlpackage"
    traced = torch.jit.trace(Mean(), torch.zeros(1, 3, 8, 8))
    image = ct.ImageType("image", (1, 3, 8, 8))
    labels = ct.ClassifierConfig(["red", "green", "blue"])
    ct.convert(traced, inputs=[image], classifier_config=labels, skip_model_load=True).save(str(path))
    return path


@pytest.fixture
def green(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), (10, 200, 30)).save(tmp_path / "green.png")
    return tmp_path / "green.png"


def test_policies_are_the_executors() -> None:
    assert set(run.COMPUTES) <= set(POLICIES)


def test_inspect_says_what_a_program_takes_and_holds(cli: Any, arrays: Path, classifier: Path) -> None:
    found = cli("inspect", arrays, "--json").document["program"]
    function = found["functions"]["main"]
    assert function["inputs"] == {"x": "fp32[3]", "n": "int32[1]"} and function["outputs"] == {"y": "fp32[3]"}
    assert function["operations"]["add"] == 2 and function["operations"]["while_loop"] == 1
    assert (
        function["refused"] is None and found["weights"]["fp32"]["bytes"] == WEIGHT.nbytes + 4 * 200
    )  # and zeros for a bias
    printed = cli("inspect", classifier).out
    assert "input image: picture in RGB uint8[1, 3, 8, 8]" in printed and "output classLabel: string" in printed
    assert "function main: iOS 15 (CoreML5)" in printed and "the executor runs it: yes" in printed


def test_inspect_says_what_is_not_supported(cli: Any, arrays: Path, tmp_path: Path) -> None:
    packages.save_program(tmp_path / "p.mlpackage", lambda x: mb.relu(x=x, name="y"), {"x": np.zeros(2, np.float32)})
    file = tmp_path / "p.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    file.write_bytes(file.read_bytes().replace(b"relu", b"rely"))
    function = cli("inspect", tmp_path / "p.mlpackage", "--json").document["program"]["functions"]["main"]
    assert "1 unsupported operation(s): y (rely, CoreML7)" in function["refused"]


def test_the_table_of_operations(cli: Any) -> None:
    rows = cli("inspect", "--supported", "--json").document["supported"]
    assert rows["relu"] == dict.fromkeys(("CoreML5", "CoreML6", "CoreML7", "CoreML8"), True)
    assert rows["while_loop"]["CoreML5"] and rows["const"]["CoreML8"] and rows["read_state"] == {"CoreML8": True}
    assert 150 < len(rows) < 200 and "_const_symbolic" not in rows
    both = cli("inspect", "--supported", "x.mlpackage")
    assert both.code == 2 and "not with --supported" in both.err
    assert cli("inspect").code == 2


def test_run_saves_the_outputs_and_shows_what_is_watched(cli: Any, arrays: Path, tmp_path: Path) -> None:
    x = np.array([1, 2, -1], np.float32)
    np.save(tmp_path / "x.npy", x)
    given = ["--input", f"x={tmp_path / 'x.npy'}", "--input", "n=[2]"]
    answer = cli("run", arrays, *given, "--output-dir", tmp_path / "out", "--watch", "in*", "ro*", "--json")
    assert answer.code == 0, answer.err
    expected = x + 2 * (WEIGHT @ x).sum()
    np.testing.assert_array_equal(np.load(tmp_path / "out/y.npy"), expected)
    rows, *inside = answer.document["watched"]
    assert (rows["name"], rows["max"]) == ("rows", (WEIGHT @ x).sum()) and [row["type"] for row in inside] == [
        "add"
    ] * 2
    assert inside[1]["max"] == expected.max() and inside[1]["nan"] == 0 and inside[1]["shape"] == [3]
    assert answer.document["outputs"]["y"]["file"] == str(tmp_path / "out/y.npy")
    again = cli("run", arrays, *given, "--output-dir", tmp_path / "out")
    assert again.code == 2 and "out" in again.err
    assert "no value has such a name" in cli("run", arrays, *given, "--watch", "nothing").out


def test_run_takes_pictures(cli: Any, classifier: Path, green: Path, tmp_path: Path) -> None:
    answer = cli("run", classifier, "--input", f"image={green}", "--output-dir", tmp_path / "out")
    assert "30 x 20, scaled to 8 x 8" in answer.out and "classLabel: green" in answer.out
    assert json.loads((tmp_path / "out/classLabel.json").read_text()) == "green"
    shares = json.loads((tmp_path / "out/classLabel_probs.json").read_text())
    powers = np.exp(np.array([10, 200, 30]) / 50)
    assert list(shares.values()) == pytest.approx(powers / powers.sum(), rel=2e-3)


def test_a_picture_for_an_array_is_from_0_to_1(cli: Any, green: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.mlpackage"
    packages.save_program(path, lambda x: mb.identity(x=x, name="y"), {"x": np.zeros((1, 3, 20, 30), np.float32)})
    cli("run", path, "--input", f"x={green}", "--output-dir", tmp_path / "out")
    np.testing.assert_allclose(np.load(tmp_path / "out/y.npy")[0, :, 0, 0], np.array([10, 200, 30]) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        ([], ["--input x=: is missing (fp32[3])", "--input n=: is missing (int32[1])"]),
        (["x"], ["got x, expected NAME=VALUE"]),
        (
            ["x=[1", "n={tmp}/none.npy", "z=1"],
            ["expected a .npy, a picture", "none.npy: cannot be read", "no input 'z'"],
        ),
        (["x={tmp}/bad.npy", "n=1", "n=2"], ["n is given twice"]),
        (["x={tmp}/bad.npy", "n={tmp}/green.png"], ["bad.npy: cannot be read", "a picture for int32[1]"]),
        (["x=[1,2]", "n=[1]"], ["'x': float32[2], expected fp32[3]"]),
        (["x=[1,2,3]", "n=[0.5]"], ["numbers that int32 does not have"]),
    ],
)
def test_unusable_inputs_are_told_all_at_once(
    cli: Any, arrays: Path, green: Path, tmp_path: Path, words: list[str], faults: list[str]
) -> None:
    np.save(tmp_path / "bad.npy", np.array([object()]), allow_pickle=True)
    given = [word.format(tmp=tmp_path) for word in words]
    answer = cli("run", arrays, *(["--input", *given] if given else []))
    assert answer.code == 2
    for fault in faults:
        assert fault in answer.err
    assert cli("run", tmp_path / "none.mlpackage").code == 2


def test_the_documents_table_is_the_registrys():
    text = (Path(__file__).parents[2] / "docs" / "EXECUTOR.md").read_text()
    rows = dict(re.findall(r"^\| (iOS \d+) \| (.*) \|$", text, re.M))
    table, new = programs.supported(), {}
    for name, opsets in table.items():
        opset = next(iter(opsets))
        new.setdefault(programs.SYSTEMS[opset], []).append(f"`{name}`" if opsets[opset] else f"~~`{name}`~~")
    assert rows == {
        system: ", ".join(sorted(names, key=lambda name: name.strip("~`"))) for system, names in new.items()
    }
