"""Which versions of vLLM this works with: `make test-versions VERSIONS="0.31.0 0.30.0"`.

Each gets an environment of its own, as `pd-launch setup` makes one; then the suites of parity and of refusals run on
real nodes of it. What comes of it is a table for engines/README.md.
"""

import asyncio
import os
import re
import subprocess
import sys

from launcher.errors import LauncherError
from launcher.events.events import Event, Events
from launcher.setup.install import EngineEnvironment
from tests.processes import ROOT

SUITES = {
    "parity": "tests/e2e/test_parity.py",
    "refusals and clients that leave": "tests/e2e/test_refusals.py",
}
VARIABLE = "PD_TEST_VLLM"
"""The version that the suites start; read in tests/e2e/conftest.py."""
_COUNT = re.compile(r"(\d+) (passed|failed|error)")


def main(versions: list[str]) -> None:
    print(f"| vLLM | {' | '.join(SUITES)} |\n|---|{'---|' * len(SUITES)}", flush=True)  # noqa: T201
    for version in versions:
        try:
            asyncio.run(EngineEnvironment.of("cpu", version).make(Events(_tell)))
        except LauncherError as exc:
            print(f"| {version} | {exc} |", flush=True)  # noqa: T201
            continue
        print(f"| {version} | {' | '.join(_run(version, suite) for suite in SUITES.values())} |", flush=True)  # noqa: T201


def _tell(event: Event) -> None:
    print(event.in_words(), file=sys.stderr, flush=True)  # noqa: T201


def _run(version: str, suite: str) -> str:
    log = ROOT / ".pytest_cache" / f"versions-{version}-{suite.rpartition('/')[2]}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", suite]
        subprocess.run(
            command,
            cwd=ROOT,
            check=False,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, VARIABLE: version},
        )
    last = log.read_text().splitlines()[-1:]
    return ", ".join(f"{count} {what}" for count, what in _COUNT.findall(last[0] if last else "")) or f"see {log.name}"


if __name__ == "__main__":
    main(sys.argv[1:])
