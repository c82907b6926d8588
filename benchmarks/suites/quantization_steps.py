"""Steps of `benchmarks quantization` that need the models; each is called in a process of its own (`suite.call`)."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvlm.common.cli import log

# The vision tower's pre-training classifier, which Apple's checkpoints have and mlx_vlm's loader insists on.
_HEAD, _HEAD_SHAPE = "model.vision_tower.vision_tower.model.head.proj", (3072, 768)
_INDEX = "model.safetensors.index.json"
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


def text_model(checkpoint: str, target: str) -> None:
    """The checkpoint's language model as a Qwen2 folder: the same values under Qwen2's own names."""
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    from fastvlm.common.staging import staged

    source = Path(checkpoint)
    config = json.loads((source / "config.json").read_text())
    dtype = config.get("torch_dtype") or config["dtype"]
    config = config.get("text_config") or {k: v for k, v in config.items() if not k.startswith(("mm_", "image_"))}
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": dtype}
    with staged(Path(target)) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for path in source.iterdir():
            if path.suffix != ".safetensors" and path.name not in ("config.json", _INDEX):
                shutil.copy(path, folder)
        weight_map: dict[str, str] = {}
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                names = [n for n in file.keys() if not re.search("vision_tower|projector", n)]  # noqa: SIM118
                tensors = {name.replace("model.language_model.", "model."): file.get_tensor(name) for name in names}
            if tensors:
                save_file(tensors, folder / path.name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
        if len(set(weight_map.values())) > 1:
            (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
