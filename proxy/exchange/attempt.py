"""One try at answering a request: choose, prefill, choose decode again if it has failed meanwhile, decode."""

import time
from collections.abc import Callable

from engines.base import JSONObject, Prefilled, PrefillRefusedError, Rank, Role
from engines.openai import continuation
from engines.openai.continuation import SentTokens
from engines.openai.errors import error_in
from engines.openai.routes import CHAT, Route

from ..errors import (
    NodeAnsweredError,
    NodeError,
    NodeFullError,
    NodeRefusedError,
    NodeRejectsKeyError,
    NoNodeError,
    NotServedError,
)
from ..nodes.node import Lease, Node
from ..routing.prefill import Audit
from ..routing.prompts import Prompt
from ..routing.split import Outlook
from ..upstream.client import Answer
from ..upstream.deadline import Deadline
from .deliver import Delivery
from .handoff import PinnedKV, State
from .leg import Leg, rules_for
from .plane import DataPlane, Only, Request
from .presence import Presence, let_end, see_off
from .record import REFUSED, Record, Stage, StageName


class StreamLostError(Exception):
    """A stream's node was lost in the middle; all leases and legs of it are closed. `sent` says what the client has."""

    def __init__(self, error: NodeError, lost: Node, prefilled: Prefilled, sent: SentTokens) -> None:
        super().__init__(str(error))
        self.error = error
        self.lost = lost
        self.prefilled = prefilled
        self.sent = sent


class _OnlyTheHolderIsLeftError(Exception):
    """The one node that could decode computed the prompt: it answers alone, for it cannot hand over to itself."""


