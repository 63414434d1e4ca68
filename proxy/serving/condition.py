"""How the proxy is, in a word: what `/health`, the page and a load balancer are told."""

from typing import Literal

from engines.base import Role

from ..nodes.fleet import Fleet
from ..nodes.transfer import TransferWatch
from ..settings import ProxySettings
from .shutdown import Shutdown
from .supervision import Supervisor

Word = Literal["ok", "degraded", "unavailable", "stopping"]


class Condition:
    """Judged when it is asked for."""

    def __init__(
        self,
        settings: ProxySettings,
        fleet: Fleet,
        watch: TransferWatch,
        supervisor: Supervisor,
        shutdown: Shutdown,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._watch = watch
        self._supervisor = supervisor
        self._shutdown = shutdown

    def can_serve(self) -> bool:
        """Requests are answered."""
        may_do_without = self._settings.without_prefill == "aggregated"
        return self._fleet.has(Role.DECODE) and (may_do_without or self._fleet.can_hand_over())

    def word(self) -> Word:
        """degraded: they are, but decode nodes compute prompts (no prefill node is usable, or KV does not move), the
        KV canary has fenced a pair, or a background task is down. stopping: they still are, but send no more.
        """
        if self._shutdown.has_begun:
            return "stopping"
        if not self.can_serve():
            return "unavailable"
        fleet, pairs = self._fleet, self._fleet.pairs
        stuck = any(self._watch.verdict(node) == "not moving" for node in fleet.of(Role.DECODE))
        fenced = pairs.are_any_fenced and any(pairs.is_fenced(*pair) for pair in fleet.usable_pairs())
        is_whole = bool(fleet.usable_pairs()) or not fleet.connector.moves_kv
        return "ok" if is_whole and not stuck and not fenced and not self._supervisor.down else "degraded"
