"""Steps of quantization.json; each is called in a process of its own (`benchmarks.suites.step`)."""

import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastvlm.common import children
from fastvlm.common.cli import log
from fastvlm.common.errors import CheckFailed

# The vision tower's pre-training classifier, which Apple's checkpoints have and mlx_vlm's loader insists on.
_HEAD, _HEAD_SHAPE = "model.vision_tower.vision_tower.model.head.proj", (3072, 768)
_INDEX = "model.safetensors.index.json"
UNIFORM = ("int3", "int4", "int5", "int6", "int8")  # whose line the mixed recipes are held against
MIXED = ("int3-mixed", "mixed-4-8", "fit:5bpw")
CALIBRATED = ("int4-awq", "int4-gptq", "int4-dwq")
_SEED = 5
_ROWS = 256  # of each matrix whose bytes are compared: mlx's fp4 modes take a second for three million values


def small(target: str) -> None:
    """A random 0.5B checkpoint in Apple's layout, which mlx_vlm and ours both read: folded, with the classifier."""
    import torch
    from safetensors.torch import save_file

    from fastvlm.common.staging import staged
    from fastvlm.synthetic.checkpoint import write_checkpoint

    with staged(Path(target)) as folder:
        made = write_checkpoint(folder / "made", shape="0.5b", layout="llava_qwen2", dtype="float16", shards=2)
        for path in made.iterdir():
            path.rename(folder / path.name)
        made.rmdir()
        head = "model-classifier.safetensors"
        save_file({_HEAD: torch.zeros(_HEAD_SHAPE, dtype=torch.float16)}, folder / head, {"format": "pt"})
        index = folder / _INDEX
        document = json.loads(index.read_text())
        document["weight_map"][_HEAD] = head
        index.write_text(json.dumps(document, indent=2))


def schemes(checkpoint: str) -> dict[str, int]:
    """Every round-to-nearest scheme on one matrix of every shape, against `mlx.core.quantize`."""
    import mlx.core as mx
    import numpy as np

    from fastvlm.common.dtypes import as_array, torch_dtype
    from quantization.schemes import MODES

    different = compared = 0
    for mode in sorted(set(MODES) - {"cast", "coreml"}):
        legal = MODES[mode].LEGAL
        for values in itertools.product(*legal.values()):
            settings = dict(zip(legal, values))
            scheme: Any = MODES[mode](**settings)
            theirs = {key: value for key, value in settings.items() if key != "dtype"}
            same = True
            for name, matrix in _matrices(checkpoint):
                if scheme.fault(tuple(matrix.shape)):
                    continue
                rows = as_array(matrix.to(torch_dtype(scheme.dtype)))
                given = mx.array(matrix.float().numpy()).astype(getattr(mx, scheme.dtype))
                expected = [np.array(part.view(mx.uint8)) for part in mx.quantize(given, mode=mode, **theirs)]
                ours = list(scheme.encode(rows)[0].values())
                same &= [part.tobytes() for part in ours] == [part.tobytes() for part in expected]
                if not same:
                    log(f"{mode} {settings}: {name} differs")
            different, compared = different + (not same), compared + 1
    return {"different": different, "compared": compared}


def _matrices(checkpoint: str) -> Iterator[tuple[str, Any]]:
    """One matrix of every shape that the language model has, or its first rows."""
    from fastvlm.checkpoint import naming
    from fastvlm.checkpoint.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    shapes = set()
    for name, info in opened.tensors.items():
        if name.startswith(naming.LANGUAGE) and len(info.shape) == 2 and info.shape not in shapes:
            shapes.add(info.shape)
            yield name, opened.read(name, mapped=True)[:_ROWS]


