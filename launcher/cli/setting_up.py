"""`pd-launch setup`."""

import asyncio
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..events.events import Events
from ..events.screen import OnScreen
from ..setup import environments, install
from .output import out


def setup(
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Which build of the engine.")] = "cpu",
    engine_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Check this environment instead of making one.")
    ] = None,
    print_python: Annotated[  # noqa: FBT002
        bool, typer.Option("--print-python", help="Print the interpreter of the environment, and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --device cuda: install, not only show.")] = False,  # noqa: FBT002
) -> None:
    """Make the engine's environment (vLLM and Mooncake), and see that it works. Quick when it is there."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: should be cpu or cuda")
    environment = install.EngineEnvironment.of("cuda" if device == "cuda" else "cpu")
    if print_python:
        sys.stdout.write(f"{engine_python or environment.python}\n")
    elif engine_python is not None:
        out.print_json(json.dumps(environments.engine_versions(engine_python)))
    elif device == "cuda" and not yes and not environment.is_complete:
        out.print("This would be run (add --yes to run it):", highlight=False)
        for _, command in environment.commands():
            out.out(f"  {shlex.join(command)}", highlight=False)
    else:
        asyncio.run(_make(environment))


async def _make(environment: install.EngineEnvironment) -> None:
    screen = OnScreen(out)
    events = Events(screen, live=screen.live)
    async with events.shown():
        if environment.device == "cuda":
            driver = environments.CUDA_DRIVER
            needs = f"vLLM {environments.VLLM_VERSION} is built for CUDA 13: NVIDIA driver {driver} or newer."
            events.say(needs, "text")
        await install.install_libraries(events, environment.device, environment.log)
        await environment.make(events)
        if environment.device == "cpu":
            await install.make_tiny_model(events, environment.python)
    versions = environments.quick_versions(environment.python)
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    events.say(f"engine environment: {environment.folder}\n  {listed}", "text")
