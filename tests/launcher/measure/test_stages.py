"""Which part of a run binds, from where the time went and which limit is missed."""

import pytest

from launcher.measure.results import Figures
from launcher.measure.slo import Slo
from launcher.measure.stages import Binding, Looks, binding

SLO = Slo(ttft=1.0, tpot=0.05)
PAIR = {
    "proxy queue": 0.01, "prefill queue": 0.1, "prefill": 0.2, "hand-off": 0.05, "decode queue": 0.01, "decode": 2.0,
    "the rest": 0.02,
}  # fmt: skip
ALIKE = {"proxy queue": 0.01, "queue": 0.1, "prefill": 0.2, "decode": 2.0, "the rest": 0.02}


def measured(ttft: float = 0.5, tpot: float = 0.02, e2e: float = 2.5) -> Figures:
    ttfts, tpots, e2es = (dict.fromkeys(("p50", "p90", "p99", "mean"), value) for value in (ttft, tpot, e2e))
    return Figures(200, 0, 60, 100, 2000, ttfts, tpots, e2es, 200)


@pytest.mark.parametrize(
    ("spent", "found", "binds"),
    [
        ({}, measured(tpot=0.08), "decode"),
        ({"prefill queue": 2.0}, measured(ttft=3), "prefill"),
        ({"prefill": 2.0}, measured(ttft=3), "prefill"),
        ({"hand-off": 2.0}, measured(ttft=3), "transfer"),
        ({"decode queue": 2.0}, measured(ttft=3), "decode"),
        ({"proxy queue": 2.0}, measured(ttft=3), "proxy"),
        ({"prefill queue": 0.5}, measured(), "prefill"),
    ],
)
def test_the_limit_that_strains_most_and_what_takes_its_time(
    spent: dict[str, float], found: Figures, binds: Binding
) -> None:
    assert binding(PAIR | spent, found, SLO) == binds


def test_an_end_that_is_late_may_be_decodes_fault() -> None:
    assert binding(PAIR, measured(e2e=9), Slo(e2e=3)) == "decode"
    assert binding(PAIR | {"prefill queue": 5.0}, measured(e2e=9), Slo(e2e=3)) == "prefill"


def test_nodes_that_are_all_alike_bind_together() -> None:
    assert binding(ALIKE, measured(tpot=0.08), SLO) == "nodes"
    assert binding(ALIKE | {"queue": 2.0}, measured(ttft=3), SLO) == "nodes"
    assert binding(ALIKE | {"proxy queue": 2.0}, measured(ttft=3), SLO) == "proxy"


def test_what_is_seen_of_a_node_is_kept_for_each_look() -> None:
    looks = Looks()
    text = 'vllm:num_requests_waiting{model="m"} 5\n'
    looks.add("decode-0", text)
    looks.add("decode-0", text + 'vllm:num_requests_waiting_by_reason{reason="capacity"} 1\n')
    looks.add("decode-0", "")
    assert looks.waiting["decode-0"] == [5, 1, 0]
