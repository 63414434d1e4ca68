"""Fixtures every test may use."""

import signal
from collections.abc import Iterator

import hypothesis
import pytest

from tests.processes import Proxy, Sim, proxy_in_front_of, sim_node

# Whoever started us may have signals ignored (`nohup`, `&` in a script, some runners), and so would have our children.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

EXPIRY_S = 6
"""Of KV that a lost decode leg may or may not have taken: nobody may give that back, so it expires by itself."""

# No test asserts a time, Hypothesis's included: on a busy machine its first draw alone may take seconds.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """From cheap to real: pure functions, then processes, then the engines."""
    order = (
        "tests/engines/test_",
        "tests/test_",
        "tests/engines/",
        "tests/proxy/",
        "tests/launcher/",
        "tests/examples/",
    )

    def cost(item: pytest.Item) -> int:
        return next((place for place, start in enumerate(order) if item.nodeid.startswith(start)), len(order))

    items.sort(key=cost)


@pytest.fixture(scope="session")
def _pair() -> Iterator[tuple[Sim, Sim, Proxy]]:
    with (
        sim_node("prefill", timeout_s=EXPIRY_S) as prefill,
        sim_node("decode", timeout_s=EXPIRY_S) as decode,
        proxy_in_front_of(prefill, decode) as proxy,
    ):
        yield prefill, decode, proxy


@pytest.fixture
def pair(_pair: tuple[Sim, Sim, Proxy]) -> Iterator[tuple[Sim, Sim, Proxy]]:
    """One simulated prefill node, one simulated decode node, a proxy. Well at the start; nothing is left in the end."""
    prefill, decode, proxy = _pair
    proxy.until_usable(2)
    yield _pair
    proxy.must_leave_nothing([prefill, decode])


@pytest.fixture
def prefill(pair: tuple[Sim, Sim, Proxy]) -> Sim:
    return pair[0]


@pytest.fixture
def decode(pair: tuple[Sim, Sim, Proxy]) -> Sim:
    return pair[1]


@pytest.fixture
def proxy(pair: tuple[Sim, Sim, Proxy]) -> Proxy:
    return pair[2]
