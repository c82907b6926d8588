"""The MLX folder: its names, its bytes against MLX's own, its loaders, and what is refused."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.checkpoint.checkpoint import open_checkpoint
from fastvlm.checkpoint.weights import Weights
from fastvlm.common import threads
from fastvlm.common.errors import UserError
from fastvlm.model.build import build
from fastvlm.synthetic import checkpoint as synthetic
from model_export import contract
from model_export.language import llm
from model_export.language.config import language_config
from model_export.language.llm import bytes_to_read, export_llm
from quantization.recipe import load_recipe, recipe_from_json
from tests.helpers import contents, relative, with_tensors

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def float32_recipe(bits: int | None = None, projector: int | None = None):
    """No rounding of activations in the way: for comparisons to float32's accuracy."""
    rules = [{"pattern": "*", "scheme": {"dtype": "float32"}}]
    for pattern, width in (("language_model.*_proj.weight", bits), ("*embed_tokens.weight", bits),
                           ("*lm_head.weight", bits), ("multi_modal_projector.*.weight", projector)):  # fmt: skip
        if width:
            scheme = {"mode": "affine", "bits": width, "group_size": 32, "dtype": "float32"}
            rules.insert(0, {"pattern": pattern, "scheme": scheme})
    return recipe_from_json({"name": "float32", "version": 2, "rules": rules})


def exported(source: Path, recipe, folder: Path, **options) -> dict:
    folder.mkdir(parents=True)
    return export_llm(open_checkpoint(source), recipe, folder, **options)


def app_weights(folder: Path) -> dict[str, mx.array]:
    """What the demo app's loader sees: every *.safetensors below the folder."""
    weights: dict[str, mx.array] = {}
    for path in folder.rglob("*.safetensors"):
        loaded = mx.load(str(path))
        assert not set(weights) & set(loaded)
        weights |= loaded
    return weights


def raw(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


def canonical(name: str) -> str:
    """The checkpoint's name of an artefact's weight."""
    if name.startswith("multi_modal_projector."):
        return "model." + name.replace("linear_0", "linear_1")
    return name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "model.language_model.")


def expected_keys(layers: int, tied: bool, quantized: bool) -> set[str]:
    """The app's module tree, from FastVLM.swift."""
    matrices = [f"language_model.model.layers.{i}.{linear}" for i in range(layers) for linear in LINEARS]
    matrices += ["language_model.model.embed_tokens"] + ([] if tied else ["language_model.lm_head"])
    keys = {f"{m}.{part}" for m in matrices for part in ("weight", *(("scales", "biases") if quantized else ()))}
    keys |= {f"language_model.model.layers.{i}.self_attn.{x}_proj.bias" for i in range(layers) for x in "qkv"}
    norms = ("input_layernorm", "post_attention_layernorm")
    keys |= {f"language_model.model.layers.{i}.{norm}.weight" for i in range(layers) for norm in norms}
    return keys | {"language_model.model.norm.weight", *contract.PROJECTOR_KEYS}


@pytest.fixture(scope="module")
def tied_shards(make_checkpoint):
    return make_checkpoint(form="training", tied=True, dtype="bfloat16", shards=3)


@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_keys_and_bytes(name, tied, tiny_fast_vlm, tied_shards, tmp_path):
    """Every key that the app's module tree has and no other; every value as MLX itself would store it."""
    source = tied_shards if tied else tiny_fast_vlm
    facts = exported(source, load_recipe(name), tmp_path / "out")
    weights, checkpoint = app_weights(tmp_path / "out"), open_checkpoint(source)
    bits = {"int8": 8, "int4": 4}.get(name)
    assert set(weights) == expected_keys(2, tied, quantized=bits is not None)
    dtype = mx.bfloat16 if name == "bf16" else mx.float16
    extra = {key for key in weights if key.endswith((".scales", ".biases"))}
    for key, stored in weights.items():
        if key in extra:
            continue
        value = mx.array(checkpoint.read(canonical(key)).float().numpy()).astype(dtype)
        module = key.removesuffix(".weight")
        if f"{module}.scales" in weights:
            parts = (stored, weights[f"{module}.scales"], weights[f"{module}.biases"])
            for ours, theirs in zip(parts, mx.quantize(value, 64, bits), strict=True):
                assert ours.dtype == theirs.dtype and raw(ours) == raw(theirs), key
        else:
            assert stored.dtype == dtype and raw(stored) == raw(value), key
    assert facts["bytes"] == sum(array.nbytes for array in weights.values())
    assert facts["bytes"] == llm.planned_bytes(checkpoint, load_recipe(name))
    assert facts["parameters"] == sum(checkpoint.tensors[canonical(key)].size for key in weights if key not in extra)
    assert facts["quantization"] == ({"group_size": 64, "bits": bits} if bits else None)
    assert set(facts["decisions"]) == {"layers", "embeddings", "lm_head", "projector"}


