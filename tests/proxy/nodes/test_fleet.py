"""All nodes, leases, and which of the nodes belong together."""

from hypothesis import given
from hypothesis import strategies as st

from engines.base import Gauges, JSONObject, NodeFacts, Rank, Role
from engines.topology import Node, Topology
from proxy.errors import NoNodeError
from proxy.nodes.fleet import Fleet
from proxy.routing.policy import choose


def facts(*models: JSONObject) -> NodeFacts:
    return NodeFacts(models, Gauges(), "")


def topology(prefill: int, decode: int) -> Topology:
    prefills = [
        Node(name=f"p{n}", role=Role.PREFILL, url=f"http://p:{n + 1}", bootstrap=f"http://p:{n + 100}")
        for n in range(prefill)
    ]
    decodes = [Node(name=f"d{n}", role=Role.DECODE, url=f"http://d:{n + 1}") for n in range(decode)]
    return Topology(nodes=(*prefills, *decodes))


def ready_fleet(prefill: int = 2, decode: int = 3) -> Fleet:
    fleet = Fleet(topology(prefill, decode))
    for node in fleet:
        node.ready((Rank(0, "e"),), facts())
    return fleet


def test_a_failure_forgets_the_identity() -> None:
    node = ready_fleet().of(Role.PREFILL)[0]
    node.failed("broken")
    assert node.ranks == ()


@given(st.lists(st.booleans(), max_size=30))
def test_leases_are_given_back_however_they_end(ends: list[bool]) -> None:
    fleet = ready_fleet()
    for well in ends:
        try:
            with choose(fleet, Role.DECODE).lease() as lease:
                lease.move(fleet.of(Role.DECODE)[0])
                if not well:
                    raise NoNodeError("x")
        except NoNodeError:
            pass
    assert [node.in_flight for node in fleet] == [0] * 5


def test_a_node_that_stays_in_the_topology_keeps_its_state() -> None:
    fleet = ready_fleet(2, 2)
    stays = fleet.of(Role.DECODE)[0]
    fleet.replace(topology(2, 1))
    assert fleet.of(Role.DECODE) == [stays]
    assert stays.usable


def test_a_model_is_listed_when_a_node_of_each_role_serves_it() -> None:
    fleet = ready_fleet(1, 1)
    fleet.of(Role.PREFILL)[0].ready((Rank(0, "e"),), facts({"id": "both"}, {"id": "only-prefill"}))
    fleet.of(Role.DECODE)[0].ready((), facts({"id": "both"}, {"id": "only-decode"}))
    assert fleet.models() == [{"id": "both"}]


def test_the_ranks_of_a_data_parallel_node_take_turns() -> None:
    node = ready_fleet().of(Role.PREFILL)[0]
    node.ready((Rank(0, "a"), Rank(1, "b")), facts())
    turns = [node.next_rank() for _ in range(4)]
    assert {rank.number for rank in turns if rank} == {0, 1}
    assert turns[0] == turns[2] != turns[1] == turns[3]


def test_a_node_without_an_identity_has_no_rank() -> None:
    assert ready_fleet().of(Role.DECODE)[0].next_rank() is not None
    node = ready_fleet().of(Role.DECODE)[0]
    node.ready((), facts())
    assert node.next_rank() is None


def serve(fleet: Fleet, **served: tuple[str, int] | None) -> dict[str, str | None]:
    """What sets the nodes apart when each serves one model of a length; of a node that is down nothing is known."""
    for node in fleet:
        told = served[node.spec.name]
        if told is None:
            node.failed("down")
        else:
            node.ready((Rank(0, "e"),), facts({"id": told[0], "max_model_len": told[1]}))
    fleet.compare()
    return {node.spec.name: node.why_not for node in fleet}


M, OTHER, SHORT = ("m", 100), ("other", 100), ("m", 50)


def test_a_stray_node_is_the_misfit_whoever_answered_first() -> None:
    found = serve(Fleet(topology(1, 3)), p0=M, d0=OTHER, d1=M, d2=M)
    assert found == {"p0": None, "d0": "serves other, while m is expected", "d1": None, "d2": None}


def test_a_misfit_excludes_no_more_nodes_than_it_keeps() -> None:
    assert [name for name, why in serve(Fleet(topology(1, 3)), p0=M, d0=SHORT, d1=M, d2=M).items() if why] == ["d0"]
    assert [name for name, why in serve(Fleet(topology(1, 3)), p0=M, d0=M, d1=SHORT, d2=M).items() if why] == ["d1"]


