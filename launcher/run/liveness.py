"""Does a node that runs still work? A process that hangs never ends, and would stay "ready" for ever.

Pure: samples in, a verdict out. A node is hung when it has answered nothing for a while, or has requests and makes
nothing of them: vLLM's API server answers also while its engine core stands still.
"""

from engines.base import Gauges


class Liveness:
    """Of one node, in one life."""

    def __init__(self, hung_after_s: float) -> None:
        self._after_s = hung_after_s
        self._answered_at: float | None = None
        self._moved_at: float | None = None
        self._done = -1.0

    def problem(self, gauges: Gauges | None, now: float) -> str:
        """Why it is hung, in words, or "". `gauges`: what it says now; None when it does not answer."""
        if gauges is None:
            if self._answered_at is None:
                self._answered_at = now
            silent_s = now - self._answered_at
            return f"it has answered nothing for {silent_s:.0f} s" if silent_s >= self._after_s else ""
        self._answered_at = now
        done, waiting = gauges.generated + gauges.prompt_tokens, gauges.running + gauges.waiting
        if done != self._done or not waiting or self._moved_at is None:
            self._done, self._moved_at = done, now
        still_s = now - self._moved_at
        return (
            f"it has {waiting:.0f} requests, and has made nothing of them for {still_s:.0f} s"
            if (still_s >= self._after_s)
            else ""
        )
