"""The real pair: vLLM and Mooncake on the CPU, started once for the session as a user starts it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launched import Up, run_to_end, up
from tests.processes import ROOT

START_PATIENCE_S = 900


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`pd-launch up` with the example's configuration. Its end is part of the test: nothing may be left."""
    with _up(tmp_path_factory.mktemp("real"), nodes=2) as run:
        yield run
    said = run_to_end(["doctor", str(run.run_dir)]).stdout
    assert said.startswith("Nothing known to be wrong"), said


@pytest.fixture(scope="module")
def real_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """... with a second decode node, for what must survive the death of one, and a proxy that notices silence soon."""
    with trio(tmp_path_factory.mktemp("trio")) as run:
        yield run


@contextmanager
def trio(folder: Path, *flags: str) -> Iterator[Up]:
    silence = ["--proxy-args=--decode-silence-timeout-s", "--proxy-args=20"]
    with _up(folder, "--decode", "2", *silence, *flags, nodes=3) as run:
        yield run


@contextmanager
def _up(folder: Path, *flags: str, nodes: int) -> Iterator[Up]:
    # A transfer timeout longer than any test's patience: what is free again was released, and did not expire.
    always = ["--config", str(ROOT / "examples" / "cpu-1p1d.yaml"), "--transfer-timeout-s", "600"]
    always += ["--proxy-args=--decode-start-timeout-s", "--proxy-args=50"]
    shared_before = set(os.listdir("/dev/shm"))  # noqa: PTH208
    with up(folder, *always, *flags, nodes=nodes) as run:
        run.until("Ready:", START_PATIENCE_S)
        yield run
        children = run.descendants()
        assert run.end() == 0
    alive = [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert set(os.listdir("/dev/shm")) <= shared_before  # noqa: PTH208
    assert not run.temporary.exists()
    assert "Killed what was left" not in run.output
