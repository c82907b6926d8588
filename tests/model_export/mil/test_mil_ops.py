"""Each operation against its oracle (mil_cases), run from a saved package's bytes.

In float32 and (where the operation takes fp16) as typed, where the result must be the oracle's, rounded to fp16 once.
"""

from typing import Any

import numpy as np
import pytest
from mil_cases import CASES, HALF, PROGRAMS, Case, Evaluate, differing, expected, halved

from model_export.mil.registry import supported

# Between fp16 numbers, thirds and quarters are often just in the middle of two others.
INTERPOLATED = {"upsample_bilinear", "resize_bilinear", "resize", "crop_resize", "resample"}


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_float32(index: int, evaluate: Evaluate) -> None:
    for got, wanted in zip(evaluate("float32", index), expected(CASES[index]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("index", HALF, ids=lambda index: str(CASES[index]))
def test_as_typed_is_rounded_once(index: int, evaluate: Evaluate) -> None:
    case = halved(CASES[index])

    def wide(values: dict[str, Any]) -> dict[str, Any]:  # the same numbers in more precision
        return {k: v.astype(np.float32) if getattr(v, "dtype", None) == np.float16 else v for k, v in values.items()}

    exact = Case(case.op, wide(case.inputs), wide(case.parameters), case.oracle, case.target)
    for got, wanted in zip(evaluate("as-typed", index), expected(exact), strict=True):
        if got.dtype != np.float16:
            np.testing.assert_array_equal(got, wanted)
            continue
        # A float32 result beside a rounding boundary may fall to the other side of it.
        slack = 2e-5 * np.abs(wanted) + 2e-6
        low, high = ((wanted + sign * slack).astype(np.float16) for sign in (-1, 1))
        missing = np.isnan(got) & np.isnan(low)
        assert (((low <= got) & (got <= high)) | missing).all(), (got, wanted)
        assert differing(got, wanted.astype(np.float16)) <= (0.1 if case.op in INTERPOLATED else 0.02)


def test_every_operation_has_a_case() -> None:
    tested = {case.op for case in CASES}
    assert {op for op in supported() if not op.startswith("constexpr_")} == tested | set(PROGRAMS)
