"""A plugin for pytest under which vLLM's own tests meet the standing server instead of starting one each.

The tests are unchanged. The flags that a test would have started its server with are not looked at: what needs one
that the pair does not have fails on a node alone too, and then says nothing of the proxy. Tokenizers are the tiny
model's, whatever a test calls its model, and what it would download is the tiny model.
"""

import os
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import tests.utils
import transformers
import vllm.tokenizers

URL = urlsplit(os.environ["PD_URL"])
PATH = os.environ["PD_TOKENIZER"]


class StandingServer(tests.utils.RemoteOpenAIServer):
    """As vLLM's own, but for starting and ending it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.host, self.port, self.uds = URL.hostname, URL.port, None
        self.show_hidden_metrics = False

    def _shutdown(self) -> None:
        pass


def pytest_configure() -> None:
    tests.utils.RemoteOpenAIServer = StandingServer
    given = vllm.tokenizers.get_tokenizer
    vllm.tokenizers.get_tokenizer = lambda _, *a, **k: given(PATH, *a, **k)
    tests.utils.get_tokenizer = vllm.tokenizers.get_tokenizer
    huggingface_hub.HfApi.snapshot_download = lambda *_, **__: PATH
    of = transformers.AutoTokenizer.from_pretrained
    transformers.AutoTokenizer.from_pretrained = lambda _, *a, **k: of(PATH, *a, **k)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What asks no server says nothing of one."""
    asking = [item for item in items if any("server" in name or "client" in name for name in item.fixturenames)]
    config.hook.pytest_deselected(items=[item for item in items if item not in asking])
    items[:] = asking
