"""`run`: an .mlpackage on the user's own inputs, in the executor."""

import argparse
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm.common.cli import progress
from fastvlm.common.errors import UserError
from fastvlm.common.files import Output
from fastvlm.common.terminal import print_table
from model_export.commands.programs import feature_text

if TYPE_CHECKING:
    import numpy as np

    from model_export.mil import MILExecutor
    from model_export.mil.program import Feature

COMPUTES = ("as-typed", "float32", "strict-fp16")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic")
_LARGEST_ARRAY = 4 << 30  # bytes


def add_run(verbs: Any) -> None:
    """Add `run`."""
    text = "Run an ML program (.mlpackage) on your inputs, from its bytes, in PyTorch: on any machine."
    parser = verbs.add_parser("run", description=text)
    parser.add_place("--model", metavar="PACKAGE", help="an .mlpackage")
    parser.add_argument(
        "--input", nargs="+", type=_given, default=[], metavar="NAME=VALUE",
        help="an array (.npy), a picture, or a number or list as JSON; a picture is scaled to the input's size, and for"
        " an array of three channels its numbers are from 0 to 1",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Output(whole=True), metavar="DIR", help="a new folder for the outputs")
    parser.add_argument("--function", metavar="NAME", help="one of several functions (default: the package's)")
    parser.add_argument(
        "--compute",
        choices=COMPUTES,
        default=COMPUTES[0],
        metavar="HOW",
        help=f"{', '.join(COMPUTES)} (default: {COMPUTES[0]})",
    )
    parser.add_argument(
        "--watch", nargs="+", default=[], metavar="PATTERN", help="show statistics of values with names like this (`*`)"
    )
    parser.check(_twice)
    parser.set_defaults(run=run_run)


def _given(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"got {text}, expected NAME=VALUE")
    return name, value


def _twice(args: argparse.Namespace) -> list[str]:
    names = [name for name, _ in args.input]
    return [f"--input: {name} is given twice" for name in sorted({name for name in names if names.count(name) > 1})]


def run_run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the function once; print and save the outputs, and the statistics of what is watched."""
    with progress(f"load {args.model}"):
        from model_export import mil

        try:
            executor = mil.load(args.model, args.function, args.compute)
        except mil.MILError as error:
            raise UserError(str(error)) from error
    inputs = _inputs(executor, dict(args.input))
    watched: list[dict[str, Any]] = []

    def watch(operation: Any, outputs: Mapping[str, Any]) -> None:
        for name, value in outputs.items():
            if any(fnmatchcase(name, pattern) or fnmatchcase(operation.name, pattern) for pattern in args.watch):
                watched.append({"name": name, "type": operation.type, **_statistics(value)})

    try:
        with progress("run"):
            state = executor.make_state() if executor.interface.states else None
            outputs = executor.run(inputs, watch if args.watch else None, state)
    except mil.MILError as error:
        raise UserError(f"{args.model}: {error}") from error
    if args.watch:
        _print_watched(watched)
    saved = _save(outputs, args.output_dir)
    for name, value in outputs.items():
        where = f" -> {saved[name]}" if name in saved else ""
        print(f"{name}: {_short(value)}{where}")
    found = {name: _statistics(value) | {"file": saved.get(name)} for name, value in outputs.items()}
    return {"package": str(args.model), "function": executor.function_name, "compute": args.compute, "outputs": found,
            "watched": watched}  # fmt: skip


# -- inputs -----------------------------------------------------------------------------------------------------------


def _inputs(executor: "MILExecutor", given: Mapping[str, str]) -> dict[str, Any]:
    """The values of the flags; UserError with all of their faults."""
    features = executor.interface.input_features
    faults = [f"--input: no input {name!r}" for name in given if name not in features]
    faults += [
        f"--input {name}=: is missing ({feature_text(feature)})"
        for name, feature in features.items()
        if name not in given and feature.default is None
    ]
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name in features:
            try:
                values[name] = _read(text, features[name])
            except UserError as error:
                faults.append(f"--input {name}={text}: {error}")
    if faults:
        raise UserError("; ".join(faults))
    return values


def _read(text: str, feature: "Feature") -> Any:
    path = Path(text)
    if path.suffix.lower() in _PICTURES:
        return _picture(path, feature)
    if feature.kind == "imageType":
        raise UserError(f"expected a picture ({', '.join(_PICTURES)})")
    if path.suffix.lower() == ".npy":
        return _array(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("expected a .npy, a picture, or a number or list as JSON") from None


def _array(path: Path) -> "np.ndarray":
    import numpy as np

    try:
        if path.stat().st_size > _LARGEST_ARRAY:
            raise UserError(f"{path.stat().st_size} bytes, expected at most {_LARGEST_ARRAY}")
        with path.open("rb") as file:  # np.load would also take archives and pickles
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot be read ({str(error).splitlines()[0]})") from None


def _picture(path: Path, feature: "Feature") -> Any:
    """A picture as the input wants it: of its mode and size, or an array of numbers from 0 to 1."""
    import numpy as np

    from fastvlm.data.images import open_image

    shape = feature.shape or (feature.type.shape if feature.type else ())
    sizes = tuple(size or 0 for size in shape)
    if len(sizes) != 4 or sizes[0] != 1 or sizes[1] not in (1, 3):
        raise UserError(f"a picture for {feature_text(feature)}, expected an array")
    mode = {"GRAYSCALE_FLOAT16": "F"}.get(feature.color, "RGB" if sizes[1] == 3 else "L")
    image = open_image(path).convert(mode)
    wanted = (sizes[3], sizes[2])
    if image.size != wanted and not feature.accepts((*sizes[:2], image.height, image.width)):
        print(f"{feature.name}: {path}, {image.width} x {image.height}, scaled to {wanted[0]} x {wanted[1]}")
        image = image.resize(wanted)
    if feature.kind == "imageType":
        return image
    array = np.asarray(image, np.float32) / 255
    return array.transpose(2, 0, 1)[None] if array.ndim == 3 else array[None, None]


# -- outputs ----------------------------------------------------------------------------------------------------------


def _statistics(value: Any) -> dict[str, Any]:
    """Shape, type and, of its finite numbers, least, mean and most, with the counts of the others."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray):
        return {"shape": None, "dtype": value.__class__.__name__}
    document: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype)}
    finite = value[np.isfinite(value)].astype(np.float64)
    if finite.size:
        document |= {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max()),
                     "std": float(finite.std())}  # fmt: skip
    return document | {"nan": int(np.isnan(value).sum()), "inf": int(np.isinf(value).sum())}


