"""The mlx-vlm layout, loaded by mlx-vlm itself.

mlx-vlm is no dependency of this project (it brings OpenCV, audio and web-server packages): name a Python that has it,
`python -m venv v && v/bin/pip install "mlx[cpu]" mlx-vlm && FASTVLM_MLX_VLM_PYTHON=v/bin/python make test`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from fastvlm.model.build import build
from fastvlm.synthetic import checkpoint as synthetic
from model_export import contract
from model_export.language.llm import export_llm
from quantization.recipe import load_recipe, recipe_from_json
from tests.helpers import relative

PYTHON = os.environ.get("FASTVLM_MLX_VLM_PYTHON") or (sys.executable if importlib.util.find_spec("mlx_vlm") else "")
FLOAT32 = {"name": "float32", "version": 2, "rules": [{"pattern": "*", "scheme": {"dtype": "float32"}}]}
RUN = """
import sys, numpy as np, mlx.core as mx
from mlx_vlm.utils import load
model, processor = load(sys.argv[1])
given = np.load(sys.argv[2])
merged = model.get_input_embeddings(mx.array(given["ids"]), mx.array(given["pixels"]), None).inputs_embeds
logits = model.language_model(None, inputs_embeds=merged).logits
np.savez(sys.argv[3], merged=np.array(merged.astype(mx.float32)), logits=np.array(logits.astype(mx.float32)))
"""


def test_other_towers_are_refused(tiny_fast_vlm, tmp_path):
    with pytest.raises(UserError, match=r"mlx-vlm runs only FastViTHD with \(2, 12, 24, 4, 2\) blocks"):
        export_llm(open_checkpoint(tiny_fast_vlm), load_recipe("fp16"), tmp_path, layout="mlx-vlm")
    with pytest.raises(UserError, match="unknown layout 'gguf': expected app or mlx-vlm"):
        export_llm(open_checkpoint(tiny_fast_vlm), load_recipe("fp16"), tmp_path, layout="gguf")
    assert not list(tmp_path.iterdir())


def computed(folder: Path, work: Path, pixels: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    np.savez(work / "in.npz", pixels=pixels, ids=ids.astype(np.int32))
    command = [PYTHON, "-c", RUN, str(folder), str(work / "in.npz"), str(work / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(work / "out.npz"))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="mlx-vlm is not installed: set FASTVLM_MLX_VLM_PYTHON to a Python that has it")
@pytest.mark.parametrize("form", ["folded", "training"])
def test_mlx_vlm_computes_the_checkpoints_logits(form, tmp_path, monkeypatch):
    """The real vision tower (mlx-vlm knows no other) on a small picture, a tiny decoder, all in float32."""
    shape = synthetic.Shape(64, 2, 4, 2, 128, 576, False, 128, None, False)
    monkeypatch.setitem(synthetic.SHAPES, "real tower", shape)
    checkpoint = open_checkpoint(synthetic.write_checkpoint(tmp_path / "in", "real tower", "llava_qwen2", form))
    folder = tmp_path / "out"
    folder.mkdir()
    export_llm(checkpoint, recipe_from_json(FLOAT32), folder, layout="mlx-vlm")
    checkpoint.tokenizer().save_pretrained(folder)
    rng = np.random.default_rng(0)
    pixels, text = rng.random((1, 3, 128, 128), dtype=np.float32), rng.integers(0, 500, (1, 12))
    ids = np.concatenate([text[:, :5], [[contract.MLX_VLM_IMAGE_TOKEN]], text[:, 5:]], axis=1)
    merged, logits = reference(checkpoint, pixels, text)
    got = computed(folder, tmp_path, pixels, ids)
    assert got["merged"].shape == (1, 16, 64)
    assert relative(got["merged"], merged) < 1e-5  # 2e-6 measured
    assert relative(got["logits"], logits) < 2e-5  # 4e-6 measured
    weights = load_file(folder / contract.VISION_WEIGHTS)  # the negative control: one of 125 million values
    weights["vision_tower.vision_model.network.7.1.convffn.fc1.weight"][5, 0, 0, 7] += 0.5
    save_file(weights, folder / contract.VISION_WEIGHTS, {"format": "mlx"})
    assert relative(computed(folder, tmp_path, pixels, ids)["merged"], merged) > 1e-4


def reference(checkpoint, pixels: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transformers: merged embeddings (1, 16, 64) with 4 image tokens after 5 of text, and the logits."""
    model = build(checkpoint)
    with torch.inference_mode():
        features = model.model.vision_tower.timm_model.forward_features(torch.from_numpy(pixels))
        image = model.model.multi_modal_projector(features.flatten(2).transpose(1, 2))
        words = model.model.language_model.embed_tokens(torch.from_numpy(text))
        merged = torch.cat([words[:, :5], image, words[:, 5:]], dim=1)
        logits = model.lm_head(model.model.language_model(inputs_embeds=merged).last_hidden_state)
    return merged.numpy(), logits.numpy()