def same_tensors(ours: str, theirs: str) -> dict[str, int]:
    """Whether every tensor of the language model has the bytes that mlx_lm.convert gave it."""
    import mlx.core as mx
    import numpy as np

    sides = []
    for folder in (ours, theirs):
        tensors: dict[str, Any] = {}
        for path in sorted(Path(folder).glob("model*.safetensors")):
            loaded: Any = mx.load(str(path))
            tensors |= {name.removeprefix("language_model."): tensor for name, tensor in loaded.items()}
        sides.append(tensors)
    mine, other = sides
    different = sorted(set(mine) ^ set(other))
    for name in sorted(set(mine) & set(other)):
        a, b = mine[name], other[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or not np.array_equal(
            np.array(a.view(mx.uint8)), np.array(b.view(mx.uint8))
        ):
            different.append(name)
    for name in different[:10]:
        log(f"differs: {name}")
    return {"different": len(different), "compared": len(set(mine) | set(other))}


def mlx_vlm(python: str, *words: str) -> None:
    """Run `mlx_vlm WORDS` of the environment of `python` with our environment's transformers, torch and mlx: what
    `pip install mlx-vlm` into ours would run."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    sys.path.append(subprocess.check_output([python, "-c", code], text=True).strip())
    sys.argv[1:] = words
    runpy.run_module("mlx_vlm", run_name="__main__", alter_sys=True)


# Sweeps


def gains(report: str) -> dict[str, Any]:
    """The gains in a sweep's report.json: the answers that int8 keeps ("int8_agreement"), the part of int4's KL that
    the best calibration recovers ("recovered_prefill", "recovered_answers"), and each mixed recipe's KL as a ratio
    to that on the "line" between the uniform recipes next in size."""
    figures = {point["recipe"]: point["figures"] for point in _read(report)["points"]}

    def recovered(key: str) -> float:
        best: float = min(figures[name][key] for name in CALIBRATED)
        return 1 - best / figures["int4"][key]

    return {
        "int8_agreement": figures["int8"]["same_answers"],
        "recovered_prefill": recovered("prompt_kl_mean"),
        "recovered_answers": recovered("answer_kl_mean"),
        "line": {
            name: figures[name]["prompt_kl_mean"] / _on_the_line(figures, figures[name]["bytes"]) for name in MIXED
        },
    }


def _on_the_line(figures: Mapping[str, Mapping[str, float]], size: float) -> float:
    """The KL at a size on the straight line between the uniform recipes next to it."""
    ends = sorted((figures[name]["bytes"], figures[name]["prompt_kl_mean"]) for name in UNIFORM)
    below, above = next(pair for pair in itertools.pairwise(ends) if pair[0][0] <= size <= pair[1][0])
    return below[1] + (size - below[0]) / (above[0] - below[0]) * (above[1] - below[1])


def killed(report: str, folder: str, kills: str, *sweep: str) -> dict[str, int]:
    """The sweep `python -m SWEEP` with SIGKILL to its process group at random moments, and once more to its end: the
    "differences" to the uninterrupted one's report, and the kills "between" the first point and the last."""
    whole, command = _read(report), _sweep(folder, sweep)
    draw, between = random.Random(_SEED), 0
    for number in range(int(kills)):
        delay = draw.uniform(2, whole["timings"]["sweep_seconds"] / 4)
        with subprocess.Popen(command, start_new_session=True) as child:
            try:
                child.wait(delay)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
        done = len(list(Path(folder, "work", "points").glob("*.json")))
        between += 0 < done < len(whole["points"])
        log(f"kill {number + 1} of {kills} after {delay:.1f} s: {done} points are there")
    return {"differences": _swept(whole, folder, sweep), "between": between}


def dask(report: str, folder: str, *sweep: str) -> dict[str, int]:
    """The sweep on two local workers: its "differences" to the report."""
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        return {"differences": _swept(_read(report), folder, (*sweep, "--scheduler", cluster.scheduler_address))}


def _sweep(folder: str, sweep: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", *sweep, "--work-dir", f"{folder}/work", "--report", f"{folder}/report"]


def _swept(whole: Mapping[str, Any], folder: str, sweep: tuple[str, ...]) -> int:
    """Sweep; the points that are not the same as in another report, timings left out. CheckFailed when the rest
    differs, or the sweep fails."""
    done = children.run(_sweep(folder, sweep), log)
    if done.returncode:
        raise CheckFailed(f"the sweep {done.ending}: {done.last_line}")
    return differences(whole, _read(f"{folder}/report/report.json"))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> int:
    """Points that are not the same in two reports, timings left out; CheckFailed when the rest differs."""
    points = [{point["name"]: point for point in report["points"]} for report in (first, second)]
    count = sum(points[0].get(name) != points[1].get(name) for name in points[0].keys() | points[1].keys())
    apart = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
    if not count and apart - {"points", "timings"}:
        raise CheckFailed("two sweeps: the points are the same, the reports are not")
    return count


def _read(report: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(report).read_text(encoding="utf-8"))
    return document
