"""What a conversion imports: of a folded vision tower, no PyTorch, whose import costs more than the conversion."""

import subprocess
import sys
from pathlib import Path

import pytest

from model_export import contract

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from fastvlm.common.cli import run
from model_export.__main__ import build_parser
from model_export.language import mlx_vlm
mlx_vlm._BLOCKS, mlx_vlm._WIDTHS, mlx_vlm._FEATURES = (1, 1, 2, 1, 1), (8, 16, 32, 64, 128), 256  # the tiny tower's
checkpoint, target, *layouts = sys.argv[1:]
for layout in layouts:
    words = ["--checkpoint", checkpoint, "--output-dir", f"{target}-{layout}", "--quant", "int4", "--layout", layout]
    assert run(build_parser, ["llm", *words]) == 0
print(*{name.partition(".")[0] for name in sys.modules})
"""


def imported(checkpoint: Path, target: Path, *layouts: str) -> set[str]:
    """The packages that conversions to 4 bit import."""
    command = [sys.executable, "-c", CODE, str(checkpoint), str(target), *layouts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((target.with_name(f"{target.name}-{one}") / contract.MANIFEST).is_file() for one in layouts)
    return {*done.stdout.splitlines()[-1].split()}


def test_a_conversion_imports_no_torch(make_checkpoint, tmp_path):
    modules = imported(make_checkpoint(dtype="bfloat16"), tmp_path / "out", *contract.LAYOUTS)
    assert {"numpy", "numba", "tokenizers"} <= modules
    assert not {"torch", "timm", "torchvision", "coremltools", "mlx"} & modules


def test_a_tower_that_is_folded_for_mlx_vlm_does(make_checkpoint, tmp_path):
    """The control: the fold is PyTorch's, and the same look at the process finds it."""
    checkpoint = make_checkpoint(form="training", dtype="bfloat16")
    assert {"torch", "timm"} <= imported(checkpoint, tmp_path / "out", "mlx-vlm")
