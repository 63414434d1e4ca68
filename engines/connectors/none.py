"""No connector: each node computes the prompts it answers. What pairs of nodes are compared with."""

from typing import NoReturn

from ..base import Rank


class NoConnector:
    """Ordinary nodes, seen from the proxy: all of them decode, and nothing is handed over."""

    moves_kv = False
    has_bootstrap = False
    is_best_effort = True
    needs_store = False
    transfer_engines = 0

    def hand_off(self, bootstrap: str | None, rank: Rank | None) -> NoReturn:
        """Raises TypeError: there are no prefill nodes (`topology.py`)."""
        del bootstrap, rank
        raise TypeError("nothing is handed over without a connector")
