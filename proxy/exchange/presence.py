"""Is anybody waiting for the answer? When nobody is any more, that is an event; what becomes of a leg is a policy."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal

from ..errors import ClientGoneError, LateError
from ..upstream.deadline import Deadline

Why = Literal["client-left", "late"]
Policy = Callable[[Why], object]

SEE_OFF_S = 5.0
"""How long a leg that makes or takes KV may go on for a client that has left."""


def let_end(why: Why) -> None:
    """The leg goes on to its own end: cutting it would leave KV that nobody knows of."""
    del why


def see_off(deadline: Deadline) -> Policy:
    """Of a client that left, a leg that ends soon is let end; one that does not waits in the node's queue, or is long,
    and an abort comes in time, most likely. The request's own deadline only answers the client: the leg has its own.
    """

    def policy(why: Why) -> None:
        if why == "client-left":
            deadline.within(SEE_OFF_S)

    return policy


class Presence:
    """Whoever waits for one request's answer. The task that makes the answer is cancelled when nobody waits any more,
    unless a policy in force says otherwise.
    """

    __slots__ = ("_policy", "_task", "_timeout_s", "gone")

    def __init__(self, timeout_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  a request is answered in a task
        self._task = task
        self._timeout_s = timeout_s
        self._policy: Policy = self._cancel
        self.gone: Why | None = None

    def end(self, why: Why) -> None:
        """Nobody waits any more; called once or several times, the first counts."""
        if self.gone is None:
            self.gone = why
            self._policy(why)

    def on_leave(self, policy: Policy) -> AbstractContextManager[None]:
        """What happens should nobody wait any more meanwhile; outside of it the task is cancelled."""
        return _InForce(self, policy)

    def check(self) -> None:
        """Raises ClientGoneError or LateError when nobody waits."""
        if self.gone is not None:
            raise self.error()

    def error(self) -> Exception:
        """Why there is nobody to answer."""
        if self.gone == "late":
            return LateError(f"the request was not answered in {self._timeout_s:g} s")
        return ClientGoneError()

    def is_cause_of_cancellation(self) -> bool:
        """Whether the task was cancelled for this, and not from outside; if so, that is taken back."""
        if self.gone is None:
            return False
        self._task.uncancel()
        return True

    def _cancel(self, why: Why) -> None:
        del why
        self._task.cancel()


class _InForce(AbstractContextManager[None]):
    __slots__ = ("_before", "_policy", "_presence")

    def __init__(self, presence: Presence, policy: Policy) -> None:
        self._presence = presence
        self._policy = policy

    def __enter__(self) -> None:
        self._before = self._presence._policy  # noqa: SLF001  one unit
        self._presence._policy = self._policy  # noqa: SLF001

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._presence._policy = self._before  # noqa: SLF001
