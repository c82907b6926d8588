"""The machine and the software that a figure was measured on."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fastvlm.common import threads
from fastvlm.common.units import counted

_PACKAGES = "torch timm transformers coremltools mlx mlx-lm numpy pillow safetensors tokenizers"
# Processor features that change how fast (and in which precision) PyTorch's kernels run.
_FLAGS = "avx2 avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 asimd bf16 i8mm"


def describe() -> dict[str, Any]:
    """Machine and versions: everything here stays the same from one run to the next (see `load` for what does not).

    Memory is in GiB. A package that is not installed is left out. PyTorch's threads are given once it is imported.
    """
    torch = sys.modules.get("torch")
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_features": [flag for flag in _FLAGS.split() if flag in _cpu_info("flags", "Features").split()],
        "cores": threads.cores(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": _system(),
        "python": platform.python_version(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """The installed version of each package that has a part in a figure."""
    installed = {}
    for name in _PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def load() -> dict[str, float]:
    """The mean number of runnable processes over the last 1, 5 and 15 minutes."""
    return dict(zip(("1min", "5min", "15min"), os.getloadavg()))


def machine_line(environment: Mapping[str, Any] | None = None) -> str:
    """One line naming the machine, for a table's foot."""
    known = environment or describe()
    features = f" ({', '.join(known['cpu_features'])})" if known["cpu_features"] else ""
    threads = f", {counted(known['torch_threads'], 'thread')}" if known["torch_threads"] else ""
    cores = counted(known["cores"], "core")
    return f"{known['cpu']}{features}, {cores}{threads}, {known['memory_gib']} GiB, {known['system']}"


def notes(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine and the versions, as (word, sentence) for a page's foot."""
    packages = [f"{name} {version}" for name, version in environment["packages"].items()]
    versions = " · ".join([f"Python {environment['python']}", *packages])
    return [("Machine", machine_line(environment)), ("Versions", versions)]


def output_of(*command: str) -> str:
    """The output of a system command, on one line; empty where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return ", ".join(printed.strip().splitlines())
    return ""


def _cpu_info(*keys: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_model() -> str:
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"
