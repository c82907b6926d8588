"""What a conversion imports: of a published vision tower, no PyTorch, whose import costs more than the conversion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model_export import contract

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def imported(checkpoint: Path, target: Path, layout: str = "app") -> set[str]:
    """The packages that a conversion to 4 bit imports, as the interpreter reports them."""
    flags = ["--checkpoint", str(checkpoint), "--output-dir", str(target), "--quant", "int4", "--layout", layout]
    command = [sys.executable, "-X", "importtime", "-m", "model_export", "llm", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (target / contract.MANIFEST).is_file()
    return {name.partition(".")[0] for name in re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)}


@pytest.mark.parametrize("layout", contract.LAYOUTS)
def test_a_conversion_imports_no_torch(make_checkpoint, tmp_path, layout):
    found = imported(make_checkpoint(shape="encoder", dtype="bfloat16"), tmp_path / "out", layout)
    assert {"numpy", "numba", "tokenizers"} <= found
    assert not {"torch", "timm", "torchvision", "coremltools", "mlx"} & found


def test_a_tower_that_is_folded_for_mlx_vlm_does(make_checkpoint, tmp_path):
    """The control: the fold is PyTorch's, and the same look at the process finds it."""
    checkpoint = make_checkpoint(shape="encoder", form="training", dtype="bfloat16")
    assert {"torch", "timm"} <= imported(checkpoint, tmp_path / "out", "mlx-vlm")
