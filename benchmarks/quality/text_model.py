"""The models that `evaluate` can load: a FastVLM (checkpoint or artefact), or a text model of mlx-lm or Transformers.

A text model runs in MLX, or in PyTorch by Transformers over the values that MLX's quantized tensors stand for,
dequantized by MLX itself.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvlm.checkpoint.exported import recognise
from fastvlm.common.documents import Unreadable, load_object
from fastvlm.common.errors import UserError
from fastvlm.common.files import check_small_files
from model_export import contract

if TYPE_CHECKING:  # they import torch
    from fastvlm.model.language import Language
    from fastvlm.model.surface import FastVLM

_CHECKPOINTS = ("llava_qwen2", "fast_vlm")  # `model_type`s of FastVLM


@dataclass(frozen=True)
class TextModel:
    """A language model with its tokenizer, named as the same parts of a `FastVLM`."""

    tokenizer: Any
    language: "Language"

    @property
    def runners(self) -> dict[str, str]:
        """The name of what runs each part."""
        return {"language": self.language.name}


def kind(folder: Path) -> str:
    """ "artefact", "checkpoint" (of FastVLM) or "text" by the folder's small files. UserError where it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: expected an artefact, a FastVLM checkpoint or an mlx-lm folder")
    if recognise(folder):
        from model_export.artefact import read

        document = read(folder)
        if (layout := document["config"].get("layout", "app")) == "mlx-lm":
            return "text"
        if layout != "app":
            raise UserError(
                f"{folder}: exported for mlx-vlm, which alone runs it: evaluate the same recipe's app layout"
            )
        return "artefact" if "vision" in document["parts"] else "text"
    model_type = config(folder).get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{folder / contract.CONFIG}: model_type: got {model_type!r}, expected a model's name")
    return "checkpoint" if model_type in _CHECKPOINTS else "text"


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; UserError if it isn't there or is no JSON object."""
    path = folder / contract.CONFIG
    try:
        document = load_object(path)
    except Unreadable as error:
        raise UserError(f"{error.finding(str(path))}: expected a model's folder") from None
    if findings := list(check_small_files(folder)):
        raise UserError(f"{folder}: {'; '.join(map(str, findings))}")
    return document


def load(
    folder: Path,
    vision: str = "auto",
    llm: str = "auto",
    resolution: int | None = None,
    adapter: Path | None = None,
) -> "FastVLM | TextModel":
    """The folder's model. `vision`, `llm` and `resolution` as in `model_export.runtime.load`; a checkpoint of FastVLM
    runs in PyTorch in float32 whatever they say, with `adapter` merged into it. Raises UserError for what cannot be
    loaded."""
    from model_export import runtime, stored
    from model_export.runtime import language, mlx_language

    what, use_mlx = kind(folder), llm == "mlx" or (llm == "auto" and sys.platform == "darwin")
    if what == "artefact":
        return runtime.load(folder, vision=vision, llm=llm, resolution=resolution)
    if what == "checkpoint":
        import fastvlm

        return fastvlm.load(folder, adapter=adapter)
    if recognise(folder) and config(folder).get("model_type") == contract.MODEL_TYPE:
        from fastvlm.checkpoint import layouts

        document = stored.read_config(folder)
        speaker: Language = (mlx_language.mlx_language if use_mlx else language.torch_language)(folder)[0]
        return TextModel(layouts.load_tokenizer(folder, document["image_token_index"]), speaker)
    tokenizer = _tokenizer(folder)
    return TextModel(tokenizer, _mlx(folder, tokenizer) if use_mlx else _torch(folder, tokenizer))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # Transformers and tokenizers raise anything for damaged files
        raise UserError(f"cannot load the tokenizer of {folder}: {' '.join(str(error).split())[:300]}") from error


def _stored_as(document: dict[str, Any]) -> str:
    """ "int4", "mxfp4", or the dtype of a model without quantization."""
    scheme = document.get("quantization")
    if not scheme:
        return str(document.get("dtype") or document.get("torch_dtype") or "unquantized")
    return contract.stored_as({"bits": None} | scheme)


