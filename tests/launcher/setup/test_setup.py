"""The engine's environment: what is checked without installing anything (the real set-up is part of `make test`)."""

import asyncio
import errno
import stat
import sys
from pathlib import Path

import pytest

from launcher.errors import LauncherError, PreflightError
from launcher.events.events import Events
from launcher.setup import environments as setup
from launcher.setup import install
from launcher.setup.install import EngineEnvironment


def python_that(tmp_path: Path, program: str) -> Path:
    """An interpreter of a broken environment."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{program}\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return fake


def test_the_environments_folder_names_the_versions_in_it() -> None:
    name = EngineEnvironment.of("cpu").folder.name
    assert setup.VLLM_VERSION in name
    assert setup.MOONCAKE_VERSION in name
    assert EngineEnvironment.of("cuda").folder != EngineEnvironment.of("cpu").folder


def test_the_gpu_commands_install_the_gpu_builds() -> None:
    commands = [" ".join(command) for _, command in EngineEnvironment.of("cuda").commands()]
    assert f"vllm=={setup.VLLM_VERSION}" in commands[-1]
    assert "mooncake-transfer-engine-cuda13==" in commands[-1], "the plain one is for CUDA 12"
    assert not any("cpu" in command.replace(str(EngineEnvironment.of("cuda").folder), "") for command in commands)


def test_a_python_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"cannot run .*nowhere") as error:
        setup.quick_versions(tmp_path / "nowhere")
    assert "pd-launch setup" in error.value.hint


def test_a_python_without_vllm_is_one_clear_error() -> None:
    with pytest.raises(PreflightError, match="cannot run an engine: No module named vllm") as error:
        setup.quick_versions(Path(sys.executable))
    assert "pd-launch setup" in error.value.hint


def test_a_missing_library_is_named_with_its_package(tmp_path: Path) -> None:
    message = "ImportError: libibverbs.so.1: cannot open shared object file: No such file or directory"
    broken = python_that(tmp_path, f"echo '{message}' >&2; exit 1")
    with pytest.raises(PreflightError, match="libibverbs") as error:
        setup.engine_versions(broken)
    assert error.value.hint == "Run as root: apt-get install -y libibverbs1"


def test_the_wrong_build_of_mooncake_is_explained(tmp_path: Path) -> None:
    broken = python_that(tmp_path, "echo 'ImportError: libcudart.so.12: cannot open' >&2; exit 1")
    with pytest.raises(PreflightError) as error:
        setup.engine_versions(broken)
    assert "mooncake-transfer-engine-cuda13" in error.value.hint
    assert "mooncake-transfer-engine-non-cuda" in error.value.hint


def test_a_host_without_a_driver_is_told_which_it_needs(tmp_path: Path) -> None:
    broken = python_that(tmp_path, "echo 'ImportError: libcuda.so.1: cannot open shared object file' >&2; exit 1")
    with pytest.raises(PreflightError) as error:
        setup.engine_versions(broken)
    assert "driver, 580 or newer" in error.value.hint


def test_the_cuda_build_needs_the_adapters_library_as_well() -> None:
    """Of its engine.so: NEEDED libmlx5.so.1."""
    assert setup.libraries_of("cuda")["libmlx5.so.1"] == "ibverbs-providers"
    assert "libmlx5.so.1" not in setup.libraries_of("cpu")


def test_the_tiny_model_is_keyed_by_the_program_that_makes_it() -> None:
    assert setup.tiny_model_path() == setup.tiny_model_path()
    assert setup.tiny_model_path().name.startswith("tiny-")


def test_a_cache_on_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoLocks:
        def __init__(self, _: str) -> None:
            pass

        def acquire(self) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(install, "FileLock", NoLocks)
    monkeypatch.setattr(install, "tiny_model_path", lambda: tmp_path / "tiny")
    with pytest.raises(LauncherError, match="has no locks: Function not implemented") as error:
        asyncio.run(install.make_tiny_model(Events(), Path("/no/python")))
    assert "XDG_CACHE_HOME" in error.value.hint


def test_a_step_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "setup.log"
    command = [sys.executable, "-c", "print('reading'); raise SystemExit('no such wheel')"]
    with pytest.raises(LauncherError, match=r"could not install it: exit code 1\n.*no such wheel") as error:
        asyncio.run(install.run_logged(Events(), "install it", command, log))
    assert str(log) in error.value.hint
    assert log.read_text().startswith("$ ")
