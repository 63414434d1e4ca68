"""The file between launcher and proxy."""

from typing import Any

import pytest
from pydantic import ValidationError

from engines.base import Role
from engines.topology import Node, Topology

PREFILL = {"name": "p", "role": "prefill", "url": "http://h:1", "bootstrap": "http://h:2"}
DECODE = {"name": "d", "role": "decode", "url": "http://[::1]:3"}


def test_a_topology_survives_being_written_and_read() -> None:
    topology = Topology.model_validate({"nodes": [PREFILL, DECODE]})
    assert Topology.model_validate_json(topology.model_dump_json()) == topology
    assert [node.name for node in topology.of(Role.PREFILL)] == ["p"]


def test_a_url_is_cut_to_scheme_host_and_port() -> None:
    assert Node.model_validate(PREFILL | {"url": "http://h:1/"}).url == "http://h:1"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"url": "h:1"}, "not of the form"),
        ({"url": "https://h:1"}, "not of the form"),
        ({"url": "http://h:99999"}, "not of the form"),
        ({"url": "http://h:1/v1"}, "more than"),
        ({"url": "http://user@h:1"}, "more than"),
        ({"url": "file:///etc/passwd"}, "not of the form"),
        ({"role": "each"}, "prefill"),
        ({"nmae": "x"}, "not permitted"),
    ],
)
def test_a_node_that_cannot_be_reached_as_written_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Node.model_validate(PREFILL | change)


def test_a_prefill_node_needs_a_bootstrap_where_its_connector_has_one() -> None:
    nodes = [PREFILL | {"bootstrap": None}, DECODE]
    with pytest.raises(ValidationError, match="'p' needs 'bootstrap'"):
        Topology.model_validate({"nodes": nodes})
    assert Topology.model_validate({"connector": "NixlConnector", "nodes": nodes}).nodes[0].bootstrap is None


def test_without_a_connector_no_node_prefills_for_another() -> None:
    assert Topology.model_validate({"connector": "none", "nodes": [DECODE]}).of(Role.DECODE)
    with pytest.raises(ValidationError, match="all nodes are decode nodes"):
        Topology.model_validate({"connector": "none", "nodes": [PREFILL, DECODE]})


@pytest.mark.parametrize("same", ["name", "url"])
def test_no_node_is_there_twice(same: str) -> None:
    other = DECODE | {same: PREFILL[same]}
    with pytest.raises(ValidationError, match=f"more than one node has the {same}"):
        Topology.model_validate({"nodes": [PREFILL, other]})
