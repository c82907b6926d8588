"""`plan` of a Core AI bundle: each part against figures worked out by hand from the demo checkpoint's sizes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coreai", reason="Core AI's packages: make setup EXTRAS=coreai")

from app_bridge.memory import bundle
from fastvlm.common.errors import UserError
from fastvlm.synthetic.checkpoint import SHAPES

pytestmark = pytest.mark.slow

Cli = Callable[..., Any]
# Of the demo: 4 layers, 2 key-value heads of 32, 448 tokens, width 128, 256 pixels, 16 image tokens, 2048 positions.
POSITION = 2 * 4 * 2 * 32 * 2


def highest(parts: list[dict[str, Any]]) -> dict[str, int]:
    return {part["name"]: part["high"] for part in parts}


def test_a_bundles_parts(demo_bundle: Path, cli: Cli) -> None:
    answer = cli("plan", demo_bundle, "--device", "iphone-15-pro", "--json")
    found = answer.document
    assert answer.code == 0 and found["passed"] and found["bundle"] and "largest" not in found
    low, high = ({part["name"]: part[end] for part in found["parts"]} for end in ("low", "high"))
    for part, asset in (("decoder", "fastvlm"), ("embeddings", "embed"), ("encoder", "vision")):
        size = (demo_bundle / f"{asset}.aimodel" / "main.mlirb").stat().st_size
        assert (low[part], high[part]) == (size, 2 * size)
    assert low["KV cache"] == high["KV cache"] == POSITION * 2048
    assert high["logits"] == 2 * (16 + 18) * 448 * 2
    assert high["prompt"] == (2 * 34 + 16) * 128 * 2
    assert high["pictures"] == 48 * 256 * 256
    assert found["need"] == {"low": sum(low.values()), "high": sum(high.values())}
    answer = cli("plan", demo_bundle, "--device", "iphone-15-pro")
    assert "fits without the entitlement; with the entitlement it fits" in " ".join(answer.out.split())


def test_a_growing_cache_takes_what_is_used_and_both_sizes_while_it_grows(demo_bundle: Path) -> None:
    fixed = bundle.stored(demo_bundle)
    assert not fixed.shape.grows and (fixed.shape.layers, fixed.shape.head_dim) == (4, 32)
    grows = replace(fixed, shape=replace(fixed.shape, grows=True))
    (cache,) = (part for part in bundle.parts(grows, 18) if part["name"] == "KV cache")
    assert (cache["low"], cache["high"]) == (256 * POSITION, (1024 + 512) * POSITION)  # 34 and 512 more
    assert highest(bundle.parts(fixed, 1000))["logits"] == 2 * 1016 * 448 * 2
    with pytest.raises(UserError, match="more than the bundle's context"):
        bundle.parts(fixed, 2048)


def test_a_published_shape_is_planned_before_any_export(cli: Cli) -> None:
    found = cli("plan", "--shape", "0.5b", "--format", "coreai", "--device", "iphone-15-pro", "--json").document
    low = {part["name"]: part["low"] for part in found["parts"]}
    assert low["embeddings"] == 151936 * 896 * 2
    assert low["decoder"] / 1e9 == pytest.approx(0.988, abs=0.001)  # Qwen2-0.5B has 494 million parameters
    assert low["KV cache"] == 2 * 24 * 2 * 64 * 4096 * 2
    assert low["logits"] == 2 * 274 * 151936 * 2
    untied = bundle.planned(SHAPES["7b"]).weights
    assert untied["main"] + untied["embedding"] == pytest.approx(7.616e9 * 2, rel=0.001)


@pytest.mark.parametrize(
    "flags", [("--shape", "0.5b", "--format", "coreai", "--recipe", "fp16"), ("BUNDLE", "--format", "coreai")]
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], demo_bundle: Path, cli: Cli) -> None:
    given = [demo_bundle if flag == "BUNDLE" else flag for flag in flags]
    answer = cli("plan", *given, "--device", "iphone-15-pro")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
