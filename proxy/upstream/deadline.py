"""When waiting for a node ends."""

import math
import time


class Deadline:
    """A time, and what the node will not have done by then ("answer", "finish its prefill").

    It costs nothing to set: whoever owns a connection looks at the clock a few times a second.
    """

    __slots__ = ("at", "is_everybodys", "seconds", "what")

    def __init__(self, seconds: float, what: str, *, is_everybodys: bool = False) -> None:
        """`is_everybodys`: another node would need as long, so what is late here is not tried elsewhere."""
        self.at = time.monotonic() + seconds
        self.seconds = seconds
        self.what = what
        self.is_everybodys = is_everybodys

    @property
    def left_s(self) -> float:
        return self.at - time.monotonic()

    def within(self, seconds: float) -> None:
        """Bring it forward, under the feet of whoever waits."""
        self.at = min(self.at, time.monotonic() + seconds)


NEVER = Deadline(math.inf, "end")
