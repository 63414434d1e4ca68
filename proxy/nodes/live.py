"""The KV that a decode node's running requests hold, in tokens, without a look at any of them."""

from dataclasses import dataclass

_FIRST_TOKEN_S = 0.03
"""Until a stream was measured. Where none was on any node it cancels out, nearly."""
_WEIGHT = 0.1
"""Of the newest measurement."""


@dataclass(slots=True)
class LiveTokens:
    """Of one node. Prompts are counted; what streams have generated is their time by the node's time for a token."""

    prompts: int = 0
    streams: int = 0
    token_s: float = _FIRST_TOKEN_S
    """Seconds between two tokens of a stream."""
    _began: float = 0.0
    """The sum of the times when the streams began, on the monotonic clock."""

    def count(self, now: float) -> float:
        """Prompts and what was generated for them so far."""
        return self.prompts + max(self.streams * now - self._began, 0.0) / self.token_s

    def begin(self, now: float) -> None:
        """A stream's first token is there."""
        self.streams += 1
        self._began += now

    def end(self, began: float) -> None:
        """The stream that began then is over."""
        self.streams -= 1
        self._began = self._began - began if self.streams else 0.0  # no rounding is carried on

    def measured(self, token_s: float) -> None:
        """The mean time between the tokens of a stream that has ended."""
        self.token_s += _WEIGHT * (max(token_s, 1e-4) - self.token_s)
