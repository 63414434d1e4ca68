"""Why did it fail: all nodes' logs together, the first cause on top, with its remedy."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.symptoms import CONSEQUENCES, Diagnosis, Hit, diagnose

from . import logs
from .errors import ConfigError

_LINE_WIDTH = 300
_WHERE = {
    "config": "the configuration",
    "install": "what is installed",
    "version": "versions that do not go together",
    "network": "the network",
    "os": "the operating system",
    "launcher": "the launcher",
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
        inside = logs.files_of(place) if place.is_dir() else [place]
        found += [file for file in inside if file.name != logs.OF_THE_LAUNCHER]  # it repeats what the nodes said
    if not found:
        raise ConfigError(f"no log in {', '.join(map(str, places))}", "Name a run's folder, or log files")
    return found


def examine(files: Sequence[Path], offsets: Mapping[str, int] | None = None) -> Diagnosis:
    """Read logs, of every node if possible, from their beginning or from the bytes given."""
    return diagnose(logs.time_line(files, offsets))


def in_words(diagnosis: Diagnosis) -> str:
    """For people; empty when nothing in the logs is known to be worth a word."""
    first = diagnosis.first
    if first is None:
        return "\n".join(_named("noted", diagnosis.remarks))
    further = [hit for hit in (*diagnosis.causes, *diagnosis.consequences) if hit is not first]
    return "\n".join((*_explained(first), *_named("also", further), *_named("noted", diagnosis.remarks)))


def _explained(hit: Hit) -> Iterator[str]:
    kind = "known" if hit.symptom.kind in CONSEQUENCES else "cause"
    yield f"{kind}  {hit.line.log} said, line {hit.line.number} [{hit.symptom.id}]"
    yield f"       {hit.line.text.strip()[:_LINE_WIDTH]}"
    yield f"why    {hit.symptom.cause}"
    if where := _where(hit):
        yield f"where  {where}"
    yield f"mend   {hit.symptom.fix}"


def _where(hit: Hit) -> str:
    """Nothing when it is the node that says it."""
    return " or ".join(_WHERE.get(part, hit.line.log) for part in hit.symptom.root.split("|") if part != "self")


def _named(word: str, hits: Sequence[Hit]) -> Iterator[str]:
    for hit in hits:
        often = f" ({hit.times} times)" if hit.times > 1 else ""
        yield f"{word:<6} {hit.line.log}: {hit.symptom.id}{often}, line {hit.line.number}"


def as_data(diagnosis: Diagnosis) -> dict[str, Any]:
    """For `--json`."""

    def data(hit: Hit) -> dict[str, Any]:
        symptom = hit.symptom
        return {
            "id": symptom.id, "log": hit.line.log, "line": hit.line.number, "text": hit.line.text, "times": hit.times,
            "root": symptom.root, "cause": symptom.cause, "fix": symptom.fix,
        }  # fmt: skip

    groups = {"causes": diagnosis.causes, "consequences": diagnosis.consequences, "remarks": diagnosis.remarks}
    return {name: [data(hit) for hit in hits] for name, hits in groups.items()}
