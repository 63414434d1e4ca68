"""The engine's own environment: where it is, what is in it, and what the tiny model is called.

An engine pins old versions of what the proxy uses too, so it gets a virtual environment of its own, in the user's
cache folder under its versions: a second checkout finds it ready.
"""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import platformdirs

import engines.plugins
from engines.vllm.command import Device

from ..errors import PreflightError
from ..plan.facts import APPLICATION

VLLM_VERSION = "0.32.0"
MOONCAKE_VERSION = "0.3.13.post1"
TORCH_VERSION = "2.13.0"

LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
"""What `import mooncake.engine` loads, and the Debian package of each."""

_OF_THE_CUDA_BUILD = {"libmlx5.so.1": "ibverbs-providers"}
"""... and what its CUDA build loads as well (NEEDED of its engine.so). Without it no adapter is found either."""

MOONCAKE = {"cpu": "mooncake-transfer-engine-non-cuda", "cuda": "mooncake-transfer-engine-cuda13"}
"""Mooncake's build for each device: vLLM 0.32 is built for CUDA 13 (its requirements: nvidia-cutlass-dsl[cu13])."""

_PROBED_WITHIN_S = 300
CUDA_DRIVER = "580"
"""The oldest NVIDIA driver that runs CUDA 13."""


def folder_of(device: Device, vllm: str = VLLM_VERSION) -> Path:
    """Of the environment that `pd-launch setup` makes for a device."""
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    name = f"vllm-{device}-{vllm}_mooncake-{MOONCAKE_VERSION}_{python}"
    return platformdirs.user_cache_path(APPLICATION) / "engines" / name


def python_of(device: Device) -> Path:
    return folder_of(device) / "bin" / "python"


def engine_versions(python: Path) -> dict[str, str]:
    """Versions of what an engine needs, after importing it. Raises PreflightError naming what is missing."""
    program = (
        "import json, vllm, mooncake.engine, torch\n"
        "from importlib.metadata import distributions\n"
        "found = {d.name: d.version for d in distributions() if d.name.startswith(('vllm', 'mooncake'))}\n"
        "print('VERSIONS', json.dumps(found | {'torch': torch.__version__}))\n"
    )
    return _probe(python, program, "VERSIONS")


@cache
def quick_versions(python: Path) -> dict[str, str]:
    """As `engine_versions`, but without the seconds that importing vLLM takes: it is only looked for.

    Mooncake's CUDA build finds CUDA's runtime only when it is loaded already, as torch does.
    """
    program = (
        "import ctypes, glob, json, sys, sysconfig, importlib.util\n"
        "sys.exit('No module named vllm') if importlib.util.find_spec('vllm') is None else None\n"
        "for file in glob.glob(sysconfig.get_path('purelib') + '/nvidia/*/lib/libcudart.so.*'):\n"
        "    ctypes.CDLL(file, ctypes.RTLD_GLOBAL)\n"
        "import mooncake.engine\n"
        "from importlib.metadata import distributions\n"
        "found = {d.name: d.version for d in distributions() if d.name.startswith(('vllm', 'mooncake'))}\n"
        "print('VERSIONS', json.dumps(found))\n"
    )
    return _probe(python, program, "VERSIONS")


def libraries_of(device: Device) -> dict[str, str]:
    return LIBRARIES | _OF_THE_CUDA_BUILD if device == "cuda" else LIBRARIES


def tiny_model_path() -> Path:
    """Keyed by the program that makes it: a change of the model is another model."""
    key = hashlib.sha256(tiny_model_program().read_bytes()).hexdigest()[:12]
    return platformdirs.user_cache_path(APPLICATION) / "models" / f"tiny-{key}"


def tiny_model_program() -> Path:
    """What makes it, with the engine's own torch and transformers."""
    return Path(engines.plugins.__path__[0]) / "pd_tiny_model.py"


def _probe(python: Path, program: str, word: str) -> dict[str, str]:
    try:
        environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}  # as nodes are
        answer = subprocess.run(
            [str(python), "-c", program], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env=environment, timeout=_PROBED_WITHIN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PreflightError(f"{python} has not said in {_PROBED_WITHIN_S} s whether it can run an engine") from None
    except OSError as exc:
        raise PreflightError(
            f"no engine environment: cannot run {python} ({exc.strerror})",
            "Make one with `pd-launch setup`, or name the Python of your own with --engine-python",
        ) from exc
    result = next((line for line in answer.stdout.splitlines() if line.startswith(word)), None)
    if answer.returncode or result is None:
        reason = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PreflightError(f"{python} cannot run an engine: {reason}", _remedy(reason))
    versions: dict[str, str] = json.loads(result.removeprefix(word))
    return versions


def _remedy(reason: str) -> str:
    for library, package in libraries_of("cuda").items():
        if library in reason:
            return f"Run as root: apt-get install -y {package}"
    if "libcuda.so" in reason:
        return (
            f"It comes with the NVIDIA driver, {CUDA_DRIVER} or newer; a container must be started with --gpus. "
            f"On a host without a GPU use --device cpu, and {MOONCAKE['cpu']}"
        )
    if "libcudart" in reason:
        return (
            f"This build of Mooncake is for another CUDA than vLLM {VLLM_VERSION}, which goes with {MOONCAKE['cuda']}; "
            f"without a GPU use {MOONCAKE['cpu']}"
        )
    return "It needs vllm and mooncake-transfer-engine; `pd-launch setup` makes an environment that has both"
