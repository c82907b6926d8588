"""Steps of the benchmarks' tables; each is called in a process of its own (`benchmarks.suites.step`)."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fastvlm.common import children
from fastvlm.common.cli import log, progress
from fastvlm.common.errors import CheckFailed

ROUNDS = 5  # timed runs of each side, interleaved, after one warm-up


def beside(count: str, *words: str) -> dict[str, float]:
    """The "seconds" of `python WORDS` beside so many processes that compute all the time."""
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(count))]
    try:
        done = children.run([sys.executable, *words], log)
    finally:
        for load in loads:
            load.kill()
            load.wait()
    if done.returncode:
        raise CheckFailed(f"python {words} {done.ending}: {done.last_line}")
    return {"seconds": done.seconds}


def plain_export(checkpoint: str, target: str, image_size: str) -> None:
    """Export as a script by hand does: timm's encoder, `torch.jit.trace`, `ct.convert`; nobody turns gradients off."""
    import torch

    from model_export.encoder.coreml import coremltools, quiet_conversion

    ct, model, pixels = coremltools(), plain_encoder(checkpoint), torch.rand(1, 3, int(image_size), int(image_size))
    model.requires_grad_(True)
    model.forward = model.forward_features
    with quiet_conversion():
        traced = torch.jit.trace(model, pixels)
        package = ct.convert(
            traced,
            inputs=[ct.TensorType(name="images", shape=pixels.shape)],
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )
    package.save(target)


def executor(checkpoint: str, package: str) -> dict[str, float]:
    """Median seconds of the plain module and of the executor in both policies, in interleaved runs, same threads."""
    import torch

    from model_export import contract, mil

    float32, typed = (mil.load(package, compute=policy) for policy in ("float32", "as-typed"))
    shape = [size or 1 for size in typed.inputs[contract.INPUT].shape]
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    inputs = {contract.INPUT: pixels.numpy()}
    plain = torch.inference_mode()(plain_encoder(checkpoint).forward_features)
    runs: dict[str, Callable[[], Any]] = {
        "plain": partial(plain, pixels), "float32": partial(float32.predict, inputs),
        "typed": partial(typed.predict, inputs),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    with progress("timing", (ROUNDS + 1) * len(runs)) as advance:
        for _ in range(ROUNDS + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                advance()
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def plain_encoder(checkpoint: str) -> Any:
    """timm's encoder as it is loaded, in float32 and PyTorch's default memory format."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import encoder

    return encoder(open_checkpoint(checkpoint))
