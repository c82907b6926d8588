"""MLX's peak memory when an artefact's language model runs as in the app, beside the plan's."""

from pathlib import Path
from typing import Any

from app_bridge.memory.model import Model, cache_bytes, prefill
from benchmarks.ttft.runner import peak_bytes
from fastvlm.common.cli import log

# mlx 0.32.4 waits at 11 tasks (MAX_ACTIVE_TASKS, transforms.cpp), on Metal of 40 operations (max_ops_per_buffer_,
# backend/metal/device.cpp), on the CPU of 10 dispatches (backend/cpu/encoder.h): one for a view and two for the rest.
AHEAD = {"gpu": 11 * 40, "cpu": 11 * 10 * 2 // 3}
TOLERANCE = 0.15  # of MLX's peak, predicted beside measured


def measure(folder: Path, model: Model, tokens: int, cache_limit: int, answer: int = 2) -> dict[str, Any]:
    """Run the language model over random embeddings, and compare MLX's peak with the plan's.

    Args:
        tokens: positions of the prompt. answer: tokens after it. cache_limit: bytes that MLX may keep of freed buffers.

    Returns a document; `passed`: within TOLERANCE. Raises UserError where MLX isn't installed or refuses the folder.
    """
    from model_export.runtime.language import mlx_language

    language, _ = mlx_language(folder)
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    log(f"{language.name}: {tokens} tokens, and {answer} of an answer ...")
    mx.set_cache_limit(cache_limit)
    decoder, caches = language.text.model, [KVCache() for _ in language.text.model.layers]
    head = decoder.embed_tokens.as_linear if language.text.args.tie_word_embeddings else language.text.lm_head

    def step(stream: Any, mask: Any) -> Any:
        for layer, cache in zip(decoder.layers, caches, strict=True):
            stream = layer(stream, mask, cache)
        token = mx.argmax(head(decoder.norm(stream))[:, -1], axis=-1)  # of all positions, as in the app
        mx.eval(token)
        return token[None]

    width = decoder.embed_tokens(mx.zeros((1, 1), mx.int32)).dtype
    places = mx.arange(tokens)
    mask = ((places[:, None] < places) * mx.array(-1e9, mx.float32)).astype(width)
    stream = mx.random.normal((1, tokens, model.sizes.hidden)).astype(width)
    mx.eval(mask, stream)
    weights = mx.get_active_memory() - mask.nbytes - stream.nbytes
    mx.reset_peak_memory()
    token = step(stream, mask)
    for _ in range(answer):
        token = step(decoder.embed_tokens(token), None)
    peak = mx.get_peak_memory()
    ahead = AHEAD["gpu" if mx.default_device() == mx.gpu else "cpu"]
    predicted = {
        "language model": model.language,
        "KV cache": cache_bytes(model.sizes, tokens, model.itemsize),
        "prefill": prefill(model, tokens, picture=False).peak(ahead),
    }
    off = sum(predicted.values()) / peak - 1
    return {
        "runner": language.name, "tokens": tokens, "predicted": predicted,
        "measured": {"language model": weights, "KV cache and prefill": peak - weights},
        "peak": {"predicted": sum(predicted.values()), "measured": peak, "off": off},
        "process_peak": peak_bytes(), "passed": abs(off) <= TOLERANCE,
    }  # fmt: skip
