"""Other people's suites, run unchanged against a node alone and against the proxy in front of a real pair.

`make conformance`, or some of them: `make conformance SUITES="langchain vllm"`. What passes on one node must pass
through the proxy, and say the same where a test keeps what was said. What differs is run twice more, for a model with
random weights says this today and that tomorrow: only what passes every time on the node and never through the proxy
is a difference. Each known one has its reason in `suites.py`; any other makes the exit code 1.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from launcher.setup.environments import tiny_model_path
from tests.conformance import environment
from tests.conformance.suites import HERE, NAMES, SUITES, Suite
from tests.launched import Up, up
from tests.processes import ROOT

START_PATIENCE_S = 600
ASKED_AGAIN = 2
HEAD = "| Suite | tests | pass on one node | pass through the proxy too | differ |\n|---|---|---|---|---|"

Outcomes = dict[str, str]
"""By the name of a test: passed, failed or skipped; or what a test that passed has kept."""


def main(names: list[str]) -> int:
    chosen = {name: SUITES[name] for name in names or SUITES}
    pythons = {name: environment.make(name, suite) for name, suite in chosen.items()}
    unknown = 0
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), *_flags()) as pair:
        pair.until("Ready", START_PATIENCE_S)
        print(HEAD, flush=True)  # noqa: T201
        for name, suite in chosen.items():
            unknown += _compare(Trial(name, suite, pythons[name], pair))
    return 1 if unknown else 0


def _flags() -> list[str]:
    tools = ["--args=--enable-auto-tool-choice", "--args=--tool-call-parser=hermes"]
    settings = ['--args=--structured-outputs-config={"backend":"xgrammar","disable_any_whitespace":true}']
    model = ["--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), "--served-model-name", ",".join(NAMES)]
    return [*model, *tools, *settings]


@dataclass(frozen=True)
class Trial:
    """A suite, and what it is tried on."""

    name: str
    suite: Suite
    python: Path
    pair: Up

    @property
    def folder(self) -> Path:
        return environment.folder_of(self.name)

    def differences(self, only: Iterable[str] = ()) -> tuple[Outcomes, list[str]]:
        """What came of it on the node alone, and which tests passed there and not through the proxy."""
        alone = self._run("node", self.pair.nodes("decode")[0], only)
        through = self._run("proxy", self.pair.url, only)
        return alone, [test for test in _passed(alone) if through.get(test) != alone[test]]

    def log(self, of: str) -> Path:
        return self.folder / f"{of}.log"

    def _run(self, of: str, url: str, only: Iterable[str]) -> Outcomes:
        report = self.folder / f"{of}.xml"
        report.unlink(missing_ok=True)
        with self.log(of).open("w") as output:
            subprocess.run(
                [*self._command(only), f"--junitxml={report}"],
                cwd=self.folder,
                env=self._environment(url),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not report.exists():
            raise SystemExit(f"{self.name} did not run against the {of}: see {self.log(of)}")
        return dict(map(_outcome, ET.parse(report).iter("testcase")))  # noqa: S314 (pytest wrote it just now)

    def _command(self, only: Iterable[str]) -> list[str]:
        config = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(self.folder), f"--timeout={self.suite.patience_s}"]
        plugin = ["-p", "tests_of_vllm"] if self.suite.vllm_source else []
        functions = sorted({test.rpartition("::")[2].partition("[")[0] for test in only})
        chosen = ["-k", " or ".join(functions)] if functions else []
        return [str(self.python), "-P", "-m", "pytest", *config, *plugin, *chosen, *self.suite.tests]

    def _environment(self, url: str) -> dict[str, str]:
        told = {**environment.variables(self.suite), "PD_URL": url, "PD_TOKENIZER": str(tiny_model_path())}
        told["PD_SCHEMA"] = f"{self.pair.nodes('decode')[0]}/openapi.json"
        told["PYTHONPATH"] = ":".join(filter(None, (told.get("PYTHONPATH"), str(HERE), str(self.folder))))
        return told


def _compare(trial: Trial) -> int:
    """A row of the table, and a line for each difference; how many of them nobody knows."""
    alone, differ = trial.differences()
    for _ in range(ASKED_AGAIN):
        if differ:
            again = trial.differences(differ)[1]
            differ = [test for test in differ if test in again]
    count, passed = Counter(alone.values()), len(_passed(alone))
    row = (trial.suite.title, len(alone) - count["skipped"], passed, passed - len(differ), len(differ))
    print(f"| {' | '.join(map(str, row))} |", flush=True)  # noqa: T201
    reasons = {test: next((why for end, why in trial.suite.known.items() if test.endswith(end)), "") for test in differ}
    for test, why in reasons.items():
        print(f"  {test}: {why or 'NOT KNOWN; see ' + str(trial.log('proxy'))}", flush=True)  # noqa: T201
    return sum(not why for why in reasons.values())


def _passed(outcomes: Outcomes) -> list[str]:
    return [test for test, outcome in outcomes.items() if outcome not in {"failed", "skipped"}]


def _outcome(case: ET.Element) -> tuple[str, str]:
    test = f"{case.get('classname')}::{case.get('name')}"
    if any(case.find(kind) is not None for kind in ("failure", "error")):
        return test, "failed"
    if case.find("skipped") is not None:
        return test, "skipped"
    kept = ((each.get("name"), each.get("value")) for each in case.iter("property"))
    return test, " ".join(f"{name}={value}" for name, value in kept) or "passed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
