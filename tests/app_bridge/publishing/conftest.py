"""The local hub's fixture."""

from tests.app_bridge.publishing.hub_server import server

__all__ = ["server"]
