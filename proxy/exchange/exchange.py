"""The life of one request, read and let in: attempts until one answers, or none may follow."""

import logging
import time

from engines.base import Role
from engines.openai.routes import HANDED_OFF, RESPONSES, Route

from ..errors import NodeError, NoNodeError
from ..nodes.node import Node
from . import retry
from .attempt import Attempt, StreamLostError
from .deliver import Delivery
from .plane import Client, DataPlane, Only, Request
from .presence import Presence
from .record import Record
from .resume import CannotContinueError, continued

logger = logging.getLogger("pd_proxy")


class Exchange:
    """One client request with its legs."""

    def __init__(  # noqa: PLR0913  what an exchange is about
        self,
        plane: DataPlane,
        request: Request,
        client: Client,
        presence: Presence,
        record: Record,
        *,
        avoid: set[Node] | None = None,
        continues: int = 0,
    ) -> None:
        """`avoid`: nodes that failed this request before; `continues`: how many nodes its stream has lost."""
        self._plane = plane
        self._request = request
        self._client = client
        self._presence = presence
        self._record = record
        self._avoid: set[Node] = avoid or set()
        self._continues = continues

    async def run(self) -> None:
        """Answer the client. Raises ProxyError, ClientGoneError; what a node answered, errors too, is passed on."""
        if not self._continues:
            self._plane.budget.deposit()
        route, reason = self._split()
        only = Only(decode=await self._node_of_previous())
        delivery = Delivery(self._plane, self._request, self._client, self._record)
        failure: NodeError | None = None
        for number in range(1, retry.MOST_ATTEMPTS + 1):
            attempt = Attempt(self._plane, self._request, self._presence, self._record, delivery, self._avoid, only)
            try:
                await self._until_some_node_is_usable(failure)
                await attempt.run(route, reason)
            except StreamLostError as exc:
                await self._continue(exc)
            except NodeError as exc:
                if number == retry.MOST_ATTEMPTS or not self._may_retry(exc, attempt.failing):
                    raise
                failure = exc
                self._note_retry(exc, number)
                continue
            except NoNodeError:
                if failure is None:
                    raise
                raise failure from None
            return

    async def _node_of_previous(self) -> Node | None:
        """The one node that can go on with a stored response. None: any; it says itself when it has none of that name.

        Raises NoNodeError when it cannot be asked.
        """
        previous = self._request.asked.body.get("previous_response_id")
        if self._request.path != RESPONSES.path or not isinstance(previous, str):
            return None
        return await self._plane.stored.node_of(previous)

    def _split(self) -> tuple[Route | None, str | None]:
        """The route of a hand-off, and why there is none after all: one node then does both phases."""
        route, asked = HANDED_OFF.get(self._request.path), self._request.asked
        if route is None:
            return None, "route"
        shortest = self._plane.settings.min_prefill_tokens
        return route, asked.reason or ("short-prompt" if asked.tokens < shortest else None)

    async def _until_some_node_is_usable(self, failure: NodeError | None) -> None:
        """Nodes that all went down together were most likely paused with their machine: wait a moment for them."""
        if failure is None:
            await self._plane.fleet.until_usable(Role.DECODE)
            if self._plane.settings.without_prefill == "refuse":
                await self._plane.fleet.until_usable(Role.PREFILL)

    def _may_retry(self, error: NodeError, failing: Node | None) -> bool:
        if failing is None or self._client.started or self._presence.gone is not None:
            return False
        alone_will_do = self._plane.settings.without_prefill == "aggregated"
        if not retry.may_retry(error, failing, self._plane.fleet, self._avoid, alone_will_do=alone_will_do):
            return False
        return self._plane.budget.withdraw()

    def _note_retry(self, error: NodeError, number: int) -> None:
        self._record.retries += 1
        self._plane.metrics.retries.count(error.reason)
        logger.warning("request %s: attempt %d failed, trying again: %s", self._request.id, number, error.for_the_log)

    async def _continue(self, lost: StreamLostError) -> None:
        """The rest of a stream, from other nodes. Raises the lost node's error when that cannot be had."""
        outcome, stage = "failed", self._record.begin("resume", lost.lost.spec.name)
        try:
            may = self._continues < retry.MOST_CONTINUATIONS and self._plane.budget.withdraw()
            if not may or not (lost.sent.is_finished or lost.sent.can_resume):
                raise lost.error
            logger.warning("request %s goes on without %s: %s", self._request.id, lost.lost.spec.name, lost.error)
            await self._resume(lost)
            outcome = "done"
        except CannotContinueError as exc:
            logger.warning("request %s could not go on without %s: %s", self._request.id, lost.lost.spec.name, exc)
            raise lost.error from exc
        finally:
            self._plane.metrics.resumed.count(outcome)
            stage.end("" if outcome == "done" else outcome)

    async def _resume(self, lost: StreamLostError) -> None:
        """Raises CannotContinueError, ClientGoneError."""
        rest = continued(self._request, self._client, lost, self._plane.fleet)
        if rest is None:
            return
        request, client = rest
        self._record.resumed += 1
        follower = Exchange(
            self._plane,
            request,
            client,
            self._presence,
            self._record,
            avoid={lost.lost},
            continues=self._continues + 1,
        )
        path, reason, status = self._record.path, self._record.reason, self._record.status
        try:
            await follower.run()
        except (NodeError, NoNodeError, ValueError) as exc:
            raise CannotContinueError(str(exc)) from exc
        finally:
            self._record.path, self._record.reason, self._record.status = path, reason, status
            self._record.ended = time.perf_counter()
