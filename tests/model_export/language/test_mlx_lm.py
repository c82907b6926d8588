"""`--layout mlx-lm`: the language model alone as a plain Qwen2, for mlx-lm's own command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.data.scenes import CHECKPOINT
from fastvlm.model.build import build
from model_export import artefact, contract
from model_export.config import ExportConfig
from model_export.export import export, plan
from tests.helpers import relative

pytestmark = pytest.mark.slow

mlx_lm = pytest.importorskip("mlx_lm")
PROMPT = "What shape is this?"


def exported(target: Path, quant: str) -> Path:
    export(plan(ExportConfig(CHECKPOINT, target, quant=quant, layout="mlx-lm"), ("llm",)))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("mlx-lm") / "text", "mixed_4_6")


def test_the_folder_is_a_plain_qwen2_with_nothing_of_pictures(folder: Path) -> None:
    config = json.loads((folder / contract.CONFIG).read_text())
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert not [key for key in config if key.startswith(("mm_", "image_"))]
    modules = [key for key, value in config["quantization"].items() if isinstance(value, dict)]
    assert modules and all(name.startswith(("model.", "lm_head")) for name in modules)
    assert not (folder / contract.PROJECTOR_WEIGHTS).exists() and not (folder / contract.PREPROCESSOR_CONFIG).exists()
    document = artefact.read_manifest(folder)
    assert document["config"]["layout"] == "mlx-lm" and artefact.verify(folder) == []
    assert "projector" not in document["llm"]["decisions"] and "projector" not in (folder / "NOTICE").read_text()
    with pytest.raises(artefact.UserError, match="layout mlx-lm, which the app can't load"):
        artefact.check_for_app(folder, document)


def test_mlx_lms_command_line_loads_it(folder: Path) -> None:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(folder), "--prompt", PROMPT]
    done = subprocess.run([*command, "--max-tokens", "8"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.split("==========")[1].strip()
    assert answer.endswith(".") and len(answer.split()) > 2  # a sentence of the demo's, not noise


def test_mlx_lm_computes_the_checkpoints_logits(tmp_path: Path) -> None:
    import mlx.core as mx

    model, tokenizer = mlx_lm.load(str(exported(tmp_path / "text", "bf16")))[:2]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    got = np.array(model(mx.array([ids])).astype(mx.float32))
    whole = build(open_checkpoint(CHECKPOINT), "float32", "cpu")
    with torch.inference_mode():
        hidden = whole.model.language_model(torch.tensor([ids])).last_hidden_state
        expected = whole.lm_head(hidden).numpy()
        control = whole.lm_head(hidden.roll(1, dims=1)).numpy()
    assert relative(got, expected) < 0.05 < 0.3 < relative(got, control)
