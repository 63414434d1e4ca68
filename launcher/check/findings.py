"""What a check says: what it has looked at, and what it has found."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import LauncherError, PortBusyError, PreflightError


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, why that matters, how to fix it."""

    severity: Literal["error", "warning"]
    what: str
    why: str
    fix: str
    exit_code: int = PreflightError.exit_code

    def as_error(self) -> LauncherError:
        kind = PortBusyError if self.exit_code == PortBusyError.exit_code else PreflightError
        return kind(f"{self.what}\n{self.why}" if self.why else self.what, self.fix)


@dataclass(frozen=True, slots=True)
class Checked:
    """One theme."""

    theme: str
    looked_at: str
    """What was seen of it, in a few words."""
    findings: tuple[Finding, ...] = ()

    @property
    def worst(self) -> Literal["error", "warning", "ok"]:
        severities = {finding.severity for finding in self.findings}
        return "error" if "error" in severities else "warning" if severities else "ok"


def error(what: str, why: str, fix: str) -> Finding:
    return Finding("error", what, why, fix)


def warning(what: str, why: str, fix: str) -> Finding:
    return Finding("warning", what, why, fix)


def refuse_errors(checked: Iterable[Checked]) -> None:
    """Raises PreflightError or PortBusyError for the first error."""
    for one in checked:
        for finding in one.findings:
            if finding.severity == "error":
                raise finding.as_error()
