"""The runners of `benchmarks ttft` over a `fastvlm.model.surface.FastVLM`: Transformers' PyTorch model, and an
artefact.

Imported by a runner's process only. What it imports, and what `prepare` does, is imported before the clock of the load
starts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.ttft.runner import Stage
from fastvlm.model import surface

CHECKPOINT_SETTINGS = {"dtype": "float32", "device": "cpu", "memory_format": "contiguous", "attention": "sdpa"}


def prepare(specification: Mapping[str, Any]) -> None:
    """Import what this kind of runner loads with, and no more: it would count as the runner's memory."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM  # noqa: F401

    if specification["kind"] == "checkpoint":
        from transformers import FastVlmForConditionalGeneration  # noqa: F401
        from transformers.models.timm_wrapper import modeling_timm_wrapper  # noqa: F401  timm behind it

        from fastvlm.model import build as model  # noqa: F401
    else:
        from model_export import runtime  # noqa: F401


def open_runner(specification: Mapping[str, Any]) -> "ModelRunner":
    """Open "checkpoint" (with `CHECKPOINT_SETTINGS` and "compile") or "artefact" (with "vision", "llm", "compute",
    "units"), for the specification's "picture", "prompt", "question", "resolution" and "tokens"."""
    model, settings = (_checkpoint if specification["kind"] == "checkpoint" else _artefact)(specification)
    with Image.open(specification["picture"]) as picture:
        return ModelRunner(model, picture.convert("RGB"), specification, settings | _threads(specification))


class ModelRunner:
    """A `FastVLM` asked about one picture, stage by stage."""

    def __init__(
        self, model: surface.FastVLM, picture: Image.Image, asked: Mapping[str, Any], settings: dict[str, Any]
    ) -> None:
        self.model, self.picture, self.settings = model, picture, settings
        self.prompt, self.question, self.tokens = asked["prompt"], asked["question"], asked["tokens"]
        self.name = model.vision.name

    def stages(self) -> list[Stage]:
        """Every stage that there is."""
        model, language = self.model, self.model.language

        def preprocess(state: dict[str, Any]) -> None:
            state["pixels"] = model.preprocess(self.picture)

        def encode(state: dict[str, Any]) -> None:
            state["features"] = model.encode_image(state["pixels"])

        def project(state: dict[str, Any]) -> None:
            state["projected"] = model.project(state["features"])

        def prefill(state: dict[str, Any]) -> None:
            state["logits"], state["past"] = language.prefill(model.merge(self.prompt, [state["projected"]]))

        def first_token(state: dict[str, Any]) -> None:
            state["answer"] = [int(np.argmax(state["logits"]))]
            "".join(model.decode(iter(state["answer"])))

        def decode(state: dict[str, Any]) -> None:  # a fixed number of tokens, whatever they are
            for _ in range(self.tokens):
                last = language.embed(np.array([state["answer"][-1:]]))
                logits, state["past"] = language.prefill(last, state["past"])
                state["answer"].append(int(np.argmax(logits)))

        def next_question(state: dict[str, Any]) -> None:
            ids = model.tokenize(self.question)
            kept = int(np.flatnonzero(ids[0] == model.image_token_id)[-1]) + 1
            past = language.rewind(state["past"], kept)
            logits, _ = language.prefill(language.embed(ids[:, kept:]), past)
            "".join(model.decode(iter([int(np.argmax(logits))])))

        acts = (preprocess, encode, project, prefill, first_token, decode, next_question)
        return [(act.__name__, act) for act in acts]


def _checkpoint(asked: Mapping[str, Any]) -> tuple[surface.FastVLM, dict[str, Any]]:
    settings = CHECKPOINT_SETTINGS | {key: asked[key] for key in CHECKPOINT_SETTINGS if key in asked}
    model = surface.load_checkpoint(
        asked["checkpoint"], settings["dtype"], settings["device"], attn_implementation=settings["attention"]
    )
    vision: Any = model.vision
    if settings["memory_format"] == "channels_last":
        vision.encoder.to(memory_format=torch.channels_last)
    if asked.get("compile"):
        from torch._inductor import config

        settings["compile"] = config.freezing = True
        vision.encoder.forward_features = torch.compile(vision.encoder.forward_features)
    model = replace(model, preprocessor=replace(model.preprocessor, image_size=asked["resolution"]))
    return model, settings


def _artefact(asked: Mapping[str, Any]) -> tuple[surface.FastVLM, dict[str, Any]]:
    from model_export import runtime

    options = {key: asked[key] for key in ("vision", "llm", "compute", "units") if asked.get(key)}
    model = runtime.load(asked["artefact"], resolution=asked["resolution"], **options)
    return model, options | model.runners


def _threads(asked: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"kept_buffers": True} if asked.get("keep_buffers") else {}
    return {"threads": torch.get_num_threads()} | kept
