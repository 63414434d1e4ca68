"""What can go wrong, each with its exit code. Printed in `cli.py`, and nowhere else.

LauncherError          1  something failed while running (`doctor`: something is wrong)
├── ConfigError        2  flags or configuration file
├── PortBusyError      3  a port of the plan is taken
├── PreflightError     4  something else that was checked before the start
├── NotReadyError      5  a node did not become ready in time
├── NodeDiedError      6  a child ended while starting
├── KVNotMovedError    7  all nodes are up, but no KV moves, or it is read wrong
├── SelfTestError      8  a stage of `pd-launch test` failed (selftest.py)
└── InterruptedStart 130  Ctrl-C or SIGTERM before everything was up
"""


class LauncherError(Exception):
    """`message` says what and where; `hint`, on a line of its own, how to fix it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LauncherError):
    exit_code = 2


class PortBusyError(LauncherError):
    exit_code = 3


class PreflightError(LauncherError):
    exit_code = 4


class NotReadyError(LauncherError):
    exit_code = 5


class NodeDiedError(LauncherError):
    exit_code = 6


class KVNotMovedError(LauncherError):
    exit_code = 7


class InterruptedStart(LauncherError):  # noqa: N818  asked for by the user, no error
    exit_code = 130
