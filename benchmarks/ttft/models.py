"""The runners of `fastvlm ttft` over a `fastvlm.model.surface.FastVLM`: Transformers' PyTorch model, and an
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

from benchmarks.ttft.runner import State
from fastvlm.model import surface, torch_parts
from model_export.coreai import process
from model_export.coreai.runtime import NoProjector

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
    """Open "checkpoint" (with `CHECKPOINT_SETTINGS`) or "artefact" (with "vision", "llm", "compute",
    "units"), for the specification's "picture", "prompt", "question", "resolution" and "tokens"."""
    model, settings = (_checkpoint if specification["kind"] == "checkpoint" else _artefact)(specification)
    settings["threads"] = torch.get_num_threads()
    if specification.get("keep_buffers"):
        settings["kept_buffers"] = True
    with Image.open(specification["picture"]) as picture:
        return ModelRunner(model, picture.convert("RGB"), specification, settings)


class ModelRunner:
    """A `FastVLM` with a question about one picture; the methods named as `runner.STAGES` are the stages.

    `spec` has "prompt", "question" and "tokens", how many are decoded.
    """

    def __init__(
        self, model: surface.FastVLM, picture: Image.Image, spec: Mapping[str, Any], settings: dict[str, Any]
    ) -> None:
        self.model, self.language, self.picture, self.settings = model, model.language, picture, settings
        self.text, self.question, self.tokens = spec["prompt"], spec["question"], spec["tokens"]
        self.name = model.vision.name

    def bytes_beside(self) -> int:
        """The peak memory of Apple's Core AI runtime, which has a process of its own."""
        return process.peak_bytes()

    def preprocess(self, state: State) -> None:
        state["pixels"] = self.model.preprocess(self.picture)

    def encode(self, state: State) -> None:
        state["features"] = self.model.encode_image(state["pixels"])

    def project(self, state: State) -> None:  # nothing, where the encoder has the projector inside
        state["projected"] = self.model.project(state["features"])
        if isinstance(self.model.projector, NoProjector):
            del state["features"]  # they are not what another runner's are

    def prefill(self, state: State) -> None:
        embeds = self.model.merge(self.text, [state["projected"]])
        state["logits"], state["past"] = self.language.prefill(embeds)

    def first_token(self, state: State) -> None:
        state["answer"] = [self._text(state["logits"])]

    def decode(self, state: State) -> None:  # a fixed number of tokens, whatever they are
        for _ in range(self.tokens):
            last = self.language.embed(np.array([state["answer"][-1:]]))
            logits, state["past"] = self.language.prefill(last, state["past"])
            state["answer"].append(int(np.argmax(logits)))

    def next_question(self, state: State) -> None:
        ids = self.model.tokenize(self.question)
        known = int(np.flatnonzero(ids[0] == self.model.image_token_id)[-1]) + 1
        past = self.language.rewind(state["past"], known)
        logits, _ = self.language.prefill(self.language.embed(ids[:, known:]), past)
        self._text(logits)

    def _text(self, logits: np.ndarray) -> int:
        """The likeliest token, which is also made text."""
        token = int(np.argmax(logits))
        "".join(self.model.decode(iter([token])))
        return token


def _checkpoint(spec: Mapping[str, Any]) -> tuple[surface.FastVLM, dict[str, Any]]:
    settings = CHECKPOINT_SETTINGS | {key: spec[key] for key in CHECKPOINT_SETTINGS if key in spec}
    model = torch_parts.load_checkpoint(
        spec["checkpoint"],
        settings["dtype"],
        settings["device"],
        attn_implementation=settings["attention"],
        adapter=spec.get("adapter"),
    )
    vision: Any = model.vision
    if settings["memory_format"] == "channels_last":
        vision.encoder.to(memory_format=torch.channels_last)
    model = replace(model, preprocessor=replace(model.preprocessor, image_size=spec["resolution"]))
    return model, settings


def _artefact(spec: Mapping[str, Any]) -> tuple[surface.FastVLM, dict[str, Any]]:
    from model_export import runtime

    options = {key: spec[key] for key in ("vision", "llm", "compute", "units") if spec.get(key)}
    model = runtime.load(spec["artefact"], resolution=spec["resolution"], **options)
    return model, options | model.runners
