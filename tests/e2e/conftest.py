"""The real pair: vLLM and Mooncake on the CPU, started once for the session as a user starts it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from launcher.setup.install import EngineEnvironment
from tests.launched import Up, run_to_end, up
from tests.otlp import HTTP, Sink, collector
from tests.processes import ROOT
from tests.versions import VARIABLE

START_PATIENCE_S = 900


@pytest.fixture(scope="session")
def traces() -> Iterator[Sink]:
    """Where the real pair sends its traces."""
    with collector() as sink:
        yield sink


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory, traces: Sink) -> Iterator[Up]:
    """`pd-launch up` with the example's configuration. Its end is part of the test: nothing may be left."""
    flags = ["--env", "VLLM_ENABLE_RESPONSES_API_STORE=1", "--otlp-traces-endpoint", traces.url]
    with launched(tmp_path_factory.mktemp("real"), *flags, nodes=2, env=HTTP) as run:
        yield run
    said = run_to_end(["doctor", str(run.run_dir)]).stdout
    assert said.startswith("Nothing known to be wrong") or os.environ.get(VARIABLE), said


TRIO_TRANSFER_S = 90


@pytest.fixture(scope="module")
def real_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """... with a second decode node, for what must survive the death of one, and a proxy that notices silence soon.

    A decode node keeps the blocks of a pull that died with its prefill node for the transfer timeout and a minute, and
    nothing frees them earlier (`receive_kv_from_single_worker` in vLLM's Mooncake connector): so it is a shorter one.
    """
    with trio(tmp_path_factory.mktemp("trio"), "--transfer-timeout-s", str(TRIO_TRANSFER_S)) as run:
        yield run


@contextmanager
def trio(folder: Path, *flags: str) -> Iterator[Up]:
    silence = ["--proxy-args=--decode-silence-timeout-s", "--proxy-args=20"]
    with launched(folder, "--decode", "2", *silence, *flags, nodes=3) as run:
        yield run


@contextmanager
def launched(folder: Path, *flags: str, nodes: int, env: Mapping[str, str] | None = None) -> Iterator[Up]:
    # A transfer timeout longer than any test's patience: what is free again was released, and did not expire.
    version = os.environ.get(VARIABLE)
    transfer_s, decode_start_s = ("30", "25") if version else ("600", "50")  # an old one gives nothing back
    always = ["--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), "--transfer-timeout-s", transfer_s]
    always += ["--proxy-args=--decode-start-timeout-s", f"--proxy-args={decode_start_s}"]
    always += [
        "--proxy-args=--canary-interval-s=100000"
    ]  # at the start: later its tokens would be counted with a test's
    if version:
        always += ["--engine-python", str(EngineEnvironment.of("cpu", version).python), "--any-version"]
    shared_before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    with up(folder, *always, *flags, nodes=nodes, env=env) as run:
        run.until("Ready:", START_PATIENCE_S)
        yield run
        children = run.descendants()
        assert run.end() == 0
    alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert set(os.listdir("/dev/shm")) <= shared_before  # noqa: PTH208
    assert not run.temporary.exists()
    assert "Killed what was left" not in run.output
