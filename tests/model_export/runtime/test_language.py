"""The artefact's language model run by PyTorch over MLX's tensors, against MLX itself."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.common.errors import UserError
from model_export.language.llm import export_llm
from model_export.mil import int8
from model_export.runtime.language import torch_language
from model_export.runtime.mlx_language import mlx_language
from model_export.stored import StoredTensors
from quantization.recipe import Recipe, load_recipe, recipe_from_json
from tests.helpers import relative, with_tensors

NAMES = ("fp16", "bf16", "int8", "int4")
# Largest difference of logits, relative to the largest logit. MLX rounds activations to the stored type where PyTorch
# keeps float32: a few units of that type's precision (2^-11, 2^-8) over two layers. In float32 both only reorder sums.
TOLERANCE = {"fp16": 5e-3, "bf16": 4e-2, "int8": 2e-2, "int4": 2e-2, "float32": 1e-5, "mixed": 1e-5, "floats": 1e-5}
RNG = np.random.default_rng(5)
IDS, FEATURES = RNG.integers(0, 500, (1, 30)), RNG.standard_normal((1, 4, 256)).astype(np.float32)


def affine(bits: int, group: int) -> dict:
    return {"mode": "affine", "bits": bits, "group_size": group}


RULES = {  # in float32; several widths and a quantized projector, or the floating-point modes beside an affine width
    "float32": {},
    "mixed": {"*self_attn.?_proj.weight": affine(6, 32), "*mlp.*_proj.weight": affine(4, 64),
              "*embed_tokens.weight": affine(8, 64), "multi_modal_projector.linear_0.weight": affine(5, 128)},
    "floats": {"*self_attn.?_proj.weight": {"mode": "mxfp8"}, "*mlp.down_proj.weight": {"mode": "nvfp4"},
               "*mlp.*_proj.weight": {"mode": "mxfp4"}, "*embed_tokens.weight": {"mode": "mxfp8"},
               "*lm_head.weight": affine(5, 64), "multi_modal_projector.linear_0.weight": {"mode": "nvfp4"},
               "multi_modal_projector.linear_2.weight": {"mode": "mxfp4"}},
}  # fmt: skip


def recipe_of(name: str) -> Recipe:
    if name not in RULES:
        return load_recipe(name)
    schemes = {**RULES[name], "*": {"mode": "cast"}}
    rules = [{"pattern": pattern, "scheme": scheme | {"dtype": "float32"}} for pattern, scheme in schemes.items()]
    return recipe_from_json({"name": name, "version": 2, "rules": rules})


@pytest.fixture(scope="module")
def artefact(tiny_fast_vlm, make_checkpoint, tmp_path_factory):
    made: dict[tuple[str, bool], Path] = {}

    def make(name: str, tied: bool = False) -> Path:
        if (name, tied) not in made:
            folder = made[name, tied] = tmp_path_factory.mktemp("artefact")
            source = make_checkpoint(tied=True) if tied else tiny_fast_vlm
            export_llm(open_checkpoint(source), recipe_of(name), folder)
        return made[name, tied]

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", [*NAMES, "float32", "mixed", "floats"])
def test_pytorch_computes_what_mlx_computes(name, tied, artefact):
    folder = artefact(name, tied)
    (ours, projector), (theirs, their_projector) = torch_language(folder), mlx_language(folder)
    embeds = ours.embed(IDS)
    assert np.array_equal(embeds, theirs.embed(IDS))  # a look-up: the dequantized rows, bit for bit
    assert relative(projector(FEATURES), their_projector(FEATURES)) < 1e-5  # both in float32, as the app
    logits, expected = ours.logits(embeds), theirs.logits(embeds)
    assert logits.shape == (1, 30, 576) and logits.dtype == np.float32
    assert relative(logits, expected) < TOLERANCE[name]
    if TOLERANCE[name] < 1e-4:  # half precision may part where two tokens are equally likely
        assert list(ours.stream(embeds, 12)) == list(theirs.stream(embeds, 12))


@pytest.mark.parametrize("name", [*NAMES, "mixed", "floats"])
def test_values_are_mlxs_bit_for_bit(name, artefact):
    folder = artefact(name)
    stored = StoredTensors(folder)
    weights = mx.load(str(folder / "model.safetensors")) | mx.load(str(folder / "multi_modal_projector.safetensors"))
    assert stored.names() == {key for key in weights if not key.endswith((".scales", ".biases"))}
    for key in stored.names():
        module = key.removesuffix(".weight")
        expected = weights[key]
        if f"{module}.scales" in weights:
            entry = stored.quantization.get(module, stored.quantization)
            parts = (weights[key], weights[f"{module}.scales"], weights.get(f"{module}.biases"))
            expected = mx.dequantize(*parts, entry["group_size"], entry["bits"], entry.get("mode", "affine"))
        ours = stored.read(key).contiguous().view(torch.uint8).numpy().tobytes()
        assert ours == np.array(expected.view(mx.uint8)).tobytes(), key


def edited(folder: Path, target: Path, **changes) -> Path:
    """A copy of an artefact; a change is a function of the tensor, or None to take it away."""

    def apply(weights):
        for name, change in changes.items():
            tensor = weights.pop(name, None)
            if change is not None:
                weights[name] = change(tensor)

    return with_tensors(folder, target, apply)


@pytest.mark.parametrize("key", ["language_model.model.layers.1.mlp.down_proj.weight", "language_model.lm_head.weight"])
def test_one_flipped_byte_is_noticed(key, artefact, tmp_path):
    """The negative control of the comparisons above: PyTorch over the changed file, MLX over the right one."""

    def flip(packed: torch.Tensor) -> torch.Tensor:
        packed.view(torch.uint8)[9, 3] ^= 0xF0
        return packed

    folder = artefact("mixed" if "layers" in key else "int4")
    changed, _ = torch_language(edited(folder, tmp_path / "flipped", **{key: flip}))
    original, _ = torch_language(folder)
    theirs, _ = mlx_language(folder)
    embeds = original.embed(IDS)
    limit = TOLERANCE["mixed" if "layers" in key else "int4"]
    assert relative(original.logits(embeds), theirs.logits(embeds)) < limit
    assert relative(changed.logits(embeds), theirs.logits(embeds)) > limit


def test_names_say_what_runs(artefact):
    names = {name: torch_language(artefact(name))[0].name for name in (*NAMES, "mixed")}
    release = torch.__version__.split("+")[0]
    assert names["int4"] == f"PyTorch {release} CPU float32 over MLX int4 tensors"
    assert names["bf16"].endswith("over MLX bfloat16 tensors")
    assert names["mixed"].endswith("over MLX mixed int4/int5/int6/int8 tensors")
    assert StoredTensors(artefact("floats")).label == "mixed int5/mxfp4/mxfp8/nvfp4"
    language, projector = mlx_language(artefact("int8"))
    assert language.name == projector.name and language.name.startswith("MLX 0.")
    assert torch_language(artefact("int8"), "bfloat16")[0].name.split()[3] == "bfloat16"


def test_other_dtypes_and_sampling(artefact):
    folder = artefact("int8")
    embeds = torch_language(folder)[0].embed(IDS)
    reference = torch_language(folder)[0].logits(embeds)
    for dtype in ("bfloat16", "float16"):
        assert relative(torch_language(folder, dtype)[0].logits(embeds), reference) < 5e-2
    with pytest.raises(UserError, match="unknown dtype"):
        torch_language(folder, "int9")
    language, _ = mlx_language(folder)
    first = list(language.stream(embeds, 8, temperature=1.0, top_p=0.9, seed=3))
    assert first == list(language.stream(embeds, 8, temperature=1.0, top_p=0.9, seed=3))
    assert first != list(language.stream(embeds, 8, temperature=1.0, top_p=0.9, seed=4))


def test_an_end_token_ends_the_answer(artefact, tmp_path):
    folder = artefact("float32")
    language, _ = torch_language(folder)
    embeds = language.embed(IDS)
    tokens = list(language.stream(embeds, 6))
    shutil.copytree(folder, tmp_path / "ends")
    config = json.loads((tmp_path / "ends/config.json").read_text())
    config["eos_token_id"] = [7, tokens[3]]
    (tmp_path / "ends/config.json").write_text(json.dumps(config))
    expected = tokens[: tokens.index(tokens[3])]
    for load in (torch_language, mlx_language):
        assert list(load(tmp_path / "ends")[0].stream(embeds, 6)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_tensors_are_listed_all_at_once(dtype, artefact, tmp_path):
    changes = {
        "language_model.model.norm.weight": None,
        "language_model.model.layers.0.input_layernorm.weight": lambda t: t[:-1].clone(),
        "language_model.model.layers.9.input_layernorm.weight": lambda _: torch.ones(64),
        "language_model.model.layers.0.mlp.up_proj.biases": None,
    }
    folder = edited(artefact("int4"), tmp_path / "two", **dict(list(changes.items())[:3]))
    with pytest.raises(UserError) as error:
        torch_language(folder, dtype)
    for part in ("norm.weight is missing", "layers.9.input_layernorm.weight is unexpected",
                 "layers.0.input_layernorm.weight is [63], expected [64]"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(UserError, match="mlx-lm refuses it"):
        mlx_language(folder)
    with pytest.raises(UserError, match=r"up_proj: unusable quantized weight"):
        torch_language(edited(artefact("int4"), tmp_path / "no biases", **dict(list(changes.items())[3:])), dtype)
    table = "language_model.model.embed_tokens"
    for number, (part, change, match) in enumerate([
        ("weight", None, "is missing"), ("biases", None, "unusable quantized weight"),
        ("weight", lambda t: t[:-1].clone(), "unusable quantized weight"),
    ]):  # fmt: skip
        with pytest.raises(UserError, match=f"embed_tokens.*{match}"):
            torch_language(edited(artefact("int4"), tmp_path / str(number), **{f"{table}.{part}": change}), dtype)


@pytest.mark.parametrize(
    ("name", "entry", "match"),
    [("int4", {"group_size": 64, "bits": 8}, "unusable quantized weight"),
     ("int4", {"bits": 4}, "unusable quantized weight"), ("int4", None, "unusable quantized weight"),
     ("int4", {"group_size": 32, "bits": 4, "mode": "mxfp6"}, "not one that runs here"),
     ("int4", {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "unusable quantized weight|biases is unexpected"),
     ("floats", {"language_model.model.embed_tokens": {"group_size": 64, "bits": 8, "mode": "mxfp8"}},
      "embed_tokens: unusable quantized weight")],
)  # fmt: skip
def test_a_config_that_contradicts_the_weights(name, entry, match, artefact, tmp_path):
    shutil.copytree(artefact(name), tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    entry = (config["quantization"] | entry) if name == "floats" else entry
    path.write_text(json.dumps(config | {"quantization": entry}))
    with pytest.raises(UserError, match=match):
        torch_language(tmp_path / "out")


def test_what_is_no_artefact(artefact, tmp_path, tiny_fast_vlm):
    with pytest.raises(UserError, match=r"config.json: no such file"):
        torch_language(tmp_path)
    with pytest.raises(UserError, match="not an artefact's"):
        torch_language(tiny_fast_vlm)
    shutil.copytree(artefact("fp16"), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "64"}))
    with pytest.raises(UserError, match="wrong type: hidden_size"):
        torch_language(tmp_path / "out")
    shutil.copy(artefact("fp16") / "config.json", path)
    (tmp_path / "out/multi_modal_projector.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        torch_language(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("name", "how", "limit"),
    [
        ("fp16", ("bfloat16",), 0.05),
        ("int4", ("bfloat16", "bfloat16", True), 0.05),
        ("floats", ("bfloat16",), 0.05),
        ("fp16", ("float32", "float32"), 1e-5),
        ("int4", ("float32", "bfloat16"), 0.02),
        ("floats", ("float32", "bfloat16", True), 0.05),
    ],
)
def test_for_speed_it_is_the_same_model(name, how, limit, tied, artefact):
    if how[2:] and not int8.AVAILABLE:
        pytest.skip("this processor or PyTorch has no 8-bit products (VNNI)")
    exact, fast = (torch_language(artefact(name, tied), *one)[0] for one in ((), how))
    embeds = exact.embed(IDS)  # the table stays as it is stored; its rows are those of the whole table
    given = torch.from_numpy(embeds).to(getattr(torch, how[0]))
    assert np.array_equal(fast.embed(IDS), given.float().numpy())
    (logits, past), (expected, kept) = fast.prefill(embeds), exact.prefill(embeds)
    assert 0 < relative(logits, expected) < limit
    token = embeds[:, 3:4].copy()
    assert 0 < relative(fast.prefill(token, past)[0], exact.prefill(token, kept)[0]) < limit
    assert relative(fast.prefill(embeds[:, ::-1].copy())[0], logits) > limit


@pytest.mark.parametrize("load", [torch_language, mlx_language])
def test_a_cache_rewound_and_prefilled_again_is_a_prefill_of_the_whole(load, artefact):
    language, _ = load(artefact("float32"))
    embeds = language.embed(IDS)
    whole, _ = language.prefill(embeds)
    logits, past = language.prefill(embeds[:, :20])
    assert relative(logits, language.logits(embeds)[0, 19]) < 1e-5
    assert relative(language.prefill(embeds[:, 20:], past)[0], whole) < 1e-5
    assert relative(language.prefill(embeds[:, 12:], language.rewind(past, 12))[0], whole) < 1e-5
    assert relative(language.prefill(embeds[:, 12:], language.rewind(past, 11))[0], whole) > 1e-3