def test_config_is_what_the_app_decodes(tiny_fast_vlm, tied_shards, tmp_path):
    for tied, source in ((False, tiny_fast_vlm), (True, tied_shards)):
        exported(source, load_recipe("int4"), tmp_path / str(tied))
        config = json.loads((tmp_path / str(tied) / "config.json").read_text())
        for key, kind in contract.CONFIG_REQUIRED.items():
            assert type(config[key]) is kind, key
        assert config["model_type"] == "llava_qwen2" and "rope_scaling" not in config
        assert config["tie_word_embeddings"] is tied
        assert config["quantization"] == {"group_size": 64, "bits": 4}
        assert config["image_token_index"] == open_checkpoint(source).image_token_id
        assert config["rope_theta"] == 1e6 and config["rms_norm_eps"] == 1e-6
        text = json.loads((source / "config.json").read_text())["text_config"]
        assert config["max_position_embeddings"] == text["max_position_embeddings"]
        assert config["mm_vision_tower"] == "mobileclip_l_128" and config["mm_hidden_size"] == 256


def test_same_bytes_again_from_either_layout_and_any_sharding(tiny_fast_vlm, tiny_llava, make_checkpoint, tmp_path, monkeypatch):  # fmt: skip  # noqa: E501
    """The same model in the other layout, in shards, in a .bin file, and in other pieces: the same weights."""
    before = contents(tiny_fast_vlm)
    exported(tiny_fast_vlm, load_recipe("int4"), tmp_path / "a")
    exported(tiny_fast_vlm, load_recipe("int4"), tmp_path / "again")
    assert contents(tiny_fast_vlm) == before
    exported(tiny_llava, load_recipe("int4"), tmp_path / "llava")
    monkeypatch.setattr(llm, "_CHUNK", 500)
    exported(make_checkpoint(shards=3), load_recipe("int4"), tmp_path / "shards")
    (old := tmp_path / "old").mkdir()  # a .bin file, as checkpoints once were
    torch.save(load_file(tiny_fast_vlm / "model.safetensors"), old / "pytorch_model.bin")
    for file in tiny_fast_vlm.glob("*.json"):
        shutil.copy(file, old)
    exported(old, load_recipe("int4"), tmp_path / "from bin")
    first = contents(tmp_path / "a")
    assert contents(tmp_path / "again") == first == contents(tmp_path / "shards") == contents(tmp_path / "from bin")
    llava = contents(tmp_path / "llava")
    assert llava.pop("config.json") != first.pop("config.json")  # the other layout's default is to pad
    assert llava == first


def test_progress_adds_up(tiny_fast_vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "_CHUNK", 1000)
    seen: list[int] = []
    exported(tiny_fast_vlm, load_recipe("int4"), tmp_path / "out", advance=seen.append)
    assert sum(seen) == bytes_to_read(open_checkpoint(tiny_fast_vlm), load_recipe("int4")) and len(seen) > 50


def most_alive(source: Path, folder: Path, chunk: int) -> int:
    """The most bytes that have been read and not yet dropped at any time of an export in pieces of `chunk` values."""
    sizes: dict[int, int] = {}
    most, original = [0], Weights.rows

    def read(self: Weights, *arguments) -> np.ndarray:
        part = original(self, *arguments)
        sizes[id(part)] = part.nbytes
        weakref.finalize(part, sizes.pop, id(part))
        most[0] = max(most[0], sum(list(sizes.values())))
        return part

    checkpoint = open_checkpoint(source)
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "rows", read)
        patch.setattr(llm, "_CHUNK", chunk)
        export_llm(checkpoint, load_recipe("int4"), folder)
    return most[0]


