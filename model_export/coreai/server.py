"""The child process that Apple's runtime runs in: it aborts on bytes that it doesn't understand.

`python -m model_export.coreai.server FD`: loads assets, describes and calls their functions, and keeps KV caches, as
`process.Runtime` asks over the connection FD. It leaves by `os._exit`: the runtime's own end aborts now and then.
"""

import asyncio
import os
import sys
from collections import Counter
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fastvlm.common.memory import peak_bytes
from model_export.coreai import contract, wire


class Server:
    """Loaded functions by role, and states by number."""

    def __init__(self, stack: AsyncExitStack, units: str | None) -> None:
        self.stack, self.units = stack, units
        self.functions: dict[str, Any] = {}
        self.states: dict[int, dict[str, Any]] = {}
        self.events: Counter[str] = Counter()
        self.profiler = None if units is None else _profiler(self.events)

    async def load(self, role: str, path: str, function: str) -> dict[str, Any]:
        """Load an asset; returns its functions' names and the interface of `function`."""
        model = await self._model(Path(path))
        names = list(model.function_names)
        if function not in names:
            return {"functions": names}
        self.functions[role] = loaded = model.load_function(function, profiler=self.profiler)
        interface = loaded.desc
        described = {
            kind: [
                [name, describe(name).dtype, [contract.OPEN if size is None else size for size in describe(name).shape]]
                for name in names_of
            ]
            for kind, names_of, describe in (
                ("inputs", interface.input_names, interface.input_descriptor),
                ("outputs", interface.output_names, interface.output_descriptor),
                ("states", interface.state_names, interface.state_descriptor),
            )
        }
        return {"functions": names, **described}

    async def call(self, role: str, arrays: dict[str, np.ndarray], states: int | None) -> dict[str, np.ndarray]:
        """Call a function, with states that it updates."""
        from coreai.runtime import NDArray

        inputs = {name: NDArray(array.copy()) for name, array in arrays.items()}  # what came is read-only
        held = {} if states is None else {"state": self.states[states]}
        outputs = await self.functions[role](inputs, **held)
        return {name: np.array(value.numpy()) for name, value in outputs.items()}

    def new_states(self, number: int, shapes: dict[str, list[Any]]) -> None:
        """Make states of zeros."""
        from coreai.runtime import NDArray

        self.states[number] = {name: NDArray(np.zeros(shape, dtype)) for name, (dtype, shape) in shapes.items()}

    async def _model(self, path: Path) -> Any:
        """An asset ready to be run: by the system's runtime on macOS 27, elsewhere by the one in coreai-core."""
        from coreai.runtime import AIModel, SpecializationOptions

        if self.units is not None:
            return await AIModel.load(path, _specialization(self.units, SpecializationOptions))
        from coreai.authoring import AIModelAsset

        return await self.stack.enter_async_context(AIModelAsset.load(path).executable())


def _profiler(events: Counter[str]) -> Any:
    from coreai.runtime import Profiler

    def count(event: Any) -> Any:
        events[event.event_id] += 1
        return 0  # what the end of an interval is known by

    return Profiler(count, count)


def _specialization(units: str, options: Any) -> Any:
    from coreai.runtime import ComputeUnitKind

    if units == "CPU":
        return options.cpu_only()
    kind = {"GPU": ComputeUnitKind.gpu, "NE": ComputeUnitKind.neural_engine}.get(units)
    return options.default() if kind is None else options.from_preferred_compute_unit_kind(kind())


async def serve(connection: Connection) -> None:
    """Answer requests until the connection ends."""
    async with AsyncExitStack() as stack:
        server = Server(stack, os.environ.get("FASTVLM_COREAI_UNITS"))
        while True:
            try:
                request, arrays = wire.receive(connection)
            except (EOFError, OSError):
                os._exit(0)
            answer: dict[str, Any] = {}
            results: dict[str, np.ndarray] = {}
            try:
                match request.pop("do"):
                    case "load":
                        answer = await server.load(**request)
                    case "call":
                        results = await server.call(**request, arrays=arrays)
                    case "new":
                        server.new_states(**request)
                    case "peak":
                        answer = {"bytes": peak_bytes()}
                    case "events":
                        answer = {"events": dict(server.events)}
                    case "drop":
                        server.states.pop(request["number"], None)
            except Exception as error:  # the runtime raises plain ones; each is an answer
                answer = {"error": " ".join(f"{error}".split()) or type(error).__name__}
            wire.send(connection, answer, results)


if __name__ == "__main__":
    asyncio.run(serve(Connection(int(sys.argv[1]))))
