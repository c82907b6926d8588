import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.__main__ import build_parser
from benchmarks.peers import claims, models, modules, shapes
from benchmarks.ttft.figures import compare_peers
from benchmarks.ttft.runner import stages_of
from fastvlm.common.cli import run

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 200,
}  # fmt: skip
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(name):
    """A model's shape, reduced: the same code, quick."""
    shape = copy.deepcopy(shapes.data()["models"][name])
    shape["text"]["config"] |= TEXT
    for encoder in shape["encoders"]:
        encoder["config"] |= {
            "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
            "fastvit": {"layers": [1, 1, 2, 1, 1], "embed_dims": [8, 16, 32, 64, 128]},
        }.get(encoder["kind"], VIT)
        if encoder["kind"] in ("convnext", "fastvit"):
            encoder["resolution"] = 128
        elif encoder["kind"] == "dinov2":  # positions interpolated, as those of the real one are
            encoder["resolution"] = 42
        if "side" in encoder:
            encoder["side"] = 8 if encoder["kind"] == "convnext" else 2
    if name == "llava-onevision-0.5b":
        shape["image_size"], shape["connector"]["grid"] = 84, [[28, 28], [56, 56], [84, 84]]
    if name == "cambrian-1-8b":
        shape["connector"] |= {"width": 32, "heads": 4, "side": 2, "depth": 2, "layers": 2, "stride": 2}
    return shape


def opened(name):
    return models.open_peer(tiny(name), 5, "float32", "cpu")


def answer(peer):
    state = {}
    for stage in claims.STAGES:
        getattr(peer, stage)(state)
    return state


# What they cost: by formula, and by counting torch's operations


def vit(tokens, hidden, inner, layers, patches, projections=2):
    layer = 4 * tokens * hidden**2 + projections * tokens * hidden * inner + 2 * tokens**2 * hidden
    return layers * layer + patches * 3 * 14 * 14 * hidden


def decoder(tokens, hidden, inner, layers, keys, vocabulary):
    linear = tokens * (2 * hidden**2 + 2 * hidden * keys + 3 * hidden * inner)
    attention = 2 * hidden * tokens * (tokens + 1) // 2
    return layers * (linear + attention) + hidden * vocabulary


def sampler(query):
    """One layer of Cambrian's connector: 576 queries on 3 x 1 + 16 windows, width 1024."""
    mixed = 576 * 1024 * ((query + 1024) + 1024 + 1024 + (1024 + query)) + 1024**2  # in, query, out, MLP; context
    return mixed + 2 * 576 * 19 * 1024**2 + 2 * 576 * 19 * 1024


def convnext(depths, widths, size):
    side, total, before = size // 4, 0, 3
    for stage, (depth, width) in enumerate(zip(depths, widths)):
        kernel = 4 if stage == 0 else 2
        side = side if stage == 0 else side // 2
        total += side**2 * kernel**2 * before * width + depth * side**2 * (49 * width + 8 * width**2)
        before = width
    return total


def test_macs_of_llava_onevision_are_those_of_its_formulas():
    found = claims.figures("llava-onevision-0.5b", 18)

    assert claims.total_macs(found, "encode") == 10 * vit(729, 1152, 4304, 26, 729)
    assert claims.total_macs(found, "project") == 7290 * (1152 * 896 + 896**2)
    assert claims.total_macs(found, "prefill") == decoder(7371 + 18, 896, 4864, 24, 128, 151936)
    assert claims.total_macs(found) == sum(claims.total_macs(found, stage) for stage in claims.STAGES)


