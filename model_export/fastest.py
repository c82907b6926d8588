"""Which dtype and how many threads are the fastest here: measured, since neither cores nor instructions tell."""

import os
import statistics
import time

import torch

from fastvlm.cli import log
from model_export.mil import onednn

# FastViTHD's most frequent layer at 1024 x 1024 (third stage, its first expansion), on a quarter of the picture.
_CHANNELS, _EXPANDED, _SIDE = 384, 1536, 32
_ROUNDS = 7


def choose() -> str:
    """ "float32" or "bfloat16", and sets PyTorch's threads, unless OMP_NUM_THREADS does; logs what it found."""
    most = torch.get_num_threads()
    threads = [most] if "OMP_NUM_THREADS" in os.environ else sorted({1, (most + 1) // 2, most})
    times = {(dtype, count): _seconds(dtype, count) for dtype in ("float32", "bfloat16") for count in threads}
    dtype, count = min(times, key=lambda setting: times[setting])
    torch.set_num_threads(count)
    found = ", ".join(f"{name} on {n} threads {1e3 * spent:.1f} ms" for (name, n), spent in times.items())
    log(f"fastest of a 1 x 1 convolution in channels-last: {dtype} on {count} threads ({found})")
    return dtype


def _seconds(dtype: str, threads: int) -> float:
    """Median of a few runs; the first, which creates the threads, is left out."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    x = torch.rand(1, _CHANNELS, _SIDE, _SIDE, dtype=kind).contiguous(memory_format=torch.channels_last)
    weight, settings = torch.rand(_EXPANDED, _CHANNELS, 1, 1, dtype=kind), ([1, 1], [0, 0], [1, 1], 1)
    if onednn.AVAILABLE:
        run = onednn.conv2d(weight, None, *settings, x.shape)
    else:

        def run(x: torch.Tensor, _: str) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, weight)

    times = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            run(x, "none")
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
