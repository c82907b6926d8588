"""A bundle as a FastVLM: Apple's runtime behind the methods of `fastvlm.model.surface`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.checkpoint import layouts
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from fastvlm.data.preprocessing import Preprocessor
from fastvlm.data.prompt import eos_ids
from fastvlm.model.language import Language
from fastvlm.model.surface import FastVLM
from model_export.config import INTERPRETER
from model_export.coreai import contract
from model_export.coreai.process import Runtime, States

_REMEDY = "its float16 leaves its range, or its bytes are damaged (`fastvlm verify` tells): export again"


@dataclass
class _Past:
    """A KV cache in the runtime, and how many of its positions are used."""

    states: States
    length: int = 0


class CoreAIVision:
    """vision.aimodel: the encoder with the projector inside."""

    def __init__(self, runtime: Runtime, interface: contract.Function, name: str) -> None:
        self.runtime, self.input, self.name, self.remedy = runtime, interface.inputs[0].name, name, _REMEDY

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) float32 -> image embeddings (1, N, H) float32."""
        return self.runtime.call("vision", {self.input: pixel_values}).astype(np.float32)


class NoProjector:
    """What is left of the projector where the encoder's asset has it inside: nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.remedy = name, _REMEDY

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Image embeddings (1, N, H), as they are."""
        return features


class Projected:
    """Another model's encoder and projector in one, as an asset has them."""

    def __init__(self, model: FastVLM) -> None:
        self.model, self.name, self.remedy = model, model.vision.name, model.vision.remedy

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """(1, 3, S, S) float32 -> image embeddings (1, N, H) float32."""
        return self.model.project(self.model.encode_image(pixel_values))


def projected(model: FastVLM) -> FastVLM:
    """A model whose `encode_image` gives image embeddings and whose `project` leaves them, as a bundle's do."""
    return replace(model, vision=Projected(model), projector=NoProjector(model.projector.name))


class CoreAILanguage(Language):
    """The decoder and the embeddings. A final hidden state is already the logits here, and `head` leaves them."""

    one_sequence = True

    def __init__(
        self, runtime: Runtime, interfaces: Mapping[str, contract.Function], context: int, eos: set[int], name: str
    ) -> None:
        self.runtime, self.context, self.positions = runtime, context, context
        self.eos_ids, self.name, self.remedy = frozenset(eos), name, _REMEDY
        self.ids = interfaces["embedding"].inputs[0].name
        self.embeds, self.order = interfaces["main"].inputs
        self.states = interfaces["main"].states

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        return self.runtime.call("embedding", {self.ids: ids.astype(np.int32)}).astype(np.float32)

    def _hidden(self, embeds: np.ndarray, past: Any, cached: np.ndarray | None) -> tuple[np.ndarray, Any]:
        if cached is not None or len(embeds) != 1:
            raise NotImplementedError("the program has one sequence, without a mask for its cache")
        past = past or _Past(self.runtime.states(self.states, self.context))
        total = past.length + embeds.shape[1]
        inputs = {
            self.embeds.name: embeds.astype(self.embeds.dtype),
            self.order.name: np.arange(total, dtype=np.int32)[None],
        }
        logits = self.runtime.call("main", inputs, past.states)
        past.length = total
        return logits.astype(np.float32), past

    def _head(self, hidden: np.ndarray) -> np.ndarray:
        return hidden

    def length(self, past: Any) -> int:
        return past.length

    def rewind(self, past: Any, length: int) -> Any:
        past.length = length
        return past


def load_bundle(bundle: Path, units: str | None = None) -> FastVLM:
    """Load a bundle to be run by Apple's runtime.

    Args:
        bundle: the folder that `fastvlm export --format coreai` wrote.
        units: as for `process.Runtime`.

    Raises:
        UserError: the bundle is not what was exported, or Core AI's packages are missing.
        RuntimeEnded: the runtime crashed on it.
    """
    settings = _settings(bundle / contract.METADATA)
    runtime = Runtime(units)
    interfaces = {}
    for role, asset in settings.assets.items():
        _, interface = runtime.load(role, bundle / asset)
        if interface is None:
            raise UserError(f"{bundle / asset}: has no function {contract.FUNCTION}: export again")
        interfaces[role] = interface
    where = "interpreter, CPU" if runtime.units == INTERPRETER else f"the system's runtime, {runtime.units}"
    name = f"Core AI ({where}; coreai-core {version('coreai-core')})"
    tokenizer = layouts.load_tokenizer(bundle / contract.TOKENIZER, settings.image_token_id)
    language = CoreAILanguage(runtime, interfaces, settings.context, eos_ids(tokenizer, None), name)
    return FastVLM(
        preprocessor=settings.preprocessor,
        tokenizer=tokenizer,
        image_token_id=settings.image_token_id,
        vision=CoreAIVision(runtime, interfaces["vision"], name),
        projector=NoProjector(name),
        language=language,
    )


@dataclass(frozen=True)
class _Settings:
    """What is read of metadata.json: role -> asset, and what a FastVLM needs."""

    assets: dict[str, str]
    preprocessor: Preprocessor
    image_token_id: int
    context: int


def _settings(path: Path) -> _Settings:
    """Read metadata.json; UserError for what no export writes."""
    try:
        document = load_object(path)
        vision, assets = document["vision"], {role: document["assets"][role] for role in contract.ASSETS}
        if any(Path(asset).name != asset for asset in assets.values()):
            raise ValueError(f"assets outside the bundle: {', '.join(assets.values())}")
        mean, std = (tuple(map(float, vision[key])) for key in ("image_mean", "image_std"))
        preprocessor = Preprocessor(int(vision["image_size"]), vision["image_strategy"], mean, std)
        token, context = int(vision["image_token_id"]), int(document["language"]["max_context_length"])
    except Unreadable as error:
        raise UserError(f"{error.finding(str(path))}") from None
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{path}: {what}: `fastvlm validate` names all of its faults; export again") from None
    return _Settings(assets, preprocessor, token, context)
