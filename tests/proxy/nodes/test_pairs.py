"""Verdicts on pairs: when one is fenced, and when no more."""

import pytest

from engines.base import Gauges, NodeFacts, Rank, Role
from engines.topology import Node as Spec
from proxy.nodes.node import Node
from proxy.nodes.pairs import Outcome, Pairs, Verdict, lives

FACTS = NodeFacts((), Gauges(), "")


@pytest.fixture
def pair() -> tuple[Node, Node]:
    prefill = Node(Spec(name="p0", role=Role.PREFILL, url="http://p:1", bootstrap="http://p:2"))
    decode = Node(Spec(name="d0", role=Role.DECODE, url="http://d:1"))
    prefill.ready((Rank(0, "first"),), FACTS)
    decode.ready((), FACTS)
    return prefill, decode


def judged(pairs: Pairs, pair: tuple[Node, Node], *outcomes: Outcome) -> None:
    for outcome in outcomes:
        pairs.judged(pair, Verdict(outcome, "" if outcome == "same" else outcome, lives(pair)))


@pytest.mark.parametrize(
    ("outcomes", "fenced"),
    [
        (["same"], False),
        (["not judged"], False),
        (["differs"], True),
        (["differs", "not judged"], True),
        (["differs", "not judged", "same"], False),
        (["same", "differs"], True),
    ],
)
def test_a_pair_that_differs_is_fenced_until_it_is_the_same_again(
    pair: tuple[Node, Node], outcomes: list[Outcome], fenced: bool
) -> None:
    pairs = Pairs()
    judged(pairs, pair, *outcomes)
    assert pairs.is_fenced(*pair) is fenced


def test_a_fenced_pair_that_cannot_be_judged_still_says_why_it_is_fenced(pair: tuple[Node, Node]) -> None:
    pairs = Pairs()
    judged(pairs, pair, "differs", "not judged")
    verdict = pairs.verdict(pair)
    assert verdict is not None
    assert (verdict.outcome, verdict.problem) == ("differs", "differs; not judged since: not judged")
    judged(pairs, pair, "not judged")
    assert pairs.verdict(pair) == verdict


def test_a_verdict_is_on_these_lives_of_both_nodes_and_a_fence_outlasts_them(pair: tuple[Node, Node]) -> None:
    pairs, (prefill, decode) = Pairs(), pair
    judged(pairs, pair, "differs")
    decode.failed("gone")
    decode.ready((), FACTS)
    assert pairs.verdict(pair) is None
    assert pairs.is_fenced(*pair)
    judged(pairs, pair, "same")
    assert pairs.verdict(pair) is not None
    prefill.ready((Rank(0, "second"),), FACTS)  # restarted between two probes
    assert pairs.verdict(pair) is None


def test_nothing_is_remembered_of_nodes_that_are_gone(pair: tuple[Node, Node]) -> None:
    pairs = Pairs()
    judged(pairs, pair, "differs")
    pairs.forget_all_but({pair[0]})
    assert not list(pairs)
    assert not pairs.are_any_fenced


def test_another_process_takes_over_all_that_the_first_knows_and_forgets_the_rest(pair: tuple[Node, Node]) -> None:
    ours, theirs, (prefill, decode) = Pairs(), Pairs(), pair
    other = Node(Spec(name="d1", role=Role.DECODE, url="http://d:2"))
    judged(ours, pair, "differs")
    judged(ours, (prefill, other), "differs")
    judged(theirs, pair, "not judged")
    ours.adopt(theirs)
    assert list(ours) == list(theirs)
    assert not ours.are_any_fenced
    judged(theirs, (prefill, decode), "differs")
    ours.adopt(theirs)
    assert ours.is_fenced(*pair)
