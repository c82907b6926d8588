"""The steps of `benchmarks export` that need the models: `python -m benchmarks.suites.steps NAME ARGUMENT...`, a
process each.

Arguments are text: paths first. The last line of stdout is one JSON document: figures by the keys of
`benchmarks.suites.export.BARS`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvlm.common.cli import progress, quiet_libraries

ROUNDS = 5  # timed runs of each side, interleaved, after one warm-up


def synthetic(target: str, shape: str = "0.5b") -> dict[str, float]:
    """Write the random checkpoint of a real shape."""
    from fastvlm.synthetic.checkpoint import write_checkpoint

    large = shape == "7b"  # as it is published
    write_checkpoint(target, shape=shape, dtype="bfloat16" if large else "float16", shards=4 if large else 1)
    return {}


def plain_export(checkpoint: str, target: str, image_size: str = "1024") -> dict[str, float]:
    """What a script by hand does: timm's encoder, `torch.jit.trace`, `ct.convert`; nobody turns gradients off."""
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
    return {}


def executor(checkpoint: str, package: str) -> dict[str, float]:
    """Medians of interleaved runs of the plain module and of the executor in both policies, same threads; ratios."""
    import torch

    from model_export import contract, mil

    plain, pixels = plain_encoder(checkpoint), torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    inputs = {contract.INPUT: pixels.numpy()}
    programs = {
        "executor_float32": mil.load(package, compute="float32"),
        "executor_typed": mil.load(package, compute="as-typed"),
    }

    def run_plain() -> None:
        with torch.inference_mode():
            plain.forward_features(pixels)

    runs: dict[str, Callable[[], Any]] = {"plain": run_plain}
    runs |= {name: lambda program=program: program.predict(inputs) for name, program in programs.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    with progress("timing", (ROUNDS + 1) * len(runs)) as advance:
        for _ in range(ROUNDS + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
                advance()
    medians = {name: statistics.median(spent[1:]) for name, spent in times.items()}
    ratios = {f"{name}_ratio": medians[name] / medians["plain"] for name in programs}
    return {f"{name}_median": seconds for name, seconds in medians.items()} | ratios


def encoder_parity(checkpoint: str, half: str, single: str) -> dict[str, float]:
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
    figures = {}
    for key, package in (("snr_typed", half), ("snr_float32", single)):
        actual = mil.load(package, compute="as-typed").predict({contract.INPUT: pixels})[contract.OUTPUT]
        figures[key] = snr_db(expected, actual)
    return figures


def answers(checkpoint: str, *artefacts: str) -> dict[str, float]:
    """Greedy answers to the 500 held-out questions: PyTorch over the checkpoint, then each artefact (demo-RECIPE)."""
    import fastvlm
    from fastvlm.data import scenes
    from model_export import runtime

    asked = list(scenes.questions(500))
    models = {"reference": fastvlm.load(checkpoint)} | {
        Path(path).name.removeprefix("demo-"): runtime.load(path) for path in artefacts
    }
    given: dict[str, list[str]] = {}
    with progress("asking", len(asked) * len(models)) as advance:
        for name, model in models.items():
            given[name] = []
            for question in asked:
                given[name].append(model.generate(question.question, question.image, max_new_tokens=64).strip())
                advance()
    truth = [question.answer for question in asked]
    same = {f"answers_{name}": share(given[name], given["reference"]) for name in given if name != "reference"}
    return same | {f"exact_{name}": share(answers, truth) for name, answers in given.items()}


def share(answers: list[str], wanted: list[str]) -> float:
    """The share of answers that are as wanted, word for word."""
    return sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)


def plain_encoder(checkpoint: str) -> Any:
    """timm's encoder as it is loaded, in float32 and PyTorch's default memory format."""
    from fastvlm.checkpoint.checkpoint import open_checkpoint
    from fastvlm.model.build import encoder

    return encoder(open_checkpoint(checkpoint))


STEPS: dict[str, Callable[..., dict[str, float]]] = {
    step.__name__: step for step in (synthetic, plain_export, executor, encoder_parity, answers)
}

if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(STEPS[sys.argv[1]](*sys.argv[2:])))
