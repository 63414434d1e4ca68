"""The KV that one prefill leg may leave on its node, from the moment its id is made until nobody holds anything.

    minted ──▶ sent ──▶ pinned ──▶ offered ──▶ taken       the decode node has it, and frees it
                 │         │          ├──────▶ refused     the decode node refused the request, and freed it
                 │         │          └──────▶ unknown     it may have it: expires on the prefill node by itself
                 │         └─────────────────▶ given-back  no decode node was told of it: released
                 ├───────────────────────────▶ not-held    the prefill node holds nothing
                 └───────────────────────────▶ unknown     it may hold something: expires by itself

Two engine requests under one id leak the first one's KV for good, so an object is used for one attempt only, and is
settled exactly once, by its context manager at the latest.
"""

from enum import StrEnum
from types import TracebackType
from typing import Self

from engines.base import HandOff, JSONObject

from ..nodes.node import Node
from .record import Record, Stage
from .release import Releaser


class State(StrEnum):
    """Where the KV is, as far as the proxy can know."""

    MINTED = "minted"
    SENT = "sent"
    PINNED = "pinned"
    OFFERED = "offered"
    TAKEN = "taken"
    REFUSED = "refused"
    GIVEN_BACK = "given-back"
    UNKNOWN = "unknown"
    NOT_HELD = "not-held"


SETTLED = frozenset({State.TAKEN, State.REFUSED, State.GIVEN_BACK, State.UNKNOWN, State.NOT_HELD})

_HELD = frozenset({State.PINNED, State.OFFERED})
"""The prefill node keeps it for a decode node."""
_AT_THE_END = {
    State.MINTED: State.NOT_HELD,
    State.SENT: State.UNKNOWN,
    State.PINNED: State.GIVEN_BACK,
    State.OFFERED: State.UNKNOWN,
}
"""What it is when the attempt ends without saying."""


class PinnedKV:
    """One hand-off of one attempt; a context manager that settles it."""

    __slots__ = ("_decode_params", "_hand_off", "_holder", "_model", "_record", "_releaser", "stage", "state")

    def __init__(self, hand_off: HandOff, holder: Node, model: object, releaser: Releaser, record: Record) -> None:
        """`holder`: the prefill node."""
        self._hand_off = hand_off
        self._holder = holder
        self._model = model
        self._releaser = releaser
        self._record = record
        self.stage: Stage | None = None
        """The prefill that leaves it."""
        self._decode_params: JSONObject | None = None
        self.state = State.MINTED

    def __repr__(self) -> str:
        return f"<KV {self.id or 'without an id'}: {self.state}>"

    @property
    def id(self) -> str | None:
        """What both nodes know it by."""
        params = self._hand_off.prefill_params() or {}
        return params.get("transfer_id")

    @property
    def prefill_params(self) -> JSONObject | None:
        """`kv_transfer_params` of the prefill leg."""
        return self._hand_off.prefill_params()

    @property
    def decode_params(self) -> JSONObject | None:
        """`kv_transfer_params` of the decode leg; known once it is pinned."""
        return self._decode_params

    def sent(self) -> None:
        """The prefill node may have the request."""
        self._move(State.MINTED, State.SENT)

    def not_held(self) -> None:
        """The prefill node said that it holds nothing: it refused, failed, or ended the request early."""
        self._move(State.SENT, State.NOT_HELD)

    def pinned(self, prefill_answer: JSONObject) -> None:
        """The prefill node holds the KV. Raises PrefillRefusedError when its answer does not say where."""
        self._decode_params = self._hand_off.decode_params(prefill_answer)
        self._move(State.SENT, State.PINNED)

    def offered(self) -> None:
        """A decode node may have been told of it: from here on only that node's words count."""
        self._move(State.PINNED, State.OFFERED)

    def taken(self) -> None:
        """The decode node runs the request; it frees the KV, however the request ends."""
        self._move(State.OFFERED, State.TAKEN)

    def refused(self, *, freed: bool) -> None:
        """The decode node refused the request. `freed`: it told its engine, which freed the KV; else none has it."""
        self._move(State.OFFERED, State.REFUSED if freed else State.PINNED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state in _AT_THE_END:
            self._move(self.state, _AT_THE_END[self.state])

    def _move(self, before: State, after: State) -> None:
        if self.state is not before:
            raise RuntimeError(f"{self!r} cannot become {after}")
        if not self._hand_off.pins_kv and after in (State.GIVEN_BACK, State.UNKNOWN):
            after = State.NOT_HELD
        self.state = after
        if self.stage is not None:
            self.stage.kv = after
        if self._hand_off.pins_kv:
            self._holder.held += (after in _HELD) - (before in _HELD)
        if after is State.GIVEN_BACK and self._decode_params is not None:
            stage = self._record.begin("release", self._holder.spec.name)
            self._releaser.release(self._holder, self._model, self._decode_params, stage)
        if after in SETTLED:
            self._releaser.settled(after)
