"""The connections to each node: made when first needed, closed when their node has gone."""

from ..upstream.client import NodeClient
from .fleet import Fleet
from .node import Node


class NodeClients:
    """The HTTP client of each node."""

    def __init__(self, fleet: Fleet, connect_timeout_s: float) -> None:
        self._fleet = fleet
        self._connect_timeout_s = connect_timeout_s
        self._clients: dict[Node, NodeClient] = {}

    def of(self, node: Node) -> NodeClient:
        client = self._clients.get(node)
        if client is None:
            self._forget_the_gone()
            client = NodeClient(node.spec.name, node.spec.url, self._connect_timeout_s)
            self._clients[node] = client
        return client

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _forget_the_gone(self) -> None:
        for node in self._clients.keys() - set(self._fleet):
            if not node.in_flight:
                self._clients.pop(node).close()