def test_a_model_is_changed_node_by_node() -> None:
    """Those that serve stay as long as they are no fewer than those with the new model."""
    fleet = Fleet(topology(1, 2))
    serve(fleet, p0=M, d0=M, d1=M)
    assert serve(fleet, p0=M, d0=None, d1=M)["d1"] is None
    assert serve(fleet, p0=M, d0=OTHER, d1=M)["d0"] == "serves other, while m is expected"
    assert serve(fleet, p0=None, d0=OTHER, d1=M) == {
        "p0": "down", "d0": "serves other, while m is expected", "d1": None,
    }  # fmt: skip
    assert serve(fleet, p0=OTHER, d0=OTHER, d1=M) == {
        "p0": None, "d0": None, "d1": "serves m, while other is expected",
    }  # fmt: skip


def test_what_the_topology_says_is_expected_counts_more_than_what_most_nodes_serve() -> None:
    nodes = topology(1, 2).model_copy(update={"models": ("m",), "max_model_len": 100})
    assert serve(Fleet(nodes), p0=M, d0=OTHER, d1=OTHER)["p0"] is None
    assert serve(Fleet(nodes), p0=M, d0=SHORT, d1=SHORT)["d0"] == "serves m up to 50 tokens, while 100 are expected"


def test_adapters_need_not_be_the_same_everywhere() -> None:
    fleet = Fleet(topology(1, 1))
    base, adapter = {"id": "m", "max_model_len": 100}, {"id": "lora", "parent": "m", "max_model_len": 50}
    fleet.of(Role.PREFILL)[0].ready((Rank(0, "e"),), facts(base, adapter))
    fleet.of(Role.DECODE)[0].ready((), facts(base))
    fleet.compare()
    assert [node.why_not for node in fleet] == [None, None]


def test_another_connector_is_another_identity() -> None:
    fleet = ready_fleet(1, 1)
    fleet.replace(topology(1, 1).model_copy(update={"connector": "NixlConnector"}))
    assert [node.problem for node in fleet] == ["not probed yet"] * 2


def test_a_node_whose_cache_is_of_another_shape_is_kept_apart_and_the_field_named() -> None:
    """No engine compares it: blocks of another shape are read as if they were the reader's own."""
    fleet = Fleet(topology(2, 2))
    for number, node in enumerate(fleet):
        layout = {"block_size": "16", "cache_dtype": "fp8" if number == 3 else "auto"}
        node.ready((Rank(0, "e"),), NodeFacts((), Gauges(), "", layout))
    fleet.compare()
    assert [node.misfit for node in fleet][:3] == [None] * 3
    assert fleet.of(Role.DECODE)[1].misfit == "its KV cache has cache_dtype fp8, while auto is expected"
    fleet.of(Role.DECODE)[1].ready((), NodeFacts((), Gauges(), "", {"block_size": "16", "cache_dtype": "auto"}))
    fleet.compare()
    assert fleet.of(Role.DECODE)[1].misfit is None


def test_a_node_that_does_not_tell_its_caches_shape_is_taken_as_it_is() -> None:
    fleet = Fleet(topology(1, 2))
    for node, layout in zip(fleet, ({"block_size": "16"}, {}, {"other": "1"}), strict=True):
        node.ready((Rank(0, "e"),), NodeFacts((), Gauges(), "", layout))
    fleet.compare()
    assert [node.misfit for node in fleet] == [None] * 3


def of_version(version: str) -> NodeFacts:
    return NodeFacts(({"id": "m"},), Gauges(), version)


def test_nodes_of_another_minor_version_are_kept_apart_and_named() -> None:
    fleet = Fleet(topology(1, 3))
    versions = dict(zip(fleet, ("0.32.0", "0.32.1", "0.31.0", ""), strict=True))
    for node, version in versions.items():
        node.ready((Rank(0, "e"),), of_version(version))
    fleet.compare()
    assert [node.misfit for node in fleet] == [None, None, "is of vLLM 0.31, while 0.32 is expected", None]


def test_a_version_that_was_not_tried_is_used_only_if_told_so() -> None:
    for any_version in (False, True):
        fleet = Fleet(topology(1, 1), any_version=any_version)
        for node in fleet:
            node.ready((Rank(0, "e"),), of_version("0.11.2"))
        fleet.compare()
        assert [node.usable for node in fleet] == [any_version] * 2
        assert ("older than" in fleet.why_none(Role.DECODE)) is not any_version