def test_macs_of_cambrian_are_those_of_its_formulas():
    found = claims.figures("cambrian-1-8b", 18)
    widths = (384, 768, 1536, 3072)
    towers = vit(729, 1152, 4304, 27, 729) + vit(577, 1024, 4096, 23, 576) + vit(730, 1536, 4096, 40, 729, 3)
    adapters = sum(
        count * (width * 1024 + 1024**2)
        for count, width in ((576, 1152), (576, 1024), (576, 1536), (9216, sum(widths)))
    )

    assert claims.total_macs(found, "encode") == towers + convnext((3, 4, 30, 3), widths, 1024)
    assert claims.total_macs(found, "project") == adapters + 3 * sampler(1024) + 576 * (1024 * 4096 + 4096**2)
    assert claims.total_macs(found, "prefill") == decoder(618, 4096, 14336, 32, 1024, 128256) + 10 * sampler(4096)


def test_more_text_costs_more_and_only_in_prefill():
    short, long = (claims.figures("fastvlm-0.5b", length) for length in (18, 19))

    assert claims.total_macs(short, "encode") == claims.total_macs(long, "encode")
    assert claims.total_macs(long, "prefill") == decoder(275, 896, 4864, 24, 128, 151936)
    assert claims.total_macs(short, "prefill") == decoder(274, 896, 4864, 24, 128, 151936)


def test_an_operation_without_a_kind_is_not_left_out():
    with pytest.raises(KeyError, match="_scaled_mm"):
        claims.by_operation({"aten._scaled_mm": 2})


def test_encoders_have_their_published_sizes():
    sizes = {
        one["name"]: round(one["parameters_whole"] / 1e6, 1)
        for name in ("cambrian-1-8b", "fastvlm-0.5b")
        for one in claims.figures(name, 18)["encoders"]
    }

    # timm's table of results for SigLIP, CLIP's and DINOv2's model cards, FastVLM's paper
    assert sizes == {
        "SigLIP-so400m/14@384": 428.2,
        "CLIP ViT-L/14@336": 303.5,
        "DINOv2 ViT-g/14@378": 1136.5,
        "OpenCLIP ConvNeXt-XXL@1024": 843.4,
        "FastViTHD@1024": 125.1,
    }


def test_visual_tokens_are_those_of_transformers_processor():
    from transformers import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil()
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    pixels = processor.image_processor(np.zeros((1152, 1152, 3), np.uint8), return_tensors="np")["pixel_values"]
    found = claims.figures("llava-onevision-0.5b", 18)

    assert found["visual_tokens"] == processor._get_number_of_features(1152, 1152, 384, 384) == 729 * 10 + 81
    assert pixels.shape == (1, found["pictures"], 3, 384, 384)
    assert claims.figures("fastvlm-0.5b", 18)["visual_tokens"] == 256
    assert claims.figures("cambrian-1-8b", 18)["visual_tokens"] == 576 + 24


# What they compute


def test_llava_onevisions_stages_are_transformers_model():
    peer = opened("llava-onevision-0.5b")
    model = peer.model
    model.config.image_token_id = 199
    state = answer(peer)
    ids = torch.tensor([[0, *[199] * len(state["projected"]), 1, 2, 3, 4]])

    def logits(tiles):
        sizes = torch.tensor([[84, 84]])
        with torch.inference_mode():
            return model(input_ids=ids, pixel_values=tiles[None], image_sizes=sizes).logits[0, -1]

    assert len(peer.pixels[0]) == 10 and state["projected"].shape == (10 * 4 + 6, 32)
    torch.testing.assert_close(state["logits"], logits(peer.pixels[0]))
    assert (state["logits"] - logits(peer.pixels[0].flip(0))).abs().max() > 1e-3


def test_a_sampler_layer_is_attention_of_each_query_on_its_own_windows():
    layer = modules.SamplerLayer(12, 8, 2, [1, 2])
    query, context = torch.randn(3, 1, 12), torch.randn(1, 1, 8)
    latents = [torch.randn(3, 1, 8), torch.randn(3, 4, 8)]
    nn.init.normal_(layer.positions[0])

    with torch.no_grad():
        got = layer(query, context, latents)
        for one in range(3):
            seen = [latents[0][one], latents[1][one] + layer.positions[0]]
            keys = torch.cat([make(part) for make, part in zip(layer.keys, seen)])
            values = torch.cat([make(part) for make, part in zip(layer.values, seen)])
            hidden = layer.proj_in(torch.cat([query[one, 0], layer.proj_context(context[0, 0])]))
            asked = layer.query(hidden)
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weight = torch.softmax(keys[:, head] @ asked[head] / 2, 0)
                heads.append(weight @ values[:, head])
            hidden = layer.norm(hidden + layer.out(torch.cat(heads)))
            torch.testing.assert_close(got[one, 0], query[one, 0] + layer.proj_out(hidden))


