"""mlx-vlm's FastVLM as a runner of `fastvlm ttft`, in an environment that needs nothing of ours.

The steps are those of `mlx_vlm.generate` 0.7.10 (`generate/ar.py`: the prompt but for its last token, whose logits are
never computed, then the last one), one after the other, each evaluated before the clock is read.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models import cache
from mlx_vlm.utils import load
from PIL import Image

from benchmarks.ttft.runner import State
from fastvlm.common.errors import CheckFailed

_PLACEHOLDER = "<image>"


def open_runner(specification: Mapping[str, Any]) -> "MlxVlm":
    """Open the folder "artefact" (mlx-vlm's layout) for "picture", "rendered_prompt" and "rendered_question" (whole
    texts, with the template and one `<image>`), "resolution", "tokens" and "recipe"."""
    return MlxVlm(specification)


class MlxVlm:
    """mlx-vlm with a question about one picture; the methods named as `runner.STAGES` are the stages."""

    name = "mlx-vlm"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.model, self.processor = load(spec["artefact"])
        self.language = self.model.language_model
        mx.eval(self.model.parameters())
        with Image.open(spec["picture"]) as picture:
            self.picture = picture.convert("RGB")
        self.prompt, self.question, self.tokens = spec["rendered_prompt"], spec["rendered_question"], spec["tokens"]
        self.resolution = spec["resolution"]
        weight = self.model.vision_tower.vision_model.patch_embed.blocks[0].reparam_conv.weight
        self.dtype = weight.dtype
        device = "GPU" if mx.default_device() == mx.gpu else "CPU"
        self.settings = {"device": device, "dtype": str(self.dtype).removeprefix("mlx.core."), "mlx": version("mlx")}
        self.settings["recipe"] = spec["recipe"]

    def preprocess(self, state: State) -> None:
        side = self.resolution
        pixels = self.processor.image_processor(
            self.picture,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            return_tensors="np",
        )["pixel_values"]
        state["pixels"] = mx.array(np.asarray(pixels))
        mx.eval(state["pixels"])

    def encode(self, state: State) -> None:
        _, features, _ = self.model.vision_tower(state["pixels"].astype(self.dtype).transpose(0, 2, 3, 1))
        state["encoded"] = features.reshape(1, -1, features.shape[-1])
        mx.eval(state["encoded"])

    def project(self, state: State) -> None:
        state["projected"] = self.model.mm_projector(state["encoded"])
        mx.eval(state["projected"])

    def prefill(self, state: State) -> None:
        ids = mx.array([self._ids(self.prompt)])
        embeds = self.model.prepare_inputs_for_multimodal(state["projected"], ids, None)
        state["past"] = cache.make_prompt_cache(self.language)
        state["last"] = self._extend(embeds, state["past"])

    def first_token(self, state: State) -> None:
        state["answer"] = [int(mx.argmax(state["last"]))]
        self.processor.tokenizer.decode(state["answer"])
        state["features"], state["logits"] = (state[name].astype(mx.float32) for name in ("encoded", "last"))
        if bad := [name for name in ("features", "logits") if not mx.isfinite(state[name]).all().item()]:
            raise CheckFailed(f"mlx-vlm ({self.dtype}): {' and '.join(bad)} that are NaN or infinite")

    def decode(self, state: State) -> None:
        for _ in range(self.tokens):
            logits = self.language(mx.array([state["answer"][-1:]]), cache=state["past"]).logits[0, -1]
            state["answer"].append(int(mx.argmax(logits)))

    def next_question(self, state: State) -> None:
        ids = self._ids(self.question)
        place = ids.index(self.model.config.image_token_index)
        known = place + state["projected"].shape[1]
        for layer in state["past"]:
            layer.trim(layer.offset - known)
        rest = self.language.model.embed_tokens(mx.array([ids[place + 1 :]]))
        self.processor.tokenizer.decode([int(mx.argmax(self._extend(rest, state["past"])))])

    def _extend(self, embeds: mx.array, past: Any) -> mx.array:
        """The last position's logits (V,)."""
        if embeds.shape[1] > 1:
            self.language(None, inputs_embeds=embeds[:, :-1], cache=past)
            mx.eval([layer.state for layer in past])
        logits = self.language(None, inputs_embeds=embeds[:, -1:], cache=past).logits[0, -1]
        mx.eval(logits)
        return logits

    def _ids(self, text: str) -> list[int]:
        """The ids with the image token where the picture goes; the text around it tokenized apart."""
        before, after = (
            self.processor.tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(_PLACEHOLDER)
        )
        return [*before, self.model.config.image_token_index, *after]
