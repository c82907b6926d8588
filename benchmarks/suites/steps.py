"""Steps of the benchmarks that need the models; each is called in a process of its own (`suite.call`)."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from fastvlm.common.cli import progress

ROUNDS = 5  # timed runs of each side, interleaved, after one warm-up


def synthetic(target: str, shape: str) -> None:
    """Write the random checkpoint of a real shape."""
    from fastvlm.synthetic.checkpoint import write_checkpoint

    large = shape == "7b"  # as it is published
    write_checkpoint(target, shape=shape, dtype="bfloat16" if large else "float16", shards=4 if large else 1)


def plain_export(checkpoint: str, target: str, image_size: int = 1024) -> None:
    """What a script by hand does: timm's encoder, `torch.jit.trace`, `ct.convert`; nobody turns gradients off."""
    import torch

    from model_export.encoder.coreml import coremltools, quiet_conversion

    ct, model, pixels = coremltools(), plain_encoder(checkpoint), torch.rand(1, 3, image_size, image_size)
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

    plain, pixels = plain_encoder(checkpoint), torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    inputs = {contract.INPUT: pixels.numpy()}
    float32, typed = (mil.load(package, compute=policy) for policy in ("float32", "as-typed"))

    def run_plain() -> None:
        with torch.inference_mode():
            plain.forward_features(pixels)

    runs: dict[str, Callable[[], Any]] = {
        "plain": run_plain, "float32": lambda: float32.predict(inputs), "typed": lambda: typed.predict(inputs),
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


def encoder_parity(checkpoint: str, *packages: str) -> list[float]:
    """SNR in dB of the saved real-shape packages, run by the executor as typed, against the plain PyTorch module."""
    import torch

    from benchmarks.metrics import snr_db
    from fastvlm.data import scenes
    from fastvlm.data.preprocessing import read_preprocessor
    from model_export import contract, mil

    picture = next(scenes.questions(1)).image
    pixels = read_preprocessor(checkpoint)(picture)
    with torch.inference_mode():
        features = plain_encoder(checkpoint).forward_features(torch.from_numpy(pixels))
    expected = features.flatten(2).transpose(1, 2).numpy()
    actual = [mil.load(one, compute="as-typed").predict({contract.INPUT: pixels})[contract.OUTPUT] for one in packages]
    return [snr_db(expected, features) for features in actual]


def answers(checkpoint: str, artefacts: dict[str, str]) -> dict[str, dict[str, float]]:
    """Greedy answers to the 500 held-out questions of PyTorch over the checkpoint ("reference") and of each artefact,
    by its name: shares of the "same" as the reference's, and of "exact" ones."""
    import fastvlm
    from fastvlm.data import scenes
    from model_export import runtime

    questions = list(scenes.questions(500))
    models = {"reference": fastvlm.load(checkpoint)} | {name: runtime.load(path) for name, path in artefacts.items()}
    given: dict[str, list[str]] = {name: [] for name in models}
    with progress("asking", len(questions) * len(models)) as advance:
        for name, model in models.items():
            for question in questions:
                given[name].append(model.generate(question.question, question.image, max_new_tokens=64).strip())
                advance()
    truth = [question.answer for question in questions]
    return {
        "same": {name: share(given[name], given["reference"]) for name in artefacts},
        "exact": {name: share(answers, truth) for name, answers in given.items()},
    }


def share(answers: list[str], wanted: list[str]) -> float:
    """The share of answers that are as wanted, word for word."""
    return sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)


def plain_encoder(checkpoint: str) -> Any:
    """timm's encoder as it is loaded, in float32 and PyTorch's default memory format."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import encoder

    return encoder(open_checkpoint(checkpoint))