def test_windows_hold_what_lies_in_them():
    grid = torch.arange(36.0).view(1, 36, 1)

    assert modules.windows(grid, 3)[:, :, 0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert modules.windows(grid, 3)[8, :, 0].tolist() == [28, 29, 34, 35]
    assert modules.windows(grid, 6).shape == (36, 1, 1)


def test_cambrian_looks_again_inside_the_decoder():
    peer = opened("cambrian-1-8b")
    state = answer(peer)
    for one in peer.model["inner"]:
        nn.init.zeros_(one.proj_out[2].weight)
    silent = answer(peer)
    text = peer.language.get_input_embeddings()(peer.ids)
    for layer in peer.language.model.layers:
        layer._forward_hooks.clear()
    plain = peer.language(inputs_embeds=torch.cat([text[:1], silent["projected"], text[1:]])[None]).logits[0, -1]

    assert [tuple(one.shape) for one in state["encoded"]] == [(1, 4, 16)] * 3 + [(1, 64, 56)]
    assert state["projected"].shape == (2 * 3, 32)
    torch.testing.assert_close(silent["logits"], plain)
    assert (state["logits"] - plain).abs().max() > 1e-3


def test_shared_layers_compute_what_equal_layers_do():
    peer = opened("fastvlm-7b")
    shared = answer(peer)
    first, *others = peer.language.model.layers
    memory = {parameter.data_ptr() for layer in others for parameter in layer.parameters()}
    for layer in others:
        for part in layer.modules():
            part._parameters.update(
                {name: nn.Parameter(one.clone()) for name, one in part._parameters.items() if one is not None}
            )
    apart = answer(peer)

    assert memory == {parameter.data_ptr() for parameter in first.parameters()}
    torch.testing.assert_close(shared["logits"], apart["logits"])
    nn.init.normal_(others[0].mlp.down_proj.weight)
    assert (answer(peer)["logits"] - apart["logits"]).abs().max() > 1e-3


def test_nothing_is_left_on_the_meta_device():
    for name in shapes.data()["models"]:
        peer = opened(name)
        values = [*peer.model.parameters(), *peer.model.buffers()]
        assert not any(value.is_meta for value in values)
        assert torch.isfinite(answer(peer)["logits"]).all()


# What is said of them


def runner(name, encode, prefill, **more):
    rounds = [{"stages": {"encode": encode * scale, "project": 0.5, "prefill": prefill}} for scale in (1, 1, 100)]
    cold = {"dropped": False}
    kind = "peer" if name.startswith("peer:") else "artefact"
    launches = [{"load_s": None, "rounds": rounds}]
    return {"name": name, "kind": kind, "launches": launches, "cold": cold, "peak_bytes": 1, **more}


def document(runners, checkpoint="synthetic-0.5b", resolution=1024):
    point = {"resolution": resolution, "text_tokens": None, "runners": runners}
    return {"checkpoint": {"name": checkpoint}, "tokens": 16, "points": [point]}


LLAVA = [runner("peer:fastvlm-0.5b", 1.0, 0.5), runner("peer:llava-onevision-0.5b", 20.0, 19.5)]


def rows(found):
    return {row["figure"]: row for row in found["rows"]}


def test_measured_ratios_stand_beside_claimed_ones():
    (found,) = compare_peers(document([*LLAVA, runner("fp16/executor-auto", 0.3, 0.2), runner("slow", 9.0, 9.0)]))

    ttft, size = rows(found)["ttft_paper"], rows(found)["encoder_parameters_whole"]
    assert (ttft["fastvlm"], ttft["peer"], ttft["ratio"], ttft["claimed"]) == (2.0, 40.0, 20.0, 85)
    assert size["ratio"] == pytest.approx(3.42, abs=0.01) and size["claimed"] == 3.4
    assert "2412.13303" in ttft["source"] and found["error"] is None
    fastest = rows(found)["ttft_fastest"]
    assert "fp16/executor-auto" in fastest["label"] and fastest["ratio"] == pytest.approx(40.0)
    said = " ".join(found["explanation"])
    assert "Measured here: 20.0 times" in said and "85 times that is 14.2 s" in said and "10 tiles" in said
    json.dumps(found)


def test_only_a_sound_runner_of_the_same_shape_and_resolution_stands_beside_a_peer():
    own = runner("fp16/executor-auto", 0.3, 0.2)
    failed = runner("fp16/a", 0.1, 0.1, error="killed")
    failed["launches"].append({"load_s": 1.0, "rounds": []})
    others = [document([*LLAVA, own], "synthetic-7b"), document([*LLAVA, own], resolution=512), document(LLAVA)]
    for other in (*others, document([*LLAVA, failed])):
        assert "ttft_fastest" not in rows(compare_peers(other)[0])
    assert "fp16/executor-auto" in rows(compare_peers(document([*LLAVA, failed, own]))[0])["ttft_fastest"]["label"]
    assert compare_peers(document([own])) == []


def test_a_peer_that_failed_is_reported_without_figures():
    failed = {"name": "peer:llava-onevision-0.5b", "kind": "peer", "error": "out of memory"}
    (comparison,) = compare_peers(document([LLAVA[0], failed]))

    assert comparison["error"] == "peer:llava-onevision-0.5b: out of memory"
    assert rows(comparison)["ttft_paper"]["ratio"] is None and rows(comparison)["ttft_paper"]["claimed"] == 85
    assert not any("Measured here" in line for line in comparison["explanation"])


def test_a_runner_of_the_instrument(monkeypatch):
    monkeypatch.setitem(shapes.data()["models"], "fastvlm-0.5b", tiny("fastvlm-0.5b"))
    peer = models.open_runner({"kind": "peer", "model": "fastvlm-0.5b", "text_tokens": None, "keep_buffers": True})
    state = answer(peer)

    assert [name for name, _ in stages_of(peer)] == ["encode", "project", "prefill"]
    assert peer.settings["dtype"] == "bfloat16" and "random" in peer.settings["weights"]
    assert len(peer.ids) == 18 and np.asarray(state["logits"]).dtype == np.float32  # the runner keeps it so


@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_fastvlm_here_is_fastvlm_elsewhere(size):
    from fastvlm.synthetic.checkpoint import SHAPES

    shape, text = SHAPES[size], shapes.data()["models"][f"fastvlm-{size}"]["text"]["config"]
    ours = (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate, shape.vocab, shape.tied)

    assert ours == tuple(text[key] for key in (*TEXT, "tie_word_embeddings"))


def test_every_figure_has_its_source():
    found = shapes.data()
    parts = [
        part for shape in found["models"].values() for part in (*shape["encoders"], shape["connector"], shape["text"])
    ]
    for part in (*parts, *(claim for one in found["claims"].values() for claim in one), found["plot"]):
        assert len(part["source"]) > 10


def test_the_command(capsys):
    assert run(build_parser, ["peers", "llava-onevision-0.5b", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["comparisons"]
    assert rows(found)["visual_tokens"]["peer"] == 7371
    assert run(build_parser, ["peers", "llava-onevision-0.5b"]) == 0
    assert "7,371" in (shown := capsys.readouterr().out) and "85 ×" in shown
    assert run(build_parser, ["peers", "llava", "--prompt-length", "0"]) == 2
    error = capsys.readouterr().err
    assert "expected one of llava-onevision-0.5b, cambrian-1-8b" in error and "--prompt-length: got 0" in error
