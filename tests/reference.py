"""The tables of `proxy/README.md`, made from the code: `python -m tests.reference` writes them, a test checks them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines.openai.routes import HANDED_OFF, PASSED_ON, REFUSED
from proxy import errors
from proxy.cli import flag, flagged_settings, shown
from proxy.errors import ProxyError
from proxy.metrics import Counts, Metrics, Seconds
from tests.processes import ROOT

OWN = (
    "/health", "/livez", "/readyz", "/ping", "/metrics", "/v1/models", "/v1/models/{model}", "/version",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/openapi.json", "/docs",
)  # fmt: skip
"""What the proxy answers by itself."""
README = ROOT / "proxy" / "README.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def flags() -> str:
    """Every setting that has a flag."""
    lines = ["| Flag | Default | |", "|---|---|---|"]
    for name, field in flagged_settings().items():
        default = "" if field.default in (None, ()) else f"`{shown(field.default)}`"
        lines.append(f"| `{flag(name)}` | {default} | {field.description} |")
    return "\n".join(lines)


def statuses() -> str:
    """Every error of the proxy's own, and what it is answered with."""
    lines = ["| Status | `type` | Error | Fault of |", "|---|---|---|---|"]
    found = sorted(_kinds(ProxyError), key=lambda kind: (kind.status, kind.__name__))
    for kind in found:
        status = {errors.NodeRefusedError: "4xx", errors.NodeAnsweredError: "429, 5xx"}.get(kind, str(kind.status))
        lines.append(f"| {status} | `{kind.kind}` | {_words(kind.__name__)} | {kind.source} |")
    return "\n".join(lines)


def metrics() -> str:
    """Every series that the proxy counts itself."""
    lines = ["| Series | Kind | Labels | |", "|---|---|---|---|"]
    own = Metrics()
    for name, counts in own.of(Counts):
        lines.append(f"| `pd_{name}_total` | counter | {_labels(counts)} | {counts.text} |")
    for name, seconds in own.of(Seconds):
        lines.append(f"| `pd_{name}` | histogram | {_labels(seconds)} | {seconds.text} |")
    gauges = ", ".join(f"`pd_{name}`" for name in own.snapshot()["gauges"])
    lines.append(f"| {gauges} | gauge | | now |")
    return "\n".join(lines)


def routes() -> str:
    """Every route of clients."""
    handed = ", ".join(f"`{path}`" for path in HANDED_OFF)
    passed = ", ".join(f"`{path}`" for path in PASSED_ON)
    told = ", ".join(f"`{path}`" for path in OWN)
    reasons: dict[str, list[str]] = {}
    for path, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{path}`")
    return "\n".join(
        [
            "| Route | |",
            "|---|---|",
            f"| `POST` {handed} | handed over, prefill to decode; stream or not |",
            f"| `POST` {passed} | answered by a decode node, if it serves them |",
            f"| `GET` {told} | answered by the proxy itself |",
            *(f"| {', '.join(paths)} | 404: {reason} |" for reason, paths in reasons.items()),
            "| everything else | 404 in OpenAI's shape |",
        ]
    )


TABLES: dict[str, Callable[[], str]] = {"flags": flags, "statuses": statuses, "metrics": metrics, "routes": routes}


def with_tables(text: str) -> str:
    """The page with every table as the code says it."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def _kinds(kind: type[ProxyError]) -> Iterator[type[ProxyError]]:
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__:
            yield each
            yield from _kinds(each)


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.removesuffix("Error")).lower()


def _labels(series: Any) -> str:
    return ", ".join(f"`{label}`" for label in series.labels)


def main(file: Path = README) -> None:
    file.write_text(with_tables(file.read_text()))


if __name__ == "__main__":
    main()
