"""The real pair does what every pair must do."""

import pytest

from tests.launched import Up
from tests.parity import *  # noqa: F403
from tests.parity import System

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the engines to start


@pytest.fixture
def system(real_pair: Up) -> System:
    prefill, decode = real_pair.nodes("prefill")[0], real_pair.nodes("decode")[0]
    return System(real_pair.url, prefill, decode, eos=1, token_ids=list(range(20, 60)))