def test_memory_does_not_depend_on_the_models_size(tiny_fast_vlm, make_checkpoint, tmp_path, monkeypatch):
    large = dataclasses.replace(synthetic.SHAPES["tiny"], layers=4, intermediate=1024)
    monkeypatch.setitem(synthetic.SHAPES, "large", large)
    models = {"small": tiny_fast_vlm, "large": make_checkpoint(shape="large")}
    bound = 2 * threads.count() * 1024 * 4  # each worker's piece, and its result until it is taken
    for name, source in models.items():
        assert most_alive(source, tmp_path / name, 1024) <= bound
    # the control: in pieces as large as the weights, the larger model takes more
    small, large = (most_alive(source, tmp_path / f"{name} whole", 1 << 30) for name, source in models.items())
    assert bound < small and large > small


@pytest.mark.parametrize("recipe", [load_recipe("int4"), float32_recipe(4, 8)], ids=["int4", "mixed"])
def test_shards(recipe, tiny_fast_vlm, tmp_path, monkeypatch):
    exported(tiny_fast_vlm, recipe, tmp_path / "one")
    monkeypatch.setattr(llm, "SHARD_BYTES", 30_000)
    exported(tiny_fast_vlm, recipe, tmp_path / "many")
    index = json.loads((tmp_path / "many" / contract.WEIGHTS_INDEX).read_text())
    one, many = app_weights(tmp_path / "one"), app_weights(tmp_path / "many")
    assert set(index["weight_map"]) == set(one) == set(many)
    assert all(raw(one[key]) == raw(many[key]) for key in one)
    for key, file in index["weight_map"].items():
        assert key in mx.load(str(tmp_path / "many" / file))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in many.values())
    assert len(list((tmp_path / "many").glob("model-0*-of-0*.safetensors"))) > 3
    assert mlx_lm_logits(tmp_path / "many").tolist() == mlx_lm_logits(tmp_path / "one").tolist()


IDS = np.random.default_rng(0).integers(0, 500, (1, 24))


def mlx_lm_logits(folder: Path) -> np.ndarray:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder, model_config={"model_type": "qwen2_vl"})  # strict: no key missing, none left over
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def hf_logits(source: Path) -> np.ndarray:
    model = build(open_checkpoint(source))
    with torch.inference_mode():
        hidden = model.model.language_model(input_ids=torch.from_numpy(IDS)).last_hidden_state
        return model.lm_head(hidden).numpy()


def test_mlx_lm_computes_the_checkpoints_logits(tiny_fast_vlm, make_checkpoint, tmp_path):
    """Unmodified mlx-lm over the folder against Transformers over the checkpoint, in float32: both round only there."""
    for number, source in enumerate((tiny_fast_vlm, make_checkpoint(tied=True))):
        exported(source, float32_recipe(), tmp_path / str(number))
        expected = hf_logits(source)
        assert relative(mlx_lm_logits(tmp_path / str(number)), expected) < 1e-5
    down = "language_model.model.layers.1.mlp.down_proj.weight"  # the negative control: one value of one weight
    folder = with_tensors(tmp_path / "0", tmp_path / "perturbed", lambda weights: weights[down][3, 5].add_(0.05))
    assert relative(mlx_lm_logits(folder), hf_logits(tiny_fast_vlm)) > 1e-4


def damaged(source: Path, target: Path, **changes: float) -> Path:
    """A copy of a checkpoint with one value of some weights replaced."""

    def put(weights):
        for name, value in changes.items():
            weights[name].view(-1)[7] = value

    return with_tensors(source, target, put)


def test_values_that_float16_cannot_hold(tiny_fast_vlm, tmp_path):
    up, norm = "model.language_model.layers.1.mlp.up_proj.weight", "model.language_model.norm.weight"
    source = damaged(tiny_fast_vlm, tmp_path / "big", **{up: 70000.0, norm: -1e5})
    for name in ("fp16", "int4"):
        with pytest.raises(UserError) as error:
            exported(source, load_recipe(name), tmp_path / name)
        message = str(error.value)
        assert "language_model.model.layers.1.mlp.up_proj.weight: largest value 7e+04 is past float16's" in message
        assert "language_model.model.norm.weight: largest value 1e+05 is past float16's 6.55e+04" in message
        assert not (tmp_path / name / "config.json").exists()
    exported(source, load_recipe("bf16"), tmp_path / "bf16")
    exported(damaged(tiny_fast_vlm, tmp_path / "fits", **{up: 65504.0}), load_recipe("fp16"), tmp_path / "exact")


