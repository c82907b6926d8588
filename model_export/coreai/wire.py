"""Messages between a process and Apple's runtime in a child of its own: a JSON header, then arrays as their bytes."""

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


def send(connection: Connection, document: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Send a document and arrays by name."""
    arrays = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    described = {name: [array.dtype.name, array.shape] for name, array in arrays.items()}
    connection.send_bytes(json.dumps([document, described]).encode())
    for array in arrays.values():
        connection.send_bytes(array.tobytes())


def receive(connection: Connection) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `send` sent. Raises EOFError or OSError where the other side has ended."""
    document, described = json.loads(connection.recv_bytes())
    arrays = {}
    for name, (dtype, shape) in described.items():
        arrays[name] = np.frombuffer(connection.recv_bytes(), dtype).reshape(shape)
    return document, arrays
