"""The connectors by the name vLLM has for them."""

from typing import Literal

from ..base import Connector
from .mooncake import MooncakeConnector
from .mooncake_store import MooncakeStoreConnector
from .multi import MultiConnector
from .nixl import NixlConnector
from .none import NoConnector

ConnectorName = Literal["MooncakeConnector", "MooncakeStoreConnector", "MultiConnector", "NixlConnector", "none"]
LaunchedConnector = Literal["MooncakeConnector", "MooncakeStoreConnector", "MultiConnector", "none"]
"""Those that nodes can be started with here."""

CONNECTORS: dict[ConnectorName, Connector] = {
    "MooncakeConnector": MooncakeConnector(),
    "MooncakeStoreConnector": MooncakeStoreConnector(),
    "MultiConnector": MultiConnector(),
    "NixlConnector": NixlConnector(),
    "none": NoConnector(),
}