def test_values_that_are_not_finite(tiny_fast_vlm, tmp_path):
    up, bias = "model.language_model.layers.0.mlp.up_proj.weight", "model.multi_modal_projector.linear_1.bias"
    source = damaged(tiny_fast_vlm, tmp_path / "nan", **{up: float("nan"), bias: float("-inf")})
    with pytest.raises(UserError) as error:
        exported(source, load_recipe("int8"), tmp_path / "out")
    assert "layers.0.mlp.up_proj.weight: values are not finite" in str(error.value)
    assert "multi_modal_projector.linear_0.bias: values are not finite" in str(error.value)


def test_a_recipe_that_does_not_fit_writes_nothing(tiny_fast_vlm, tmp_path):
    scheme = {"mode": "affine", "bits": 4, "group_size": 128, "dtype": "float16"}
    recipe = recipe_from_json({
        "name": "wide", "version": 2,
        "rules": [{"pattern": "*_proj.weight", "scheme": scheme}, {"pattern": "*.layer.*", "scheme": scheme},
                  {"pattern": "*", "scheme": {"dtype": "float16"}}],
    })  # fmt: skip
    with pytest.raises(UserError) as error:
        exported(tiny_fast_vlm, recipe, tmp_path / "out")
    assert "layers.0.self_attn.q_proj.weight [64, 64]: rows of 64 do not divide into affine's groups of 128" in str(
        error.value
    )
    assert "layers.1.mlp.up_proj.weight [128, 64]" in str(error.value)
    assert "down_proj" not in str(error.value)
    assert "rule 2 matches no weight: '*.layer.*'" in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_models_that_the_loaders_do_not_compute(tiny_fast_vlm, tmp_path):
    shutil.copytree(tiny_fast_vlm, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "hidden_act": "gelu"}
    config["text_config"]["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        exported(tmp_path / "in", load_recipe("fp16"), tmp_path / "out")
    with pytest.raises(UserError, match="sliding-window"):
        llm.planned_bytes(open_checkpoint(tmp_path / "in"), load_recipe("fp16"))
    for part in ("sliding-window attention is True", "activation is 'gelu', expected 'silu'", "'linear'"):
        assert part in str(error.value)
    assert not list((tmp_path / "out").iterdir())


SCALINGS = [
    {"rope_type": "linear", "factor": 2.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "beta_slow": 2}
    | {"mscale": 0.7, "mscale_all_dim": 0.3},
    {"type": "yarn", "factor": 4.0, "mscale": 0.7},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
]


def with_scaling(source, target, scaling):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["rope_scaling"] = scaling
    (target / "config.json").write_text(json.dumps(config))
    return open_checkpoint(target)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.get("type", scaling.get("rope_type")))
def test_rope_scaling_is_carried_to_the_loader_that_computes_it(tiny_fast_vlm, tmp_path, scaling):
    """Oracle: mlx-lm's rotation, from the exported config.json alone, against Transformers'."""
    from mlx_lm.models.rope_utils import initialize_rope
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

    checkpoint = with_scaling(tiny_fast_vlm, tmp_path / "in", scaling)
    config = language_config(checkpoint, "mlx-vlm")
    text, queries = checkpoint.hf_config.text_config, torch.randn(1, 4, 300, 16)
    rotary = Qwen2RotaryEmbedding(text)(queries, torch.arange(300)[None])
    expected = apply_rotary_pos_emb(queries, queries, *rotary)[0]
    limit = config["max_position_embeddings"]

    def rotated(scaling):
        rope = initialize_rope(16, config["rope_theta"], False, scaling, limit)
        return torch.from_numpy(np.array(rope(mx.array(queries.numpy()))))

    assert (rotated(config["rope_scaling"]) - expected).abs().max() < 2e-4
    assert (rotated(None) - expected).abs().max() > 0.1
    with pytest.raises(UserError, match="rotary position encoding is"):
        language_config(checkpoint, "app")


@pytest.mark.parametrize("more", [{"attention_factor": 1.5}, {"truncate": False}])
def test_rope_scaling_that_no_loader_reads_is_refused(tiny_fast_vlm, tmp_path, more):
    checkpoint = with_scaling(tiny_fast_vlm, tmp_path / "in", SCALINGS[1] | more)
    with pytest.raises(UserError, match=f"'yarn' has {next(iter(more))}, which mlx-vlm doesn't read"):
        language_config(checkpoint, "mlx-vlm")


def test_disk_full_is_an_error_of_the_system(tiny_fast_vlm, tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_space, raising=False)
    with pytest.raises(OSError, match="No space"):
        exported(tiny_fast_vlm, load_recipe("fp16"), tmp_path / "out")
