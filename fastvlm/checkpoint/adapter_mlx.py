"""MLX's adapters, of mlx-lm and mlx-vlm: adapter_config.json beside adapters.safetensors.

The formulas are those of `fuse` in mlx_lm/tuner/lora.py and dora.py (0.32): factors are stored the other way round than
PEFT's, and `scale` is what their product is multiplied by. Older mlx-vlm names them `A` and `B`, and the scale `alpha`.
"""

import re
from collections.abc import Mapping
from typing import Any

from fastvlm.checkpoint import adapter_peft
from fastvlm.checkpoint.adapter import Parts
from fastvlm.checkpoint.merging import Factors
from fastvlm.checkpoint.weights import TensorInfo
from fastvlm.common.findings import Finding, Steps
from fastvlm.common.settings import checked

_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_)?(?P<part>a|b|A|B|m)")
_INNER = re.compile(r"\.(linear|embedding|base_layer)\.(weight|bias)$")  # of the layer that an adapter's stands for


def read_config(document: dict[str, Any]) -> Steps[dict[str, Any]]:
    """adapter_config.json's checked settings."""
    config = yield from checked(document, adapter_peft.CONFIG, "MLX adapter")
    config.setdefault("fine_tune_type", "lora")
    if config["fine_tune_type"] != "full":
        given = config.get("lora_parameters", {})
        for key, old in (("rank", "rank"), ("scale", "alpha")):
            config[key] = given.get(key, config.get(old))
            if not config[key]:
                where = f"{adapter_peft.CONFIG}: lora_parameters.{key}"
                yield Finding("setting-missing", where, str(config[key]), "a number that is not 0")
    return config


def kind_of(config: Mapping[str, Any], others: bool) -> str:
    """The kind in a few words."""
    names = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tune"}
    return f"MLX {names[config['fine_tune_type']]}"


def read_parts(entries: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Steps[Parts]:
    """The parts of an adapter whose settings have no fault, from the tensors of its file."""
    parts = Parts(tied=True)  # MLX's models have one matrix where embeddings and head are tied
    modules: dict[str, dict[str, TensorInfo]] = {}
    kind = config["fine_tune_type"]
    for name, info in entries.items():
        factor = _FACTOR.fullmatch(name) if kind != "full" else None
        if factor is None:
            parts.whole[_INNER.sub(r".\2", name)] = info
        else:
            modules.setdefault(factor["module"], {})[factor["part"].lower()] = info
    half, rank, wrong = [], [], []
    for module, held in modules.items():
        a, b, magnitude = held.get("a"), held.get("b"), held.get("m")
        embedding = module.endswith("embed_tokens")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            half.append(module)
        elif not a.shape[1] == b.shape[0] == config["rank"]:
            rank.append(f"{module}: lora_a has {a.shape[1]}, lora_b {b.shape[0]}")
        elif (magnitude is not None) != (kind == "dora"):
            wrong.append(module)
        else:
            left, right = (a, b) if embedding else (b, a)
            parts.factors[module] = Factors(left, right, config["scale"], not embedding, magnitude)
    for rule, names, got, expected in (
        ("adapter-half", half, "modules with one of lora_a and lora_b", "both, as matrices"),
        ("adapter-rank", rank, "modules of another rank", f"rank {config.get('rank')}, as {adapter_peft.CONFIG} says"),
        ("adapter-contradictory", wrong, f"modules {'without' if kind == 'dora' else 'with'} m", f"those of {kind}"),
    ):
        if names:
            yield Finding(rule, "adapter's tensors", f"{len(names)} {got}", expected, details=tuple(names))
    return parts
