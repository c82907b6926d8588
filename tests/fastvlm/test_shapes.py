"""The names and shapes that a checkpoint is held to, against those of Transformers' own class."""

from typing import Any

import pytest
from transformers import Qwen2Config

from fastvlm import naming
from fastvlm.configuration import configuration_of, hf_config_of
from fastvlm.shapes import shapes, skeleton
from fastvlm.synthetic import SHAPES, _config


@pytest.mark.parametrize("shape", ["tiny", "encoder", "0.5b", "1.5b", "7b"])
@pytest.mark.parametrize("form", ["folded", "training"])
@pytest.mark.parametrize("layout", ["fast_vlm", "llava_qwen2"])
def test_shapes_are_those_of_the_class(shape: str, form: str, layout: str) -> None:
    sizes = SHAPES[shape]
    raw = _config(sizes, layout, form, "float16", sizes.tied, sizes.image_size)
    model = configuration_of(raw, layout, form, sizes.tied)
    state = skeleton(hf_config_of(model)).state_dict()
    assert shapes(model) == {name: tuple(t.shape) for name, t in state.items() if not naming.is_ignored(name)}


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