class Attempt:
    """One hand-off at most, on nodes chosen once. A further attempt is a new object."""

    def __init__(  # noqa: PLR0913, PLR0917  what an exchange has
        self,
        plane: DataPlane,
        request: Request,
        presence: Presence,
        record: Record,
        delivery: Delivery,
        avoid: set[Node],
        only: Only | None = None,
    ) -> None:
        self.failing: Node | None = None
        """Where the last leg went."""
        self._holder: Node | None = None
        """The prefill node that has been asked to hold the KV."""
        self._plane = plane
        self._engine = plane.fleet.engine
        self._request = request
        self._presence = presence
        self._record = record
        self._delivery = delivery
        self._avoid = avoid
        self._only = only or Only()
        self._prompt = Prompt()
        self._prefilling: Stage | None = None

    async def run(self, route: Route | None, reason: str | None) -> None:
        """Answer the client. `reason`: why one node does both phases; None for a hand-off on `route`.

        Raises NodeError, NoNodeError, StreamLostError; what a node refused is passed on or raised as it put it.
        """
        self._record.attempts += 1
        self._prompt = self._look_at_prompt(is_handed_over=route is not None and reason is None)
        node = self._choose_decode()
        with node.lease(for_request=True, tokens=self._prompt.tokens) as seat:
            if route is not None and reason is None:
                reason = await self._disaggregated(seat, route)
            if reason is not None:
                self._presence.check()
                await self._aggregated(seat, route, reason)

    async def _aggregated(self, seat: Lease, route: Route | None, reason: str) -> None:
        """One node does both phases with the client's own body."""
        record, request, node = self._record, self._request, seat.node
        record.path, record.reason = "aggregated", reason
        leg = self._leg(node, "aggregated")
        try:
            deadline = Deadline(self._plane.settings.whole_answer_timeout_s, "answer", is_everybodys=True)
            answer = await leg.open(request.asked.body, request.headers, deadline)
            rules = rules_for(route.events if route else None, answer.headers)
            first = await leg.first_event(rules)
            if answer.status == 404 and b'"error"' not in first:  # the node's server knows no such route
                raise NotServedError(f"{request.path} is not served here")
            if answer.status != 200 or rules is None:
                rest = await leg.load()
                leg.stage.end("" if answer.status == 200 else REFUSED)
                self._presence.check()
                self._delivery.pass_on(answer.status, answer.headers, first + rest)
                return
            waited = leg.stage
            leg.goes_on("decode")
            record.first_event = waited.ended
            if self._plane.split.is_wanted:
                uncached = self._prompt.tokens - self._plane.decodes.cached(node, self._prompt)
                self._plane.split.alone.add(uncached, waited.ended - waited.began)
            self._decodes(seat)
            await self._delivery.relay(leg, answer, first, route, None)
            leg.stage.end()
        finally:
            leg.close()

    async def _disaggregated(self, seat: Lease, route: Route) -> str | None:
        """Prefill, hand over, decode. What it returns is why the prompt must go to one node after all."""
        self._record.path, self._record.reason = "disaggregated", None
        prefill = self._choose_prefill(seat.node)
        if prefill is None:
            return "no-prefill"
        self._holder = prefill
        rank = self._rank_of(prefill)
        if rank is not None and rank.of > 1 and not route.takes_rank:
            return "data-parallel"
        if self._would_kill(seat.node, prompt_tokens=1):
            return "may-be-refused"
        if self._is_faster_alone(prefill, rank, seat.node):
            return "faster-alone"
        hand_off = self._plane.fleet.connector.hand_off(prefill.spec.bootstrap, rank)
        model = self._request.asked.body.get("model")
        with PinnedKV(hand_off, prefill, model, self._plane.releaser, self._record) as kv:
            self._record.transfer_id = kv.id
            prefilled = await self._counted_prefill(prefill, rank, route, kv, dies_of_refusals=self._dies(seat.node))
            if isinstance(prefilled, str):
                return prefilled
            self._record.prompt_tokens = prefilled.prompt_tokens
            seat.holds(prefilled.prompt_tokens)
            self._presence.check()
            if self._would_kill(seat.node, prefilled.prompt_tokens):
                return "may-be-refused"
            try:
                await self._decode(seat, route, kv, prefilled)
            except _OnlyTheHolderIsLeftError:
                seat.move(prefill)
                return "no-other-node"
        return None

    def _is_faster_alone(self, prefill: Node, rank: Rank | None, decode: Node) -> bool:
        """Whether a decode node alone has its first token sooner. Never for one that is bound to certain nodes."""
        plane, prompt = self._plane, self._prompt
        if not plane.split.is_wanted or self._only.prefill is not None:
            return False
        backlog_s, uncached = plane.prefills.outlook(prefill, rank, prompt)
        uncached_at_decode = prompt.tokens - plane.decodes.cached(decode, prompt)
        streams = decode.live.streams + decode.elsewhere.streams
        return plane.split.is_faster_alone(Outlook(prompt.tokens, uncached, backlog_s, uncached_at_decode, streams))

    # -- prefill

    def _look_at_prompt(self, *, is_handed_over: bool) -> Prompt:
        """What the choice of nodes looks at."""
        asked, same = self._request.asked, self._request.same_prompt
        session = next((value for name, value in self._request.headers if name == b"x-session-id"), b"")
        prefills = self._plane.prefills
        with_keys = (is_handed_over and prefills.looks_at_prompts) or self._plane.decodes.looks_at_prompts
        if same is None:
            return prefills.read(asked.body, asked.tokens, session, with_keys=with_keys)
        if same.prompt is None:
            same.prompt = prefills.read(asked.body, asked.tokens, session, with_keys=with_keys)
        return same.prompt

    async def _counted_prefill(
        self, node: Node, rank: Rank | None, route: Route, kv: PinnedKV, *, dies_of_refusals: bool
    ) -> Prefilled | str:
        """`_prefill`, on the node's account while it lasts."""
        plane = self._plane
        backlog_s, _ = plane.prefills.outlook(node, rank, self._prompt) if plane.split.is_wanted else (0.0, 0.0)
        with node.lease(for_request=True), plane.prefills.sent(node, rank, self._prompt) as sent:
            prefilled = await self._prefill(node, rank, route, kv, dies_of_refusals=dies_of_refusals)
            sent.prefilled = None if isinstance(prefilled, str) else prefilled
        self._note_cached(node, sent.prefilled, sent.audit)
        if sent.prefilled is not None and plane.split.is_wanted:
            uncached = sent.prefilled.prompt_tokens - (sent.prefilled.cached_tokens or 0)
            stage = self._prefilling
            took_s = stage.ended - stage.began if stage is not None else 0.0
            plane.split.prefill.add(max(uncached, 0), max(took_s - backlog_s, 0.0))
        return prefilled

    def _note_cached(self, node: Node, prefilled: Prefilled | None, audit: Audit | None) -> None:
        stage = self._prefilling
        if stage is not None and prefilled is not None:
            stage.tokens, stage.cached = prefilled.prompt_tokens, prefilled.cached_tokens
            stage.predicted = audit.predicted if audit is not None else None
        if audit is not None:
            metrics, name = self._plane.metrics, node.spec.name
            metrics.prefix_predictions.count(name, audit.outcome)
            metrics.prefix_predicted_tokens.count(name, by=audit.predicted)
            metrics.prefix_cached_tokens.count(name, by=audit.cached)

    def _choose_prefill(self, decode: Node) -> Node | None:
        """None when decode nodes must do without. Raises NoNodeError when they shall not."""
        may_do_without = self._plane.settings.without_prefill == "aggregated"
        same = self._request.same_prompt
        if same is not None and same.node is not None and self._may_take(same.node, decode):
            return same.node
        try:
            node = self._only_or(Role.PREFILL, lambda: self._cheapest_prefill(decode))
        except NoNodeError:
            if not may_do_without:
                raise
            return None
        if may_do_without and node in self._avoid:
            return None
        if same is not None:
            same.node, same.rank = node, None
        return node

    def _may_take(self, prefill: Node, decode: Node) -> bool:
        is_well = prefill.usable and prefill not in self._avoid and prefill.breaker.admits(time.monotonic())
        return is_well and prefill is not decode and not self._plane.fleet.pairs.is_fenced(prefill, decode)

    def _cheapest_prefill(self, decode: Node) -> Node:
        return self._plane.prefills.choose(self._prompt, self._avoid, self._request.asked.body.get("model"), decode)

    def _rank_of(self, node: Node) -> Rank | None:
        same = self._request.same_prompt
        rank = next((rank for rank in node.ranks if same is not None and rank.number == same.rank), None)
        rank = rank or self._plane.prefills.rank_of(node, self._prompt)
        if same is not None and rank is not None:
            same.rank = rank.number
        return rank

    async def _prefill(
        self, node: Node, rank: Rank | None, route: Route, kv: PinnedKV, *, dies_of_refusals: bool
    ) -> Prefilled | str:
        """What the node's answer promises; or why it holds nothing, and a node is to be given the client's own body.

        A leg that was sent is never cut off for the request's deadline, and for a client that left only after a while:
        the engine cannot interrupt a step, and the step that makes the one token ends the request by length before it
        hears of the abort; nobody would know of the KV that is then held.
        """
        headers = self._request.headers
        if rank is not None and rank.of > 1:
            headers = [*headers, (b"x-data-parallel-rank", str(rank.number).encode())]
        asked = self._request.asked
        judges_all = dies_of_refusals or bool(route.events.opening_names)
        body = self._engine.prefill_leg(route, asked, kv.prefill_params, judges_all=judges_all)
        deadline = Deadline(self._plane.settings.prefill_timeout_s, "finish its prefill", is_everybodys=True)
        leg = self._leg(node, "prefill")
        kv.stage = self._prefilling = leg.stage
        try:
            with self._presence.on_leave(see_off(deadline)):
                answer = await leg.open(body, headers, deadline, kv.sent)
                raw = await leg.load()
            leg.stage.end("" if answer.status == 200 else REFUSED)
        except NodeError as exc:
            if kv.state is State.SENT and _holds_nothing(exc):
                kv.not_held()
            self._presence.check()
            raise
        finally:
            leg.close()
        if answer.status != 200:  # a refusal of *our* body is no refusal of the client's
            kv.not_held()
            return "prefill-refused"
        try:
            prefilled = self._engine.prefilled(route, raw)
            kv.pinned(prefilled.answer)
        except PrefillRefusedError:
            kv.not_held()
            return "prefill-stopped"
        return prefilled

    # -- decode

    async def _decode(self, seat: Lease, route: Route, kv: PinnedKV, prefilled: Prefilled) -> None:
        asked = self._request.asked
        stream = self._streams(route)
        body = self._engine.decode_leg(route, asked, kv.decode_params, prefilled, stream=stream)
        sent = self._noting_tokens(route, body, prefilled)
        leg, answer, deadline = await self._hand_over(seat, body, kv, is_stream=stream)
        try:
            if not stream:
                await self._deliver_whole(leg, answer, seat, kv, prefilled)
                return
            first = await self._first_event(leg, route, answer, kv, deadline)
            if answer.status != 200:
                raw = first + await leg.load()
                leg.stage.end(REFUSED)
                self._refuse(kv, answer.status, raw)
                self._presence.check()
                self._delivery.pass_on(answer.status, answer.headers, raw)
                return
            self._took(seat, leg, kv, prefilled)
            self._presence.check()  # the engine has it, and its abort frees the KV
            if asked.body.get("stream"):
                await self._relay(leg, answer, first, route, prefilled, sent)
            else:
                await self._delivery.collect(leg, answer, first, route)
            leg.stage.end()
        finally:
            leg.close()

    async def _hand_over(
        self, seat: Lease, body: JSONObject, kv: PinnedKV, *, is_stream: bool
    ) -> tuple[Leg, Answer, Deadline]:
        """Send the decode leg. A node that has failed since it was chosen, or takes no connection, has not seen the
        hand-off: another one gets it.

        A leg on its way is not cut off at once for a client that leaves: until the answer's head is here nobody knows
        whether the node's engine has it, and of a request whose connection closes before its handler runs the engine
        never hears. One that does not stream says nothing before its end, and is never cut off (see collect.py).
        """
        settings = self._plane.settings
        while True:
            self._choose_decode_again(seat)
            leg = self._leg(seat.node, "hand-off")
            limit_s = settings.decode_start_timeout_s if is_stream else settings.whole_answer_timeout_s
            deadline = Deadline(limit_s, "answer", is_everybodys=not is_stream)
            policy = see_off(deadline) if is_stream and not self._dies(seat.node) else let_end
            try:
                with self._presence.on_leave(policy):
                    answer = await leg.open(body, self._request.headers, deadline, kv.offered)
            except NodeError as exc:
                leg.close()
                self._judge_failure(kv, exc)
                self._presence.check()
                if exc.maybe_received or not self._has_other_decode():
                    raise
            except BaseException:
                leg.close()
                raise
            else:
                return leg, answer, deadline

    def _would_kill(self, node: Node, prompt_tokens: int) -> bool:
        """Whether the node may refuse the request, and is of a version that dies of refusing a hand-off. Refused
        without one, it lives on.
        """
        if not self._dies(node):
            return False
        asked = self._request.asked
        longest = self._plane.fleet.max_model_len(asked.body.get("model"))
        return self._engine.may_refuse(asked, prompt_tokens, longest)

    def _dies(self, node: Node) -> bool:
        """It does when it refuses a hand-off, and when a client leaves one that waits to be scheduled."""
        return not self._engine.survives_refusals(node.version)

    def _choose_decode_again(self, seat: Lease) -> None:
        """No decode node has seen this hand-off yet, so nothing binds it to the one chosen before the prefill."""
        node = seat.node  # one that is drained meanwhile finishes what it was chosen for
        if node in self._avoid or not node.is_well or node.breaker.is_resting(time.monotonic()):
            holder = self._holder
            try:
                other = self._choose_decode(holder)
            except NoNodeError as exc:
                if holder is not None and holder.usable and holder.spec.role.does(Role.DECODE):
                    raise _OnlyTheHolderIsLeftError from exc
                raise
            if other is not node:
                seat.move(other)

    async def _first_event(self, leg: Leg, route: Route, answer: Answer, kv: PinnedKV, deadline: Deadline) -> bytes:
        """Until it is here nobody knows whether the engine has the request, so a client that left is still waited for
        a while: what is refused after the engine's server has said 200 never reached the engine, and nothing was freed
        (seen on a live pair with `logprobs` above the limit).
        """
        policy = let_end if self._dies(leg.node) else see_off(deadline)
        try:
            with self._presence.on_leave(policy):
                return await leg.first_event(rules_for(route.events, answer.headers))
        except (NodeRefusedError, NodeFullError):
            kv.refused(freed=False)
            raise
        except NodeError:
            self._presence.check()
            raise

    async def _deliver_whole(self, leg: Leg, answer: Answer, seat: Lease, kv: PinnedKV, prefilled: Prefilled) -> None:
        with self._presence.on_leave(let_end):
            raw = await leg.load()
        if answer.status == 200:
            self._took(seat, leg, kv, prefilled)
            leg.stage.end()
        else:
            leg.stage.end(REFUSED)
            self._refuse(kv, answer.status, raw)
        self._presence.check()
        self._delivery.pass_on(answer.status, answer.headers, raw)

    async def _relay(  # noqa: PLR0913, PLR0917  a stream and what would go on with it
        self, leg: Leg, answer: Answer, first: bytes, route: Route, prefilled: Prefilled, sent: SentTokens | None
    ) -> None:
        try:
            await self._delivery.relay(leg, answer, first, route, sent)
        except NodeError as exc:
            if sent is None:
                raise
            raise StreamLostError(exc, leg.node, prefilled, sent) from exc

    def _streams(self, route: Route) -> bool:
        """Whether the decode leg is a stream: the client's own, or one collected here for a client that wants none.

        Tool calls are parsed by the node, and by another parser in a stream; a client that asked for a whole answer
        gets the one of the whole answer's parser. And no stream of a chat can echo: vLLM 0.32 fails on it.
        """
        body = self._request.asked.body
        only_whole = body.get("tools") or body.get("functions") or (route is CHAT and body.get("echo"))
        return bool(body.get("stream")) or (route.collects and not only_whole)

    def _noting_tokens(self, route: Route, leg_body: JSONObject, prefilled: Prefilled) -> SentTokens | None:
        """Have the decode leg tell its tokens, if its stream is one that could go on without its node."""
        asked = self._request.asked.body
        if not self._plane.settings.resume or prefilled.token_ids is None or not self._request.asked.is_text:
            return None
        if not continuation.can_be_continued(route, asked):
            return None
        self._engine.tell_tokens(leg_body)
        return SentTokens(hide=not asked.get("return_token_ids"), needs_text=route is CHAT)

    def _took(self, seat: Lease, leg: Leg, kv: PinnedKV, prefilled: Prefilled) -> None:
        """The decode node's first event is here."""
        waited = leg.stage
        leg.goes_on("decode")
        kv.taken()
        seat.node.handed_over(prefilled.prompt_tokens)
        self._decodes(seat)
        self._record.first_event = waited.ended
        if self._plane.split.is_wanted:
            self._plane.split.hand_off.add(prefilled.prompt_tokens, waited.ended - waited.began)

    def _decodes(self, seat: Lease) -> None:
        """Its node has the prompt, and what it looks like matters no more: a stream may be long."""
        seat.generates()
        self._plane.decodes.has(seat.node, self._prompt)
        self._prompt = Prompt()

    def _judge_failure(self, kv: PinnedKV, error: NodeError) -> None:
        """What a failed decode leg means for the hand-off; nothing when it is unknown."""
        if kv.state is not State.OFFERED:
            return
        if isinstance(error, NodeAnsweredError):
            if error.is_the_nodes_own:
                self._refuse(kv, error.status, error.body)
        elif isinstance(error, NodeRejectsKeyError):
            kv.refused(freed=False)

    def _refuse(self, kv: PinnedKV, status: int, body: bytes) -> None:
        kind = str(error_in(body).get("type", ""))
        kv.refused(freed=self._engine.is_freed_by_refusal(status, kind))

    def _choose_decode(self, partner: Node | None = None) -> Node:
        """Raises NoNodeError."""
        decodes, model = self._plane.decodes, self._request.asked.body.get("model")
        return self._only_or(Role.DECODE, lambda: decodes.choose(self._prompt, self._avoid, model, partner))

    def _only_or(self, role: Role, chosen: Callable[[], Node]) -> Node:
        """Raises NoNodeError."""
        only = self._only.of(role)
        if only is not None:
            if not only.is_well:
                raise NoNodeError(f"only {only.spec.name} can answer this: {only.why_not}")
            return only
        return chosen()

    def _has_other_decode(self) -> bool:
        fleet, holder = self._plane.fleet, self._holder
        others = [node for node in fleet.of(Role.DECODE) if node.usable and node not in {*self._avoid, holder}]
        return any(holder is None or not fleet.pairs.is_fenced(holder, node) for node in others)

    def _leg(self, node: Node, stage: StageName) -> Leg:
        self.failing = node
        return Leg(self._plane, node, self._request.path, self._presence, self._record, self._avoid, stage)


def _holds_nothing(error: NodeError) -> bool:
    """Whether a prefill leg that failed so has left nothing: a full queue, a wrong key, nothing sent."""
    if isinstance(error, NodeAnsweredError):
        return error.status in (429, 503)
    return isinstance(error, NodeRejectsKeyError) or not error.maybe_received
