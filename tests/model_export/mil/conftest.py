"""The packages of all operations' cases, saved once a session."""

from typing import Any

import pytest
from mil_cases import Evaluate, evaluator


@pytest.fixture(scope="session")
def evaluate(shared: Any) -> Evaluate:
    """`evaluate(compute, index) -> outputs` of a case."""
    return evaluator(shared)
