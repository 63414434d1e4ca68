"""LangChain's standard tests of a chat model, with its OpenAI class."""

import os

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAI(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        url, settings = os.environ["PD_URL"] + "/v1", {"temperature": 0, "seed": 1, "max_tokens": 400}
        return {"model": "tiny", "base_url": url, "api_key": "none", "max_retries": 0, "stream_usage": True, **settings}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "Qwen/Qwen3-0.6B"
