"""A sweep's executor over a Dask cluster, and a line for everything that can be wrong with one."""

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastvlm.common.children import ROOT
from fastvlm.common.cli import one_line
from fastvlm.common.errors import UserError
from fastvlm.common.staging import write_file

PATIENCE = 30  # seconds that a cluster may be without workers
ANSWER = 10  # seconds that a scheduler has to answer
RETRIES = 3  # of a call whose connection broke: Dask's executor never ends a point whose result it could not fetch
Identity = Callable[[], Mapping[str, Any]]


@contextmanager
def cluster(address: str, work: Path, identity: Identity) -> Iterator[tuple[Executor, Callable[[], None]]]:
    """An executor, and a check to be called now and then that the cluster is still there (UserError).

    `identity` must give on every worker what it gives here, and `work` must be the same folder there.
    """
    import dask
    import distributed

    for name in [name for name in logging.root.manager.loggerDict if name.startswith(("distributed", "tornado"))]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own; what is wrong is said below
    try:
        client = distributed.Client(address, timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        why = one_line(error)
        raise UserError(
            f"--scheduler {address}: no Dask scheduler answers there ({why}): see `dask scheduler`"
        ) from None
    lost = UserError(f"--scheduler {address}: went away: finished points are kept in {work}: sweep again to go on")
    seen = time.monotonic()

    def check() -> None:
        nonlocal seen
        if client.status != "running":
            raise lost
        if client.scheduler_info()["workers"]:
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE:
            raise UserError(f"--scheduler {address}: has no workers: start some: dask worker {address}")

    try:
        while not client.scheduler_info()["workers"]:
            check()
            time.sleep(0.1)
        _check_workers(client, address, work, identity)
        with dask.config.set({"distributed.comm.retry.count": RETRIES}):
            yield client.get_executor(pure=False), check
    except Exception as error:
        if client.status != "running" and error is not lost:  # whatever a call says when the other end is gone
            raise lost from error
        raise
    finally:
        with suppress(Exception):
            client.close(timeout=2)


def _check_workers(client: Any, address: str, work: Path, identity: Identity) -> None:
    """Refuse workers that have other code or packages, or another file system."""
    token = work / f".seen-{uuid.uuid4().hex}"
    write_file(token, b"")
    try:
        answers = client.run(_look, identity, str(token), on_error="return")
    finally:
        token.unlink(missing_ok=True)
    mine, faults = (dict(identity()), True), []
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            faults.append(f"{worker} cannot run our code ({one_line(answer)}): start it with PYTHONPATH={ROOT}")
        elif answer != mine:
            parts = [name for name in mine[0] if answer[0].get(name) != mine[0][name]]
            faults += [f"{worker} has other {' and '.join(parts)} than here: make them the same"] if parts else []
            faults += (
                [] if answer[1] else [f"{worker} does not see {work}: choose a --work-dir that all machines share"]
            )
    if faults:
        raise UserError(f"--scheduler {address}: {'; '.join(faults)}")


def _look(identity: Identity, token: str) -> tuple[dict[str, Any], bool]:
    return dict(identity()), Path(token).exists()
