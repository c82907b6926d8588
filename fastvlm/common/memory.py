"""The memory of a process and of the machine. Imports the standard library only, but for `available_memory`."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes, mapped files included."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # ru_maxrss would count the parent's memory before exec
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restarted_peak() -> int:
    """Resident memory of this process in bytes, from which `peak_bytes` counts anew; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is what there is now
    return peak_bytes()


def available_memory() -> int:
    """Bytes that can be had now without swapping, within a container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no control group, or "max"
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free
