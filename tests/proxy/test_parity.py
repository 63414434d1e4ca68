"""The simulated pair does what every pair must do."""

import pytest

from engines.sim import tokens
from tests.parity import *  # noqa: F403
from tests.parity import System
from tests.processes import Proxy, Sim


@pytest.fixture
def system(prefill: Sim, decode: Sim, proxy: Proxy) -> System:
    for node in (prefill, decode):
        node.control(itl_s=0.002)
    return System(proxy.url, prefill.url, decode.url, eos=tokens.EOS, token_ids=tokens.encode("some prompt"))
