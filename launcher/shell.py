"""A plan as a shell script: what `up` would start, to be started by hand."""

import shlex
from collections.abc import Iterator

from .plan import Plan, Process


def script(plan: Plan) -> str:
    """For bash. It writes the same files, and starts the same commands with the same environment."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield "#!/usr/bin/env bash"
    yield "# What pd-launch would start. It checks first, waits, watches, and stops in order; this script does not."
    yield "set -euo pipefail"
    yield "trap 'kill 0' EXIT"
    yield f"mkdir -p {shlex.quote(str(plan.run_dir))}"
    files = {str(plan.run_dir / name): text for name, text in plan.files.items()}
    files[str(plan.topology_file)] = plan.topology().model_dump_json(indent=2)
    for name, text in files.items():
        yield f"cat > {shlex.quote(name)} <<'END'\n{text}\nEND"
    for process in plan.processes:
        yield from _started(plan, process)
    yield "wait"


def _started(plan: Plan, process: Process) -> Iterator[str]:
    own = shlex.quote(str(plan.temporary / process.name))
    yield f"\n# {process.name}: {', '.join(f'{port.purpose} {port}' for port in process.ports)}"
    yield f"mkdir -p {own}"
    yield "(cd " + own + " && env \\"
    yield from (f"  -u {name} \\" for name in process.unset)
    yield from (f"  {shlex.quote(f'{name}={value}')} \\" for name, value in process.environment.items())
    yield f"  {shlex.join(process.command)} \\"
    yield f"  > {shlex.quote(str(process.log))} 2>&1) &"
