"""Whether a request is handed over at all: a decode node alone may have its first token sooner.

Both ways are put in seconds of waiting, from what was measured here: handed over, the prefill node's backlog, its work
and the hand-off; alone, the decode node's work, once for the request itself and once for every stream beside it, which
that work holds up. Alone must win clearly, and never computes more than `MOST_TOKENS`.
"""

from dataclasses import dataclass, field

MOST_TOKENS = 2048
"""Uncached ones, that a decode node computes alone at most: about what fits into one step beside its streams."""
_ENOUGH = 8
"""Measurements before anything is decided by them."""
_KEPT = 0.98
"""Of the weight of all earlier measurements, with each new one."""
_CLEARLY = 0.8
"""What would be faster alone, as a share of what the hand-off costs. A size that went alone before need only be faster:
a prompt at the border does not go this way and that.
"""
_SMOOTH = 0.05
"""Weight of the newest state, for the crossover that is shown."""


class Line:
    """Seconds by tokens, a + b * tokens: least squares over measurements, of which the newest count most."""

    def __init__(self) -> None:
        self.count = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.count += 1
        self._weight = self._weight * _KEPT + 1
        self._x = self._x * _KEPT + tokens
        self._y = self._y * _KEPT + seconds
        self._xx = self._xx * _KEPT + tokens * tokens
        self._xy = self._xy * _KEPT + tokens * seconds

    @property
    def slope(self) -> float:
        """Never below 0: more tokens take no less time."""
        spread = self._weight * self._xx - self._x * self._x
        if spread <= 1e-9 * max(self._weight * self._xx, 1.0):
            return 0.0
        return max(0.0, (self._weight * self._xy - self._x * self._y) / spread)

    def at(self, tokens: float) -> float:
        """Raises ZeroDivisionError before the first measurement."""
        slope = self.slope
        return max(0.0, (self._y - slope * self._x) / self._weight) + slope * tokens


@dataclass(slots=True)
class Outlook:
    """A request before it is sent: what is to be computed on either side, and what is there already."""

    tokens: float
    uncached_at_prefill: float
    backlog_s: float
    """Of the prefill node."""
    uncached_at_decode: float
    streams: int
    """That the decode node runs."""


@dataclass(slots=True)
class Split:
    """What one process has learned."""

    is_wanted: bool
    """False: every request is handed over."""
    prefill: Line = field(default_factory=Line)
    """By uncached tokens, without the backlog."""
    hand_off: Line = field(default_factory=Line)
    """Decode leg to its first event, by the prompt's tokens."""
    alone: Line = field(default_factory=Line)
    """A decode node's first event of a whole request, by uncached tokens."""
    _went_alone: set[int] = field(default_factory=set)
    """Sizes, in powers of two."""
    _backlog_s: float = 0.0
    _streams: float = 0.0

    def is_faster_alone(self, outlook: Outlook) -> bool:
        """Decide it."""
        if not self.is_wanted or min(self.prefill.count, self.hand_off.count) < _ENOUGH:
            return False
        self._backlog_s += _SMOOTH * (outlook.backlog_s - self._backlog_s)
        self._streams += _SMOOTH * (outlook.streams - self._streams)
        size = int(outlook.uncached_at_decode).bit_length()
        limit = 1.0 if size in self._went_alone else _CLEARLY
        handed_over = (
            outlook.backlog_s + self.prefill.at(outlook.uncached_at_prefill) + self.hand_off.at(outlook.tokens)
        )
        alone = self._alone_s(outlook.uncached_at_decode) * (1 + outlook.streams)
        is_faster = outlook.uncached_at_decode <= MOST_TOKENS and alone < limit * handed_over
        (self._went_alone.add if is_faster else self._went_alone.discard)(size)
        return is_faster

    @property
    def crossover_tokens(self) -> int | None:
        """Prompts shorter than about this go alone as things are now; None while it is not known."""
        if not self.is_wanted or min(self.prefill.count, self.hand_off.count) < _ENOUGH:
            return None
        low, high = 0, MOST_TOKENS
        while low < high:  # what is gained falls with every token, or grows with every one
            middle = (low + high + 1) // 2
            if self._is_worth(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def _is_worth(self, tokens: int) -> bool:
        handed_over = self._backlog_s + self.prefill.at(tokens) + self.hand_off.at(tokens)
        return self._alone_s(tokens) * (1 + self._streams) < _CLEARLY * handed_over

    def _alone_s(self, tokens: float) -> float:
        """Until a decode node was measured, it is taken for as fast as a prefill node."""
        return (self.alone if self.alone.count else self.prefill).at(tokens)
