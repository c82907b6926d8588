"""coremltools, imported when it is needed and without the chatter that means nothing to a user."""

import contextlib
import gc
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator
from functools import cache, partialmethod
from types import ModuleType
from typing import Any

import numpy as np

# Off macOS the framework's proxies cannot load and are not needed; the versions that coremltools has not tested are
# the project's pins, which the project's own tests cover.
_NOISE = ("has not been tested with coremltools", "is not supported. Minimum required version")
_NOISE_OFF_MAC = ("Failed to load _ML",)

# coremltools imports these only to see whether they are there: for scikit-learn's models, of versions before this
# project's pin, and for its own tests. They take 2 s and 0.1 GB.
_NOT_NEEDED = ("sklearn", "transformers")


def _is_news(record: logging.LogRecord) -> bool:
    noise = _NOISE if sys.platform == "darwin" else _NOISE + _NOISE_OFF_MAC
    return not any(part in record.getMessage() for part in noise)


@cache
def coremltools() -> ModuleType:
    """The coremltools module, imported without packages that it has no use for here, and without the lines that it logs
    at import off macOS."""
    logging.getLogger("coremltools").addFilter(_is_news)
    absent = [name for name in _NOT_NEEDED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: the import says that there is none
    try:
        import coremltools as module
    finally:
        for name in absent:
            del sys.modules[name]
    return module


@contextlib.contextmanager
def quiet_conversion() -> Iterator[None]:
    """Keep progress bars and deprecation warnings of torch.export and coremltools off stderr."""
    import tqdm

    original: Any = tqdm.tqdm.__init__
    tqdm.tqdm.__init__ = partialmethod(original, disable=True)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        tqdm.tqdm.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def quick_conversion() -> Iterator[None]:
    """Spare torch.export and coremltools work that changes nothing: the search for cyclic garbage among objects that
    exist already, and copies of each constant to see whether float16 holds it (half of a conversion's time)."""
    precision = coremltools().transform.FP16ComputePrecision
    original = precision.fp16_overflow
    precision.fp16_overflow = staticmethod(lambda operation: not _fits_float16(operation) and original(operation))
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        precision.fp16_overflow = staticmethod(original)


def _fits_float16(operation: Any) -> bool:
    """Whether all constants that an operation takes are within float16's range. False if one isn't a number."""
    largest = np.finfo(np.float16).max
    given = (item if isinstance(item, (list, tuple)) else (item,) for item in operation.inputs.values())
    constants = (
        variable.val
        for variable in itertools.chain.from_iterable(given)
        if variable.op is not None and variable.op.op_type == "const" and variable.is_tensor_or_scalar_of(dtype="fp32")
    )
    return all(-largest <= np.min(value) <= np.max(value) <= largest for value in constants if np.size(value))
