"""The engine's environment: what is checked without installing anything (the real set-up is part of `make test`)."""

import stat
import sys
from pathlib import Path

import pytest

from launcher import setup
from launcher.errors import PreflightError
from launcher.setup import EngineEnvironment


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
