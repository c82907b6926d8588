"""The names and shapes that a checkpoint is held to, against those of Transformers' own class."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from transformers import Qwen2Config

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.configuration import configuration_of, hf_config_of
from fastvlm.checkpoint.shapes import shapes, skeleton
from fastvlm.synthetic.checkpoint import SHAPES, _config

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "fastvlm" / "demo_checkpoint"


@pytest.mark.parametrize(
    ("shape", "form", "layout"),
    [("tiny", "folded", "fast_vlm"), ("tiny", "training", "llava_qwen2"), ("0.5b", "folded", "llava_qwen2"),
     ("1.5b", "training", "fast_vlm"), ("7b", "folded", "fast_vlm")],
)  # fmt: skip
def test_shapes_are_those_of_the_class(shape: str, form: str, layout: str) -> None:
    sizes = SHAPES[shape]
    raw = _config(sizes, layout, form, "float16", sizes.tied, sizes.image_size)
    model = configuration_of(raw, layout, form, sizes.tied)
    state = skeleton(hf_config_of(model)).state_dict()
    assert shapes(model) == {name: tuple(t.shape) for name, t in state.items() if not naming.is_ignored(name)}


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
    st.sampled_from([4, 8, 12, 32, 33]),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.booleans(),
)
def test_a_reduced_tower_is_timms(layers: list[int], first: int, times: list[int], folded: bool) -> None:
    widths = [int(width) for width in np.cumprod([first, *times])]
    sizes = SHAPES["tiny"]
    raw = _config(sizes, "llava_qwen2", "folded", "float16", sizes.tied, sizes.image_size)
    raw["mm_vision_model_args"] = {"layers": layers, "embed_dims": widths}
    model = configuration_of(raw, "llava_qwen2", "folded" if folded else "training", sizes.tied)
    try:
        state = skeleton(hf_config_of(model)).state_dict()
    except Exception as error:
        with pytest.raises(type(error)):
            shapes(model)
        return
    assert shapes(model) == {name: tuple(t.shape) for name, t in state.items() if not naming.is_ignored(name)}


def test_a_reduced_tower_needs_no_library() -> None:
    code = (
        "import sys; from pathlib import Path; from fastvlm.checkpoint.checkpoint import open_checkpoint;"
        f"open_checkpoint(Path({str(DEMO)!r})); print({{'torch', 'timm', 'transformers'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


MINIMAL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 9,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2, "rope_theta": 1000000, "eos_token_id": [3, 4], "bos_token_id": 1},
    {"head_dim": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 99, "hidden_act": "gelu"},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "defaults")
def test_settings_are_those_of_qwen2(settings: dict[str, Any]) -> None:
    """What we take for an absent setting is what Transformers takes."""
    own = configuration_of(MINIMAL | settings, "llava_qwen2", "folded", False)
    theirs = Qwen2Config(
        **MINIMAL,
        num_key_value_heads=settings.get("num_key_value_heads"),
        **{key: value for key, value in settings.items() if key != "num_key_value_heads"},
    )
    text: Any = hf_config_of(own).text_config
    assert text.to_dict() == theirs.to_dict()
    assert own.text.rope == theirs.rope_parameters
    for name in ("num_key_value_heads", "rms_norm_eps", "hidden_act", "max_position_embeddings", "use_sliding_window"):
        assert getattr(own.text, name) == getattr(theirs, name)
    other = configuration_of(
        MINIMAL | settings | {"rope_theta": 3.0, "rope_parameters": None}, "llava_qwen2", "folded", False
    )
    assert hf_config_of(other).text_config.to_dict() != theirs.to_dict()  # the control
