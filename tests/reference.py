"""The tables of `proxy/README.md`, made from the code: `python -m tests.reference` writes them, a test checks them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engines.openai.routes import HANDED_OFF, PASSED_ON, REFUSED
from engines.topology import Node, Topology
from proxy import errors
from proxy.cli import flag, flagged_settings, shown
from proxy.errors import ProxyError
from proxy.metrics import Counts, Metrics, Seconds
from proxy.nodes.fleet import Fleet
from proxy.nodes.pairs import Verdict
from proxy.nodes.transfer import TransferWatch
from proxy.routing.split import Split
from proxy.serving import exposition
from proxy.serving.board import Board
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
    """Every series, as a proxy in front of one pair tells them."""
    lines = ["| Series | Kind | Labels | |", "|---|---|---|---|"]
    own = {f"pd_{name}": series.labels for kind in (Counts, Seconds) for name, series in Metrics().of(kind)}
    for family in text_string_to_metric_families(_exposition()):
        if family.name.startswith("pd_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            sample = next(iter(family.samples), None)
            labels = own.get(family.name) or (sorted(sample.labels) if sample is not None else ())
            told = ", ".join(f"`{label}`" for label in labels)
            lines.append(f"| `{name}` | {family.type} | {told} | {family.documentation} |")
    return "\n".join(lines)


def _exposition() -> str:
    prefill = Node(name="prefill-0", role="prefill", url="http://p:1", bootstrap="http://p:2")
    fleet = Fleet(Topology(nodes=(prefill, Node(name="decode-0", role="decode", url="http://d:1"))))
    nodes = list(fleet)
    fleet.pairs.judged((nodes[0], nodes[1]), Verdict("same", "", (0, 0)))
    watch = TransferWatch(fleet)
    watch.adopt(nodes[1], "moving", 0)
    return exposition.text(Metrics(), Board(), fleet, watch, _Learned(is_wanted=True), ()).decode()


class _Learned(Split):
    """As after some hundred requests."""

    crossover_tokens = 0


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


def main(file: Path = README) -> None:
    file.write_text(with_tables(file.read_text()))


if __name__ == "__main__":
    main()
