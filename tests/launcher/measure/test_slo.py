"""What a good answer keeps, as a user writes it."""

import pytest

from launcher.errors import ConfigError
from launcher.measure.slo import Slo, seconds


def test_limits_are_read_with_their_units() -> None:
    assert Slo.parse("ttft=2s, tpot=50ms,e2e=1.5s") == Slo(2.0, 0.05, 1.5)
    assert str(Slo.parse("tpot=50ms,ttft=2s")) == "TTFT ≤ 2 s, TPOT ≤ 50 ms"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft=2", "has no number with a unit"),
        ("ttft=2h", "has no number with a unit"),
        ("ttft=fast", "has no number with a unit"),
        ("ttft", "has no number with a unit"),
        ("ttft=0s", "nothing takes no time"),
        ("itl=2s", "'itl' is none of"),
        ("", "'' is none of"),
    ],
)
def test_what_is_no_limit_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Slo.parse(text)


def test_times_are_told_in_the_unit_that_fits() -> None:
    assert (seconds(0.0256), seconds(2.345)) == ("25.6 ms", "2.35 s")
