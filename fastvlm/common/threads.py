"""The number of threads that a command uses: decided here for every verb. Standard library only, but for `alone`.

The rule: every core that this process may have, unless OMP_NUM_THREADS says another number; and threads that wait
hardly spin. On idle cores that is the fastest, and on busy ones two threads were as fast as one (docs/LOG.md), so
nobody has to know how busy the machine is.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Turns that an OpenMP thread spins before it sleeps. By default it spins on, which on busy cores takes the time of the
# thread that it waits for; this few cost nothing that could be measured on idle ones.
_SPINS = "1000"
_QUOTA = "/sys/fs/cgroup/cpu.max"  # "max 100000", or microseconds of processor time in so many (Linux, cgroup v2)


def cores() -> int:
    """The number of cores that this process may use: its affinity, and no more than a container's share of time."""
    return min(_bound(), _quota() or _bound())


def count() -> int:
    """The number of threads that a command computes with."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) else cores()


def environment(threads: int) -> dict[str, str]:
    """Environment variables that give a child process so many."""
    return dict.fromkeys(_NAMES, str(threads))


def defaults(given: Mapping[str, str]) -> dict[str, str]:
    """Variables that a command adds to its environment before it loads a library with threads: none that was set."""
    added = {} if "OMP_WAIT_POLICY" in given else {"GOMP_SPINCOUNT": _SPINS}
    if cores() < _bound():  # which is what the libraries would take
        added["OMP_NUM_THREADS"] = str(cores())
    return {name: value for name, value in added.items() if name not in given}


@contextmanager
def alone() -> Iterator[int]:
    """One thread for each of torch's operations inside the block, and in Python threads that start there: where those
    share the work, or where sums must not depend on how many add them up. Yields how many it had before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _bound() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> int | None:
    with suppress(OSError, ValueError), open(_QUOTA) as file:
        time, period = file.read().split()
        return max(1, -(-int(time) // int(period)))
    return None
