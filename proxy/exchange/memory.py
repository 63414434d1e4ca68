"""How many bytes of requests may be in memory at once: bodies, and media fetched for them."""

from types import TracebackType
from typing import Self

from ..errors import OverloadedError

_COME_BACK_S = 2


class MemoryBudget:
    """One process's. What is over it is refused, not kept waiting: half-read bodies would wait for each other."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.used = 0

    def reservation(self) -> "Reservation":
        """Nothing yet; a context manager that gives back in the end what was added."""
        return Reservation(self)

    def take(self, size: int) -> None:
        """Raises OverloadedError when that is too much now."""
        if self.used + size > self._most:
            message = f"requests in memory have {self.used} of {self._most} bytes, and this one needs {size} more"
            raise OverloadedError(message, retry_after_s=_COME_BACK_S)
        self.used += size

    def give_back(self, size: int) -> None:
        self.used -= size


class Reservation:
    """One request's share."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0

    def add(self, size: int) -> None:
        """Raises OverloadedError."""
        self._budget.take(size)
        self.size += size

    def release(self) -> None:
        """Give all of it back; once or more often."""
        self._budget.give_back(self.size)
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
