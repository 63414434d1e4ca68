"""What the worker processes of one proxy tell each other, over the board: figures, load, and what the probes found.

One worker probes for all. When it dies another one does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from engines.base import Gauges, JSONObject, NodeFacts, Rank, Role

from ..metrics import Metrics
from ..nodes.fleet import Fleet
from ..nodes.node import Node, Share
from ..nodes.pairs import Verdict
from ..nodes.transfer import TransferWatch
from .board import Board

logger = logging.getLogger("pd_proxy.workers")

_SHARE_EVERY_S = 0.1
_NOTHING = (0, 0, 0, 0, 0, 0)
"""Of a node that a worker does not know: see `Share`."""
_TRY_TO_LEAD_EVERY_S = 0.25


class Sharing:
    """One worker's part in it."""

    def __init__(  # noqa: PLR0913, PLR0917  what is shared
        self,
        board: Board,
        metrics: Metrics,
        fleet: Fleet,
        watch: TransferWatch,
        before: Callable[[], object],
        after: Callable[[], object],
    ) -> None:
        """`before`: brings the metrics' gauges up to date; `after`: called when the others' load is known anew."""
        self._board = board
        self._metrics = metrics
        self._fleet = fleet
        self._watch = watch
        self._before = before
        self._after = after
        self._adopted_at = 0.0
        if board.inherited is not None:
            self._inherit(board.inherited)

    async def run(self) -> None:
        """Share for ever."""
        while True:
            self.share()
            await asyncio.sleep(_SHARE_EVERY_S)

    async def lead(self, run: Callable[[], Awaitable[None]]) -> None:
        """Run what one worker does for all, once this is the one; until then follow the one that is."""
        while not self._board.lead():
            self._adopt_findings()
            await asyncio.sleep(_TRY_TO_LEAD_EVERY_S)
        await run()

    def share(self) -> None:
        """Tell the others this worker's figures, and read theirs.

        Before every scrape too: a counter would fall if a worker died with what it alone knew and had told a scrape.
        """
        self._before()
        self._metrics.forget_nodes({node.spec.name for node in self._fleet})
        if self._board.is_shared:
            now = time.monotonic()
            shares = {
                node.spec.name: [
                    node.in_flight,
                    node.hand_offs,
                    node.handed_tokens,
                    round(node.live.count(now)),
                    node.live.streams,
                    node.held,
                ]
                for node in self._fleet
            }
            self._board.write({"metrics": self._metrics.snapshot(), "nodes": shares})
            self._board.read()
            self._take_in_the_others()
        self._after()

    def publish(self) -> None:
        """What probes and canary found, to the workers that do not ask; called after every finding here."""
        if self._board.is_shared and self._board.lead():
            nodes = {node.spec.name: self._finding(node) for node in self._fleet}
            pairs = [
                [prefill.spec.url, decode.spec.url, verdict.outcome, verdict.problem, verdict.lives]
                for (prefill, decode), verdict in self._fleet.pairs
            ]
            try:
                self._board.write_findings({"nodes": nodes, "pairs": pairs})
            except ValueError as exc:  # probing goes on
                logger.warning("the other workers are not told what the probes found: %s", exc)

    def _take_in_the_others(self) -> None:
        alive, all_rows = self._board.others(), self._board.others(alive=False)
        for node in self._fleet:
            now = [row["nodes"].get(node.spec.name, _NOTHING) for row in alive]
            ever = [row["nodes"].get(node.spec.name, _NOTHING) for row in all_rows]
            hand_offs, tokens = sum(share[1] for share in ever), sum(share[2] for share in ever)
            in_flight, live_tokens, streams, held = (sum(share[place] for share in now) for place in (0, 3, 4, 5))
            node.elsewhere = Share(in_flight, hand_offs, tokens, live_tokens, streams, held)

    def _inherit(self, row: JSONObject) -> None:
        """The row of a worker that died: its counts are ours now, its requests are gone."""
        self._metrics.adopt(row["metrics"])
        for node in self._fleet:
            _, node.hand_offs, node.handed_tokens, *_ = row["nodes"].get(node.spec.name, _NOTHING)

    def _finding(self, node: Node) -> JSONObject:
        gauges = node.gauges
        return {
            "url": node.spec.url,
            "probed_at": node.probed_at,
            "problem": node.problem,
            "ranks": [[rank.number, rank.engine_id, rank.of] for rank in node.ranks],
            "models": node.models,
            "version": node.version,
            "layout": dict(node.layout),
            "cache_tokens": node.cache_tokens,
            "life": node.life,
            "leaning": node.leaning,
            "gauges": [
                gauges.running, gauges.waiting, gauges.kv_usage, gauges.transferred, gauges.computed, gauges.cached,
                gauges.generated,
            ],
            "verdict": self._watch.verdict(node),
            "arrived": self._watch.arrived(node),
        }  # fmt: skip

    def _adopt_findings(self) -> None:
        self._board.read()
        found = self._board.findings()
        if found is None or found[0] <= self._adopted_at:
            return
        self._adopted_at, findings = found
        nodes = findings["nodes"]
        for node in self._fleet:
            finding = nodes.get(node.spec.name)
            if finding is None or finding["url"] != node.spec.url:
                continue
            if max(node.failed_at, node.probed_at) < finding["probed_at"]:  # what is known here may be newer
                self._adopt(node, finding)
        self._adopt_pairs(findings["pairs"])
        self._fleet.compare()
        self._fleet.saw_usable()
        self._after()

    def _adopt(self, node: Node, finding: JSONObject) -> None:
        node.leaning = finding["leaning"] and Role(finding["leaning"])
        node.probed_at = finding["probed_at"]
        if finding["problem"] is not None:
            node.failed(finding["problem"])
            return
        ranks = tuple(Rank(*rank) for rank in finding["ranks"])
        gauges = Gauges(*finding["gauges"])
        models, version, layout = tuple(finding["models"]), finding["version"], finding["layout"]
        node.ready(ranks, NodeFacts(models, gauges, version, layout, finding["cache_tokens"]))
        node.life = finding["life"]
        self._watch.adopt(node, finding["verdict"], finding["arrived"])

    def _adopt_pairs(self, found: list[list[Any]]) -> None:
        """By the addresses of their nodes: a name may be another node's by now."""
        nodes = {node.spec.url: node for node in self._fleet}
        self._fleet.pairs.adopt(
            ((nodes[prefill], nodes[decode]), Verdict(outcome, problem, tuple(lives)))
            for prefill, decode, outcome, problem, lives in found
            if prefill in nodes and decode in nodes
        )
