"""What is compared, as a user writes it."""

import pytest

from launcher.errors import ConfigError
from launcher.measure.arms import Arm, arms
from launcher.plan.config import LaunchConfig


def test_pairs_ordinary_nodes_and_nodes_that_do_both() -> None:
    assert arms("2P1D,3,3b") == [Arm(prefill=2, decode=1), Arm(ordinary=3), Arm(both=3)]
    assert [str(arm) for arm in arms("2p1d,3,3B")] == ["2P1D", "3 ordinary", "3B"]
    assert [arm.label for arm in arms("2P1D,3")] == ["2P1D", "3"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1P1D", "two arms or more"),
        ("1P1D,1P1D", "each once"),
        ("1P1D,3", "different numbers of nodes: 1P1D has 2, 3 ordinary has 3"),
        ("0P2D,2", "'0P2D' is no arm"),
        ("1P,2", "'1P' is no arm"),
        ("two,2", "'two' is no arm"),
    ],
)
def test_what_cannot_be_compared_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        arms(text)


def test_each_arm_is_a_run_with_everything_else_as_given() -> None:
    base = LaunchConfig(model="m", engine="sim", decode=7, proxy_port=9999)
    pair, ordinary, both = (arm.config(base) for arm in arms("1P2D,3,3B"))
    assert (pair.prefill, pair.decode, pair.connector) == (1, 2, "MooncakeConnector")
    assert (ordinary.prefill, ordinary.decode, ordinary.connector) == (0, 3, "none")
    assert (both.prefill, both.decode, both.both) == (0, 0, 3)
    assert {one.proxy_port for one in (pair, ordinary, both)} == {9999}


def test_an_arm_that_no_run_can_be_is_refused() -> None:
    base = LaunchConfig(model="m", connector="MooncakeStoreConnector")
    with pytest.raises(ConfigError, match=r"--arms 2B: .*MooncakeConnector"):
        Arm(both=2).config(base)
