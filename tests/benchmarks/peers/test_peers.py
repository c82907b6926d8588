"""The counted figures of peers.json against formulas and against the modules of Transformers and timm."""

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionModel,
    LlavaOnevisionProcessor,
)

from benchmarks.peers.command import DATA, compare, figures

CAMBRIAN, LLAVA = "cambrian-1-8b", "llava-onevision-0.5b"


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


WIDTHS = (384, 768, 1536, 3072)  # of ConvNeXt-XXL
TOWERS = vit(729, 1152, 4304, 27, 729) + vit(577, 1024, 4096, 23, 576) + vit(730, 1536, 4096, 40, 729, 3)
ADAPTERS = sum(
    count * (width * 1024 + 1024**2) for count, width in ((576, 1152), (576, 1024), (576, 1536), (9216, sum(WIDTHS)))
)


@pytest.mark.parametrize(
    ("name", "encode", "project", "prefill"),
    [
        (LLAVA, 10 * vit(729, 1152, 4304, 26, 729), 7290 * (1152 * 896 + 896**2),
         decoder(7371 + 18, 896, 4864, 24, 128, 151936)),
        (CAMBRIAN, TOWERS + convnext((3, 4, 30, 3), WIDTHS, 1024),
         ADAPTERS + 3 * sampler(1024) + 576 * (1024 * 4096 + 4096**2),
         decoder(618, 4096, 14336, 32, 1024, 128256) + 10 * sampler(4096)),
        ("fastvlm-0.5b", None, 256 * (3072 * 896 + 896**2), decoder(274, 896, 4864, 24, 128, 151936)),
        ("fastvlm-7b", None, 256 * (3072 * 3584 + 3584**2), decoder(274, 3584, 18944, 28, 512, 152064)),
    ],
)  # fmt: skip
def test_macs_are_those_of_formulas(name, encode, project, prefill):
    macs = {stage: sum(kinds.values()) for stage, kinds in figures(name)["macs"].items()}
    assert (encode in (None, macs["encode"]), macs["project"], macs["prefill"]) == (True, project, prefill)
    longer = {stage: sum(kinds.values()) for stage, kinds in figures(name, 19)["macs"].items()}
    assert {stage for stage in macs if longer[stage] != macs[stage]} == {"prefill"}


def test_llava_onevision_and_fastvithd_are_the_modules_of_transformers_and_timm():
    """Sizes and work on the meta device, pictures and tokens by the processor."""
    with torch.device("meta"):
        llava = LlavaOnevisionModel(LlavaOnevisionConfig()).requires_grad_(False).vision_tower
        fast = timm.create_model("fastvit_mci3", pretrained=False, num_classes=0, inference_mode=True).eval()
        pixels = torch.empty(10, 3, 384, 384), torch.empty(1, 3, 1024, 1024)
    for name, encode, picture in ((LLAVA, llava, pixels[0]), ("fastvlm-0.5b", fast.forward_features, pixels[1])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encode(picture)
        model = llava if name == LLAVA else fast
        assert sum(one.numel() for one in model.parameters()) == figures(name)["encoder_parameters"]
        assert counter.get_total_flops() // 2 == sum(figures(name)["macs"]["encode"].values())

    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil()
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    tiles = processor.image_processor(np.zeros((1152, 1152, 3), np.uint8), return_tensors="np")["pixel_values"]
    assert tiles.shape == (1, figures(LLAVA)["pictures"], 3, 384, 384)
    assert figures(LLAVA)["visual_tokens"] == processor._get_number_of_features(1152, 1152, 384, 384) == 7371


def test_figures_are_those_that_were_published():
    sizes = {
        one["name"]: round(one["parameters_whole"] / 1e6, 1)
        for name in (CAMBRIAN, "fastvlm-0.5b", "fastvlm-7b")
        for one in figures(name)["encoders"]
    }
    # timm's table of results for SigLIP, CLIP's and DINOv2's model cards, FastVLM's paper
    assert sizes == {
        "SigLIP-so400m/14@384": 428.2,
        "CLIP ViT-L/14@336": 303.5,
        "DINOv2 ViT-g/14@378": 1136.5,
        "OpenCLIP ConvNeXt-XXL@1024": 843.4,
        "FastViTHD@1024": 125.1,
    }
    assert figures(CAMBRIAN)["visual_tokens"] == 576 + 24 and figures("fastvlm-7b")["visual_tokens"] == 256
    parts = [part for model in DATA["models"].values() for part in model["encoders"]]
    claims = [claim for one in DATA["comparisons"].values() for claim in one["claims"].values()]
    assert all(len(part["source"]) > 10 for part in (*parts, *claims))


def test_ratios_stand_beside_claimed_ones():
    found = compare(LLAVA)
    rows = {row["figure"]: row for row in found["rows"]}
    assert rows["encoder_parameters_whole"]["ratio"] == pytest.approx(3.42, abs=0.01)
    assert rows["encoder_parameters_whole"]["claimed"] == 3.4
    assert rows["macs"]["ratio"] == pytest.approx(20.5, abs=0.05)
    assert (rows["ttft_paper"]["ratio"], rows["ttft_paper"]["claimed"]) == (None, 85)
    assert "20.5 times the multiply-accumulates" in found["explanation"][0]
    assert "2412.13303" in found["explanation"][-1]


def test_the_command(cli):
    (found,) = cli("peers", LLAVA, "--json").document["comparisons"]
    assert found == compare(LLAVA)
    plain = cli("peers").out
    assert plain.count("\n\n") == 1 and not plain.startswith("\n"), "an empty line between the two tables"
    assert "7,371" in plain and "85 ×" in plain and "7.9 ×" in plain
    for words, said in ((["llava"], f"PEER: got llava, expected one of {LLAVA}"), (["--prompt-length", "0"], "got 0")):
        wrong = cli("peers", *words)
        assert wrong.code == 2 and said in wrong.err
