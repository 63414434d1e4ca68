"""The connectors by the name vLLM has for them."""

from typing import Literal

from ..base import Connector
from .mooncake import MooncakeConnector
from .mooncake_store import MooncakeStoreConnector
from .nixl import NixlConnector

ConnectorName = Literal["MooncakeConnector", "MooncakeStoreConnector", "MultiConnector", "NixlConnector"]

CONNECTORS: dict[ConnectorName, Connector] = {
    "MooncakeConnector": MooncakeConnector(),
    "MooncakeStoreConnector": MooncakeStoreConnector(),
    "MultiConnector": MooncakeConnector(),  # its first child is the one that hands over
    "NixlConnector": NixlConnector(),
}