def _print_watched(rows: list[dict[str, Any]]) -> None:
    numbers = ("min", "mean", "max", "std", "nan", "inf")
    cells = []
    for row in rows:
        shown = [f"{row[key]:.6g}" if key in row else "" for key in numbers]
        cells.append([row["name"], row["type"], f"{row['dtype']}{row['shape'] or ''}", *shown])
    if rows:
        print_table("values on the way", ["name", "operation", "type", *numbers], cells, numbers)
    else:
        print("--watch: no value has such a name")


def _short(value: Any) -> str:
    """A value in one line."""
    import numpy as np

    if isinstance(value, dict):
        best = sorted(value.items(), key=lambda item: -item[1])[:5]
        return ", ".join(f"{label} {share:.4f}" for label, share in best) + (", ..." if len(value) > 5 else "")
    if not isinstance(value, np.ndarray):
        return f"picture, {value.width} x {value.height}" if hasattr(value, "width") else str(value)
    text = f"{value.dtype}{list(value.shape)}"
    found = _statistics(value)
    if value.size == 1:
        return f"{text} {value.item()}"
    return f"{text} from {found['min']:.6g} to {found['max']:.6g}" if "min" in found else text


def _save(outputs: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """Write the outputs into a new folder: {name: file}."""
    import numpy as np

    from fastvlm.common.staging import staged

    if folder is None:
        return {}
    saved: dict[str, str] = {}
    with staged(folder) as new:
        for place, (name, value) in enumerate(outputs.items()):
            stem = re.sub(r"[^\w.-]", "_", name).lstrip(".") or f"output{place}"
            if any(Path(file).stem == stem for file in saved.values()):
                stem = f"{stem}_{place}"
            if isinstance(value, np.ndarray):
                file = f"{stem}.npy"
                np.save(new / file, value)
            elif hasattr(value, "save") and value.mode != "F":
                file = f"{stem}.png"
                value.save(new / file)
            elif hasattr(value, "save"):
                file = f"{stem}.npy"
                np.save(new / file, np.asarray(value))
            else:
                file = f"{stem}.json"
                (new / file).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
            saved[name] = str(folder / file)
    return saved
