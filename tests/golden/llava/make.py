"""Run the original implementation (apple/ml-fastvlm) on a LLaVA-layout checkpoint and keep what it computes.

Not run by the tests; README.md says when and how. It needs the original's own packages, not this project's.

    python make.py REPOSITORY CHECKPOINT OUTPUT.npz
"""

import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch

# The prompt around the image, as token ids that every vocabulary has (no tokenizer takes part).
BEFORE, AFTER, NEW_TOKENS = [40, 293, 17, 105, 300], [10, 84, 271, 33, 402, 6], 12


def pixels(size: int) -> np.ndarray:
    """The input picture: seeded noise on a gradient, (1,3,size,size) float32 in 0..1."""
    noise = np.random.default_rng(20251121).integers(0, 256, (1, 3, size, size)) / 255
    ramp = np.linspace(0, 1, size)[None, None, :, None]
    return (0.5 * noise + 0.5 * ramp).astype(np.float32)


def original(repository: Path, checkpoint: Path) -> torch.nn.Module:
    """The original model class with the checkpoint's weights, float32, eager attention."""
    package = types.ModuleType("llava")  # its __init__ would import the whole project
    package.__path__ = [str(repository / "llava")]
    sys.modules["llava"] = package
    models = types.ModuleType("llava.model")
    models.__path__ = [str(repository / "llava" / "model")]
    sys.modules["llava.model"] = models
    from llava.model.language_model.llava_qwen import LlavaQwen2ForCausalLM

    reduce(json.loads((checkpoint / "config.json").read_text()), names_of(checkpoint))
    model, report = LlavaQwen2ForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {key for key in report["missing_keys"] if not key.endswith((".head.proj", "num_batches_tracked"))}
    if model.config.tie_word_embeddings:
        left.discard("lm_head.weight")
    if left or report["unexpected_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"the original doesn't take this checkpoint: missing {sorted(left)}, {report}")
    return model.eval()


def names_of(checkpoint: Path) -> set[str]:
    """The tensor names in the checkpoint's safetensors file."""
    with (checkpoint / "model.safetensors").open("rb") as file:
        return set(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def reduce(config: dict, names: set[str]) -> None:
    """Register the original's FastViT under the name it loads, with the checkpoint's sizes and form."""
    from llava.model.multimodal_encoder.mobileclip import mci
    from timm.models import register_model

    sizes = config.get("mm_vision_model_args") or {"layers": [2, 12, 24, 4, 2], "embed_dims": [96, 192, 384, 768, 1536]}
    position = partial(mci.RepCPE, spatial_shape=(7, 7))
    folded = not any(".rbr_conv." in name for name in names)

    def fastvithd(pretrained: bool = False, **arguments: object) -> torch.nn.Module:
        return mci.FastViT(
            **sizes,
            token_mixers=("repmixer",) * 3 + ("attention",) * 2,
            pos_embs=[None, None, None, position, position],
            mlp_ratios=[4] * 5,
            downsamples=[True] * 5,
            norm_layer=mci.LayerNormChannel,
            stem_scale_branch=False,
            inference_mode=folded,
        )

    fastvithd.__module__ = mci.__name__
    register_model(fastvithd)  # warns that it replaces the original of that name


@torch.no_grad()
def run(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Features (1,N,C), projected embeddings (1,N,H), logits (1,T,V) and greedy tokens of the original."""
    from llava.constants import IMAGE_TOKEN_INDEX

    tower = model.get_vision_tower()
    image = torch.from_numpy(pixels(tower.input_image_size))
    ids = torch.tensor([[*BEFORE, IMAGE_TOKEN_INDEX, *AFTER]])
    features = tower(image)
    logits = model(input_ids=ids, images=image, image_sizes=[image.shape[-2:]], use_cache=False).logits
    greedy = model.generate(
        ids, images=image, image_sizes=[image.shape[-2:]], do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    outputs = {"features": features, "projected": model.get_model().mm_projector(features), "logits": logits}
    return {name: value.numpy() for name, value in outputs.items()} | {"greedy": greedy.numpy()}


def main() -> None:
    """See the module's docstring."""
    repository, checkpoint, output = map(Path, sys.argv[1:4])
    model = original(repository, checkpoint)
    weights = [value for key, value in model.state_dict().items() if not key.endswith(("head.proj", "batches_tracked"))]
    norm = sum(float(value.double().square().sum()) for value in weights)
    np.savez_compressed(output, **run(model), squared_norm=norm)


if __name__ == "__main__":
    main()
