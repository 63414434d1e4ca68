"""A plan as a shell script: what `up` would start, to be started by hand."""

import shlex
from collections.abc import Iterator

from ..lockfile import variable_of_flag
from ..plan import Plan, Process
from ..secrets import is_secret, secret_words


def script(plan: Plan) -> str:
    """For bash. It writes the same files, and starts the same commands with the same environment.

    Secrets of `--env` are not in it: they are taken from the environment of whoever runs it.
    """
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: Plan) -> Iterator[str]:
    yield "#!/usr/bin/env bash"
    yield "# What pd-launch would start. It checks first, waits, watches, and stops in order; this script does not."
    yield "set -euo pipefail"
    yield "umask 077"
    yield from (f': "${{{name}:?}}"' for name in _secrets(plan))
    yield "started=()"
    yield "stop() {"
    yield '  for one in "${started[@]}"; do kill -- "-$one" 2> /dev/null || true; done; wait;'
    yield f"  rm -rf -- {shlex.quote(str(plan.temporary))}; }}"
    yield "trap stop EXIT"
    yield "trap exit INT TERM HUP"
    yield f"mkdir -p {shlex.quote(str(plan.run_dir))}"
    yield f"mkdir {shlex.quote(str(plan.temporary))}  # of this user only; it must not be there yet"
    files = {str(plan.run_dir / name): text for name, text in plan.files.items()}
    files[str(plan.topology_file)] = plan.topology().model_dump_json(indent=2)
    for name, text in files.items():
        yield f"cat > {shlex.quote(name)} <<'END'\n{text}\nEND"
    for process in plan.processes:
        yield from _started(plan, process)
    yield "wait"


def _secrets(plan: Plan) -> list[str]:
    """Variables that must be there before anything starts."""
    given = {name for process in plan.processes for name in process.environment if is_secret(name)}
    given |= {variable_of_flag(flag) for process in plan.processes for _, flag in secret_words(process.command) if flag}
    return sorted(given)


def _started(plan: Plan, process: Process) -> Iterator[str]:
    """In a session of its own, so that all of it can be ended, and nothing else."""
    own = shlex.quote(str(plan.temporary / process.name))
    yield f"\n# {process.name}: {', '.join(f'{port.purpose} {port}' for port in process.ports)}"
    yield f"mkdir {own}"
    yield f"(cd {own} && exec setsid env -i \\"
    yield from (f"  {_passed(name)} \\" for name in process.inherited)
    yield from (f"  {_variable(name, value)} \\" for name, value in process.environment.items())
    yield f"  {' '.join(_word(word, flag) for word, flag in secret_words(process.command))} \\"
    yield f"  >> {shlex.quote(str(process.log))} 2>&1) &"
    yield "started+=($!)"


def _word(word: str, flag: str) -> str:
    """A secret's is taken from the variable that is called like its flag: API_KEY for --api-key."""
    if not flag:
        return shlex.quote(word)
    value = f'"${variable_of_flag(flag)}"'
    return f"{flag}={value}" if word.startswith(f"{flag}=") else value


def _variable(name: str, value: str) -> str:
    return f'{name}="${name}"' if is_secret(name) else shlex.quote(f"{name}={value}")


def _passed(name: str) -> str:
    """A variable of whoever runs the script, if it is set there."""
    return f'${{{name}+"{name}=${name}"}}'
