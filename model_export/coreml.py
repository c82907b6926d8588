"""coremltools, imported when it is needed and without the chatter that means nothing to a user."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from functools import cache, partialmethod
from types import ModuleType
from typing import Any

# Off macOS the framework's proxies cannot load and are not needed; the versions that coremltools has not tested are
# the project's pins, which the project's own tests cover.
_NOISE = ("has not been tested with coremltools", "is not supported. Minimum required version")
_NOISE_OFF_MAC = ("Failed to load _ML",)


def _is_news(record: logging.LogRecord) -> bool:
    noise = _NOISE if sys.platform == "darwin" else _NOISE + _NOISE_OFF_MAC
    return not any(part in record.getMessage() for part in noise)


@cache
def coremltools() -> ModuleType:
    """The coremltools module. Its import takes 2-3 s; the lines that it logs at import off macOS are dropped here."""
    logging.getLogger("coremltools").addFilter(_is_news)
    import coremltools as module

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
