"""`pd-launch`: the commands, and what they put on the screen.

app.py         the table of commands; errors become exit codes
flags.py       the configuration's fields as flags
starting.py    up, plan, check, test, facts; detached.py: up -d
running.py     commands for a run that is there; operate.py: what is done to it
setting_up.py  setup
show.py        tables and lines; output.py: where they go
"""

import signal
import sys


def main() -> None:
    """The console script. An end that is asked for is one, whichever way and however early."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        from .app import main as run  # noqa: PLC0415  Ctrl-C is answered while it is imported, too

        run()
    except KeyboardInterrupt:
        sys.exit(130)
