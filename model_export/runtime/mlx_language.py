"""An artefact's language model and projector from its own bytes, in MLX."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.common.errors import UserError
from fastvlm.common.limits import positions
from fastvlm.model.language import Language
from model_export import contract
from model_export.runtime.language import REMEDY
from model_export.stored import StoredTensors, eos_ids


class MlxLanguage(Language):
    """The text model that mlx-lm loads, as a `Language`; quantized weights stay quantized."""

    def __init__(self, text: Any, eos: Iterable[int], name: str, remedy: str, positions: int | None) -> None:
        self.text, self.eos_ids, self.name = text, frozenset(eos), name
        self.remedy, self.positions = remedy, positions
        self.dtype: Any = None  # of the last hidden states

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        return _to_numpy(self.text.model.embed_tokens(_to_mlx(ids.astype(np.int32))))

    def _hidden(self, embeds: np.ndarray, past: Any, kept: np.ndarray | None) -> tuple[np.ndarray, Any]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        if kept is not None:
            raise NotImplementedError("mlx-lm's models take no mask for their cache")
        cache = make_prompt_cache(self.text) if past is None else past
        hidden = self._states(embeds, cache)
        mx.eval(hidden, [layer.state for layer in cache])
        self.dtype = hidden.dtype
        return _to_numpy(hidden), cache

    def _states(self, embeds: np.ndarray, cache: Any) -> Any:
        dtype = self.text.model.embed_tokens(_to_mlx(np.zeros((1, 1), np.int32))).dtype  # what the app merges into
        return self.text.model(None, cache, _to_mlx(embeds).astype(dtype))

    def _head(self, hidden: np.ndarray) -> np.ndarray:
        states, tied = _to_mlx(hidden).astype(self.dtype), self.text.args.tie_word_embeddings
        return _to_numpy(self.text.model.embed_tokens.as_linear(states) if tied else self.text.lm_head(states))

    def length(self, past: Any) -> int:
        return max(getattr(layer, "offset", 0) for layer in past)  # layers without attention keep no count

    def rewind(self, past: Any, length: int) -> Any:
        from mlx_lm.models.cache import trim_prompt_cache

        trim_prompt_cache(past, self.length(past) - length)
        return past


class MlxProjector:
    """The projector in MLX, as the app computes it: float32 features, weights as they are stored."""

    def __init__(self, stored: StoredTensors, name: str) -> None:
        import mlx.nn as mlx_nn

        self.name, self.remedy = name, REMEDY
        self.layers: list[Any] = []
        for layer in contract.PROJECTOR_LAYERS:
            key = f"{contract.PROJECTOR_PREFIX}{layer}."
            own = stored.arrays(key)
            linear: Any = mlx_nn.Linear(1, 1)
            if "scales" in own:
                linear = mlx_nn.QuantizedLinear(128, 1, **stored.scheme(key[:-1]))
            linear.update(own)
            self.layers.append(linear)
        self.gelu = mlx_nn.GELU()

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(1, N, C) float32 -> (1, N, H) float32."""
        first, second = self.layers
        return _to_numpy(second(self.gelu(first(_to_mlx(features)))))


def mlx_language(folder: Path) -> tuple[MlxLanguage, MlxProjector]:
    """The same two parts run by MLX: the GPU on a Mac, the (slow, one-thread) CPU elsewhere.

    Raises UserError where MLX is not installed or refuses the folder.
    """
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise UserError(f"MLX is not usable here ({error}): use the PyTorch runner") from None
    folder = Path(folder)
    stored = StoredTensors(folder)
    try:
        model, _ = load_model(folder, model_config=dict(contract.MLX_LM_CONFIG), get_model_classes=_text_model)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: mlx-lm refuses it ({error}); export again") from None
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    name = f"MLX {version('mlx')} {device} over {stored.label} tensors"
    language = MlxLanguage(model.language_model, eos_ids(stored.config), name, REMEDY, positions(stored.config))
    return language, MlxProjector(stored, name)


def _text_model(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's text model and its arguments, for folders that have the projector among the model's weights, too."""
    from mlx_lm.models import qwen2_vl

    class Model(qwen2_vl.Model):
        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            text = {name: value for name, value in weights.items() if not name.startswith(contract.PROJECTOR_PREFIX)}
            return super().sanitize(text)

    return Model, qwen2_vl.ModelArgs


def _to_mlx(array: np.ndarray) -> Any:
    import mlx.core as mx

    return mx.array(np.ascontiguousarray(array))


def _to_numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))