def _torch(folder: Path, tokenizer: Any) -> "Language":
    """Any causal model that Transformers knows under the tensor names that mlx-lm writes, in float32 on the CPU."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from fastvlm.data.prompt import eos_ids
    from fastvlm.model.language import TorchLanguage

    class TorchText(TorchLanguage):
        """Its states are the logits already: each model has its own operations behind the last layer."""

        def _states(self, **inputs: Any) -> tuple[torch.Tensor, Any]:
            output = self.model(**inputs)
            return output.logits, output.past_key_values

        def _head(self, hidden: np.ndarray) -> np.ndarray:
            return hidden

    document = config(folder)
    fields = {key: value for key, value in document.items() if key not in ("quantization", "quantization_config")}
    try:
        settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
        weights = dict(_dequantized(folder, document.get("quantization") or {}))
        kind_of_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        model, loaded = kind_of_model.from_pretrained(
            None, config=settings, state_dict=weights, dtype=torch.float32, attn_implementation="sdpa",
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: Transformers cannot build it ({_short(error)}): try --llm mlx") from None
    if wrong := sorted({*loaded["missing_keys"], *loaded["unexpected_keys"], *map(str, loaded["mismatched_keys"])}):
        raise UserError(
            f"{folder}: {len(wrong)} tensors are not what Transformers' {document['model_type']} has"
            f" ({', '.join(wrong[:3])}, …): try --llm mlx"
        )
    model.eval().requires_grad_(False)
    release = torch.__version__.split("+")[0]
    ends = eos_ids(tokenizer, document.get("eos_token_id"))
    name = f"PyTorch {release} CPU float32 over {_stored_as(document)} tensors"
    return TorchText(model, ends, name, _remedy(folder))


def _dequantized(folder: Path, quantization: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every weight as a float32 tensor, under its own name."""
    import mlx.core as mx
    import torch

    files = sorted(folder.glob(contract.WEIGHTS_GLOB))
    if not files:
        raise UserError(f"{folder}: no {contract.WEIGHTS_GLOB} in it")
    stored: dict[str, Any] = {}
    for file in files:
        try:
            stored |= mx.load(str(file))  # type: ignore[operator, arg-type]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({_short(error)})") from None
    parts = {f"{name.removesuffix('.scales')}.{part}" for name in stored if name.endswith(".scales")
             for part in ("scales", "biases")} & stored.keys()  # fmt: skip
    for name in sorted(stored.keys() - parts):
        value, module = stored.pop(name), name.removesuffix(".weight")
        if f"{module}.scales" in stored:
            scheme = quantization.get(module, quantization)
            try:
                value = mx.dequantize(
                    value, stored.pop(f"{module}.scales"), stored.pop(f"{module}.biases", None),
                    scheme["group_size"], scheme["bits"], scheme.get("mode", "affine"),
                )  # fmt: skip
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{folder}: {module}: unusable quantized weight ({_short(error)})") from None
        yield name, torch.from_numpy(np.array(value.astype(mx.float32)))


def _mlx(folder: Path, tokenizer: Any) -> "Language":
    """The text model that mlx-lm loads. UserError where MLX is not installed or refuses the folder."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise UserError(f"MLX is not usable here ({error}): use --llm torch") from None
    from fastvlm.common.limits import positions
    from fastvlm.data.prompt import eos_ids
    from model_export.runtime.mlx_language import MlxLanguage

    class MlxText(MlxLanguage):
        """Its embeddings are the token ids themselves, (1, T): what every model of mlx-lm takes."""

        def _embed(self, ids: np.ndarray) -> np.ndarray:
            return ids

        def _states(self, embeds: np.ndarray, cache: Any) -> Any:
            return self.text(mx.array(embeds.astype(np.int32)), cache=cache)

        def _head(self, hidden: np.ndarray) -> np.ndarray:
            return hidden  # they are logits already

    try:
        model, document = load_model(folder)
    except (ValueError, KeyError, TypeError, RuntimeError, FileNotFoundError) as error:
        raise UserError(f"{folder}: mlx-lm refuses it ({_short(error)})") from None
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    name = f"MLX {version('mlx')} {device} over {_stored_as(document)} tensors"
    ends = eos_ids(tokenizer, document.get("eos_token_id"))
    return MlxText(model, ends, name, _remedy(folder), positions(document))


def _remedy(folder: Path) -> str:
    return f"the weights of {folder} are damaged, or too large for their dtype: give another model"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
