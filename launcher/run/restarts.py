"""When a child that ended is started again, and when no more. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Growing pauses; a child that fails too often, without being well for a while in between, is given up."""

    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    most_failures: int = 4
    steady_s: float = 600.0
    """One that was ready for so long has made up for all that was before, however long its starts take."""

    def pause_s(self, failures: int) -> float | None:
        """How long to wait after so many failures (ends, and starts that failed); None when it is given up."""
        if failures > self.most_failures:
            return None
        return min(self.first_pause_s * 2.0 ** max(0, failures - 1), self.longest_pause_s)
