"""The names and shapes that a checkpoint is held to, against those of Transformers' own class."""

import pytest

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
