"""An environment for each suite, in the user's cache folder, and vLLM's tests out of its source package."""

import os
import subprocess
import tarfile
import venv
from pathlib import Path

import platformdirs

from launcher.plan.facts import APPLICATION
from tests.conformance.suites import PYTEST, VLLM, Suite, engine


def folder_of(name: str) -> Path:
    return platformdirs.user_cache_path(APPLICATION) / "conformance" / name


def make(name: str, suite: Suite) -> Path:
    """Idempotent; the Python of it. Raises CalledProcessError."""
    folder = folder_of(name)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", *PYTEST, *suite.packages], check=True)
    if suite.vllm_source and not (folder / "tests").exists():
        _fetch_source(python, folder)
    return python


def variables(suite: Suite) -> dict[str, str]:
    """What its process gets: nothing looks for a model or data on a network, and no proxy stands between."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "none"}
    seen = {"PYTHONPATH": _packages_of_engine()} if suite.with_engine else {}
    return {**os.environ, **offline, **seen}


def _packages_of_engine() -> str:
    found = engine().python.parent.parent.glob("lib/python3*/site-packages")
    return str(next(iter(found)))


def _fetch_source(python: Path, folder: Path) -> None:
    """Pip takes a source package only with its metadata, which vLLM's build makes: told to build for no device."""
    tools = ["setuptools", "setuptools-scm", "setuptools-rust", "packaging"]
    subprocess.run([python, "-m", "pip", "install", "-qq", *tools], check=True)
    fetch = ["download", "-qq", "--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={VLLM}"]
    told = {"PYTHONPATH": _packages_of_engine(), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VLLM}
    subprocess.run([python, "-m", "pip", *fetch, "-d", folder], check=True, env={**os.environ, **told})
    top = f"vllm-{VLLM}/"
    with tarfile.open(folder / f"vllm-{VLLM}.tar.gz") as source:
        for member in source.getmembers():
            if member.name.startswith(f"{top}tests/"):
                member.name = member.name.removeprefix(top)
                source.extract(member, folder, filter="data")
