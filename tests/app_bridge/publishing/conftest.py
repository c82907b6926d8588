"""A user of a hub, and what stands for the hub."""

from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants

from app_bridge.publishing import hub
from tests.app_bridge.publishing.hub_server import TOKEN, FakeApi


@pytest.fixture(autouse=True)
def user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with a token, whose client asks nothing of a hub on its own."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it needs a storage service of its own
    yield
    huggingface_hub.logging.set_verbosity_warning()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """What stands for the hub."""
    fake = FakeApi()
    monkeypatch.setattr(hub, "HfApi", lambda **_: fake)
    return fake
