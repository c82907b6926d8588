"""The contract of an artefact with the demo app and the MLX loaders: names, shapes, dtypes, keys. Imports nothing.

Source: apple/ml-fastvlm `app/FastVLM/FastVLM.swift` (its `Codable` structs, `@ModuleInfo` keys and preconditions).
Anything that differs from this is a crash in the app at run time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastvlm.common.image_tokens import APP_OUTPUT_SHAPE as APP_OUTPUT_SHAPE
from fastvlm.common.image_tokens import PATCH_SIZE as PATCH_SIZE
from fastvlm.common.image_tokens import tokens_per_image as tokens_per_image

# Files of an artefact. Xcode names the model's Swift class after the package, and the app uses a class `fastvithd`.
PACKAGE = "fastvithd.mlpackage"
MANIFEST = "export.json"
CONFIG = "config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
WEIGHTS_GLOB = "model*.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
NOTICE = "NOTICE"

# The Core ML function's one input and one output, both float32 whatever the program computes in.
INPUT = "images"
OUTPUT = "image_features"
IO_DTYPE = "float32"

# `register(modelFactory:)` in the app: the strings that it looks up in config.json and preprocessor_config.json.
MODEL_TYPE = "llava_qwen2"
PROCESSOR_CLASS = "LlavaProcessor"
IMAGE_TOKEN = "<image>"
# The preprocessing that the app does whatever preprocessor_config.json has.
APP_IMAGE_STRATEGY = "center_crop"

# Weight keys: `language_model.` in front of Qwen2's own names, and the projector's two linear layers.
LANGUAGE_PREFIX = "language_model."
PROJECTOR_PREFIX = "multi_modal_projector."
PROJECTOR_LAYERS = ("linear_0", "linear_2")
PROJECTOR_KEYS = tuple(f"{PROJECTOR_PREFIX}{layer}.{part}" for layer in PROJECTOR_LAYERS for part in ("weight", "bias"))

# config.json: keys that the app's decoder throws without, with their JSON types.
CONFIG_REQUIRED: dict[str, type] = {
    "model_type": str,
    "vocab_size": int,
    "image_token_index": int,
    "hidden_size": int,
    "mm_hidden_size": int,
    "num_hidden_layers": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
}
# Keys that it reads if they are there, with what it assumes if not: a model that differs must say so.
# (`rope_scaling` is read, too: absent or null is right; an object without an integer list `mrope_section` is fatal.)
CONFIG_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "rope_traditional": False,
    "tie_word_embeddings": True,
}

# preprocessor_config.json: dotted paths that the app's decoder throws without, with their JSON types.
PREPROCESSOR_REQUIRED: dict[str, type] = {
    "processor_class": str,
    "image_mean": list,
    "image_std": list,
    "size.shortest_edge": int,
    "crop_size.width": int,
    "crop_size.height": int,
}


# The function that runs when none is named; a package of several resolutions has one for each besides.
MAIN = "main"


def function_name(image_size: int) -> str:
    """The function for pictures of S x S pixels in a package of several resolutions."""
    return f"encode_{image_size}"


def functions(native: int, resolutions: Sequence[int] = ()) -> dict[str, int]:
    """Function -> side of its pictures in pixels: `main` alone, or `main` at the native one and one a resolution."""
    return {MAIN: native} | {function_name(size): size for size in sorted({*resolutions, native}) if resolutions}


def input_shape(image_size: int) -> tuple[int, int, int, int]:
    """(1, 3, S, S): one RGB picture, planes first, values in [0, 1] for FastVLM's mean 0 and standard deviation 1."""
    return (1, 3, image_size, image_size)


def output_shape(image_size: int, channels: int) -> tuple[int, int, int]:
    """(1, N, C): image tokens row by row, C = `mm_hidden_size` channels (3072 for FastViTHD)."""
    return (1, tokens_per_image(image_size), channels)


# language model
# The decoder in model*.safetensors, alone: mlx-lm reads that glob and refuses keys that are not the text model's. The
# projector has a file of its own, which the app (it reads every *.safetensors of the folder) and mlx-vlm find as well.
WEIGHTS = "model.safetensors"
PROJECTOR_WEIGHTS = "multi_modal_projector.safetensors"
# mlx-lm has no `llava_qwen2`; its `qwen2_vl` text model has exactly these keys and this arithmetic:
# `mlx_lm.load(folder, model_config=MLX_LM_CONFIG)`.
MLX_LM_CONFIG = {"model_type": "qwen2_vl"}
# Where one folder cannot serve two readers: mlx-vlm wants the vision tower and `mm_projector.*` in MLX's own layout,
# and -200 as `image_token_index`; the app needs the tokenizer's id of `<image>`, and refuses keys that it doesn't know;
# mlx-lm's command line wants a plain Qwen2, `model.*` and nothing of pictures.
LAYOUTS = ("app", "mlx-vlm", "mlx-lm")
TEXT_MODEL_TYPE, TEXT_ARCHITECTURE = "qwen2", "Qwen2ForCausalLM"
MLX_VLM_IMAGE_TOKEN = -200
VISION_WEIGHTS = "vision_tower.safetensors"


def stored_as(entry: Mapping[str, Any]) -> str:
    """An entry of config.json's `quantization` in a word: "int4", "mxfp4". "affine" is every loader's default mode."""
    mode: str = entry.get("mode", "affine")
    return f"int{entry['bits']}" if mode == "affine" else mode
