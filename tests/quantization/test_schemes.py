"""Schemes store what they say, which is what MLX makes of the same settings."""

import itertools

import mlx.core as mx
import mlx.nn as mlx_nn
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_arrays import on_the_cpu, torch_bytes  # noqa: F401

from fastvlm.common.dtypes import dtype_name, torch_dtype
from fastvlm.common.errors import UserError
from quantization.calibration.tensors import encode
from quantization.recipe import VISION, recipe_from_json
from quantization.schemes import MODES, Scheme, legal_combinations

MATRIX = (48, 384)
STORED = [kind(*values) for mode, kind in MODES.items() if mode != "coreml"
          for values in itertools.product(*kind.LEGAL.values())]  # fmt: skip


def weight(scheme: Scheme) -> torch.Tensor:
    return torch.randn(MATRIX, generator=torch.Generator().manual_seed(4)).to(torch_dtype(scheme.dtype))


def read_back(document: dict, pattern: str = "*") -> Scheme:
    rules = [{"pattern": pattern, "scheme": document}]
    return recipe_from_json({"name": "one", "version": 2, "rules": rules}).rules[0].schemes[0]


@pytest.mark.parametrize("scheme", STORED, ids=str)
def test_what_is_stored_is_what_parts_say(scheme):
    rows = weight(scheme)
    whole = encode(scheme, rows)
    assert {name: (dtype_name(part.dtype), tuple(part.shape)) for name, part in whole.items()} == scheme.parts(MATRIX)
    halves = [encode(scheme, rows[:17]), encode(scheme, rows[17:])]
    for name, part in whole.items():  # as an export streams them
        assert torch_bytes(part) == torch_bytes(halves[0][name]) + torch_bytes(halves[1][name])


@pytest.mark.parametrize("scheme", [scheme for scheme in STORED if scheme.mlx()], ids=str)
def test_the_entry_gives_a_module_that_takes_the_parts(scheme):
    """mlx-lm hands the entry of config.json to `to_quantized`, then loads the parts strictly."""
    layer = mlx_nn.Linear(MATRIX[1], MATRIX[0], bias=False).to_quantized(**scheme.mlx())
    own = {name: tuple(value.shape) for name, value in tree_flatten(layer.parameters())}
    assert own == {name: shape for name, (_, shape) in scheme.parts(MATRIX).items()}
    assert {name: value.dtype == mx.uint32 for name, value in tree_flatten(layer.parameters())} == {
        name: dtype == "uint32" for name, (dtype, _) in scheme.parts(MATRIX).items()
    }


@pytest.mark.parametrize("scheme", STORED, ids=str)
def test_json_and_back(scheme):
    assert [stored for stored in STORED if stored == read_back(scheme.to_json())] == [scheme]


def test_the_encoders_forms():
    for form in MODES["coreml"].LEGAL["form"]:
        scheme = read_back({"mode": "coreml", "form": form}, VISION + "stages.0.*")
        assert scheme.to_json() == {"mode": "coreml", "form": form}
        assert scheme.parts((4, 4)) == {} and scheme.mlx() is None
        assert "vision encoder" in str(scheme.fault((4, 4)))


@pytest.mark.parametrize(
    ("document", "shape", "fault"),
    [({"mode": "mxfp4", "dtype": "float16"}, (4, 48), "rows of 48 do not divide into mxfp4's groups of 32"),
     ({"mode": "nvfp4", "dtype": "float16"}, (4, 24), "nvfp4's groups of 16"),
     ({"mode": "mxfp8", "dtype": "float16"}, (64,), "mxfp8 quantization takes matrices, got 1 dimension"),
     ({"mode": "affine", "bits": 4, "group_size": 128, "dtype": "float16"}, (4, 64), "groups that do: 32, 64"),
     ({"mode": "affine", "bits": 4, "group_size": 32, "dtype": "float16"}, (4, 24), "none, store it unquantized")],
)  # fmt: skip
def test_what_a_scheme_cannot_store(document, shape, fault):
    assert fault in str(read_back(document).fault(shape))
    assert read_back(document).fault((4, 128)) is None


def test_the_legal_combinations_in_a_line():
    legal = legal_combinations()
    assert "\n" not in legal and all(mode in legal for mode in MODES)
    for scheme in STORED:
        assert all(str(value) in legal for value in scheme.to_json().values())
    for document in ({"mode": "mxfp4", "bits": 4, "dtype": "float16"}, {"mode": "mxfp4"}, {"mode": "mxfp6"},
                     {"mode": "nvfp4", "dtype": "int8"}):  # fmt: skip
        with pytest.raises(UserError) as error:
            read_back(document)
        assert legal in str(error.value)
