"""Why did it fail: all nodes' logs together, the first cause on top, with its remedy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.symptoms.diagnosis import Diagnosis, Ended, Hit, diagnose
from engines.symptoms.meaning import CONSEQUENCES
from engines.symptoms.scan import UNKNOWN, scan

from ..errors import ConfigError
from . import logs
from .runs import RunFolder

_LINE_WIDTH = 300
_WHERE = {
    "config": "the configuration",
    "install": "what is installed",
    "version": "versions that do not go together",
    "network": "the network",
    "os": "the operating system",
    "master": "mooncake_master",
    "metadata": "the metadata server",
    "proxy": "the proxy",
    "peer": "the node's peer",
    "prefill": "a prefill node",
    "decode": "a decode node",
    "ports": "the ports",
    "client": "the client",
}


def logs_in(places: Sequence[Path]) -> list[Path]:
    """Log files, and those in folders. Raises ConfigError when there is none."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise ConfigError(f"{place}: no such file or folder")
        inside = logs.files_in(place) if place.is_dir() else [place]
        found += [file for file in inside if file.name != logs.OF_THE_LAUNCHER]  # it repeats what the nodes said
    if not found:
        raise ConfigError(f"no log in {', '.join(map(str, places))}", "Name a run's folder, or log files")
    return found


def ends_in(places: Sequence[Path]) -> list[Ended]:
    """How the children of runs ended, as their launchers wrote it down."""
    states = (RunFolder(place).read() for place in places if place.is_dir())
    return [
        Ended(child.name, death.at, death.how)
        for state in states
        if state is not None
        for child in state.children
        for death in child.deaths
    ]


def examine(files: Sequence[Path], offsets: Mapping[str, int] | None = None, ends: Sequence[Ended] = ()) -> Diagnosis:
    """Read logs, of every node if possible, from their beginning or from the bytes given."""
    scans = [scan(_name(file), logs.parts(file, None if offsets is None else offsets[file.stem])) for file in files]
    return diagnose(scans, logs.clock(), ends)


def _name(file: Path) -> str:
    return file.stem if file.suffix == ".log" else file.name


def in_words(diagnosis: Diagnosis) -> str:
    """For people; empty when nothing in the logs is known to be worth a word."""
    first = diagnosis.first
    if first is None:
        return "\n".join(_named("noted", diagnosis.remarks))
    further = [hit for hit in (*diagnosis.causes, *diagnosis.consequences, *diagnosis.errors) if hit is not first]
    return "\n".join((*_explained(first), *_named("also", further), *_named("noted", diagnosis.remarks)))


def _explained(hit: Hit) -> Iterator[str]:
    """The line to begin with: a cause; an error that nobody knows; or a failure without a cause (known)."""
    word = "error" if hit.meaning is UNKNOWN else "known" if hit.meaning.kind in CONSEQUENCES else "cause"
    place = f"line {hit.number} " if hit.number else ""
    yield f"{word:<6} {hit.log} said, {place}[{hit.meaning.id}]" if place else f"{word:<6} {hit.log} [{hit.meaning.id}]"
    yield f"       {hit.text.strip()[:_LINE_WIDTH]}"
    yield f"why    {hit.meaning.cause}"
    if where := _where(hit):
        yield f"where  {where}"
    yield f"fix    {hit.meaning.fix}"


def _where(hit: Hit) -> str:
    """Nothing when it is the node that says it."""
    return " or ".join(_WHERE.get(part, hit.log) for part in hit.meaning.root.split("|") if part != "self")


def _named(word: str, hits: Sequence[Hit]) -> Iterator[str]:
    for hit in hits:
        often = f" ({hit.times} times)" if hit.times > 1 else ""
        place = f", line {hit.number}" if hit.number else ""
        yield f"{word:<6} {hit.log}: {hit.meaning.id}{often}{place}"


def as_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """For `--json`."""

    def data(hit: Hit) -> dict[str, Any]:
        meaning = hit.meaning
        return {
            "id": meaning.id, "log": hit.log, "line": hit.number, "when": hit.when, "text": hit.text,
            "times": hit.times, "root": meaning.root, "cause": meaning.cause, "fix": meaning.fix,
        }  # fmt: skip

    groups = {
        "causes": diagnosis.causes,
        "consequences": diagnosis.consequences,
        "errors": diagnosis.errors,
        "remarks": diagnosis.remarks,
    }
    first = {"first": data(diagnosis.first) if diagnosis.first is not None else None}
    return first | {name: [data(hit) for hit in hits] for name, hits in groups.items()}
