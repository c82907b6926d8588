"""States. Semantics: coremltools defs `iOS18/states.py`; saved, a `coreml_update_state` is a `write_state`."""

import torch

from ..registry import Kernel, Node, StateCell, Unsupported, mil_op


@mil_op("read_state", since="CoreML8")
def read_state(node: Node) -> Kernel:
    """What the state holds now. Nothing writes over it, so that it is no copy."""
    if node.state_type("input") != node.type:
        raise Unsupported(f"a state of {node.state_type('input')} read as {node.type}")
    return node.kernel(lambda state: state.tensor, "input", exact=True, keeps=True)


@mil_op("write_state", since="CoreML8")
def write_state(node: Node) -> Kernel:
    if node.state_type("input") != node.type_of("data"):
        raise Unsupported(f"{node.type_of('data')} written to a state of {node.state_type('input')}")

    def run(state: StateCell, data: torch.Tensor) -> tuple[()]:
        state.tensor, state.owned = data, False
        return ()

    return node.kernel(run, "input", "data", exact=True, keeps=True)


@mil_op("coreml_update_state", since="CoreML8")
def coreml_update_state(node: Node) -> Kernel:
    """Both in one, as coremltools' own programs have it before they are saved."""
    if not node.state_type("state") == node.type_of("value") == node.type:
        raise Unsupported(f"{node.type_of('value')} written to a state of {node.state_type('state')}")

    def run(state: StateCell, value: torch.Tensor) -> torch.Tensor:
        state.tensor, state.owned = value, False
        return value

    return node.kernel(run, "state", "value", exact=True, keeps=True)
