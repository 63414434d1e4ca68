"""`pd-launch doctor`: folders and files of any kind, a cause, an exit code."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.errors import ConfigError
from launcher.inspect import doctor
from launcher.inspect.runs import ChildState, Death, RunFolder, RunState

BUSY = "(APIServer pid=7) OSError: [Errno 98] Address already in use\n"


def run_in(folder: Path, *deaths: Death) -> None:
    """A run that is over, as its launcher wrote it down."""
    child = ChildState(
        name="decode-0", role="decode", state="stopped", pid=None, since=0, restarts=0, url=None, ports=(),
        log=folder / "decode-0.log", deaths=deaths,
    )  # fmt: skip
    state = RunState(
        id="x", machine="y", launcher=1, phase="stopped", engine="vllm", connector="MooncakeConnector", model="m",
        proxy_url="http://127.0.0.1:1", temporary=folder, control=folder / "c", began=0, written=0, stops_within_s=1,
        children=(child,),
    )  # fmt: skip
    RunFolder(folder).write(state)
    (folder / "decode-0.log").write_text("all is well\n")


def test_it_says_the_cause_the_fix_and_by_its_exit_code_that_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "decode-0.log").write_text("all is well\n" + BUSY)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert "cause  decode-0 said, line 2 [port-api-in-use]" in result.output
    assert "fix    Choose another port" in result.output


def test_healthy_logs_are_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "decode-0.log").write_text("all is well\n")
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert (result.exit_code, result.output.strip()) == (0, "Nothing known to be wrong in 1 log.")


def test_files_of_any_name_are_logs_and_what_is_data_is_none(tmp_path: Path) -> None:
    (tmp_path / "slurm-123.out").write_text("3: " + BUSY)
    (tmp_path / "plan.json").write_text(BUSY)
    (tmp_path / ".hidden").write_text(BUSY)
    assert [file.name for file in doctor.logs_in([tmp_path])] == ["slurm-123.out"]
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path)])
    first = json.loads(result.output)["first"]
    assert (result.exit_code, first["log"], first["id"]) == (1, "slurm-123.out: task 3", "port-api-in-use")


def test_a_death_that_no_log_explains_is_told_from_what_the_launcher_wrote_down(tmp_path: Path) -> None:
    run_in(tmp_path, Death(at=1_796_119_202.0, how="killed by SIGKILL"))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert "cause  decode-0 [killed-SIGKILL]" in result.output
    assert "ended: killed by SIGKILL" in result.output


def test_what_was_turned_over_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "decode-0.log.1").write_text(BUSY)
    (tmp_path / "decode-0.log").write_text("all is well\n")
    assert CliRunner().invoke(app, ["doctor", str(tmp_path)]).exit_code == 1


def test_a_place_without_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no log in"):
        doctor.logs_in([tmp_path])
    with pytest.raises(ConfigError, match="no such file"):
        doctor.logs_in([tmp_path / "none"])
