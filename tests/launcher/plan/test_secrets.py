"""What is a secret among variables and flags; the rest stays as it is, or a run could not be repeated."""

import pytest

from launcher.plan.secrets import is_secret, shown_value, without_secrets


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "OPENAI_API_KEY", "PD_PROXY_API_KEYS", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "--api-key",
        "--hf-token", "OTEL_EXPORTER_OTLP_HEADERS", "AZURE_STORAGE_CONNECTION_STRING", "--api-k",
    ],
)  # fmt: skip
def test_these_hold_a_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HF_HOME", "--tokenizer", "--max-num-batched-tokens", "VLLM_PORT", "KEYBOARD"]
)
def test_these_hold_none(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("--api-key", "a", "b", "--seed", "1"), ("--api-key", "***", "***", "--seed", "1")),
        (("--api-key=a", "--seed=1"), ("--api-key=***", "--seed=1")),
        (("--api-key", "--api-key-is-my-key"), ("--api-key", "--api-key-is-my-key")),
        (("--x", "http://me:pw@host/a"), ("--x", "http://***@host/a")),
        (("serve", "m"), ("serve", "m")),
    ],
)
def test_a_command_is_shown_without_its_secrets(command: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert without_secrets(command) == shown


def test_user_and_password_of_an_address_are_hidden_and_the_address_is_not() -> None:
    assert shown_value("https_proxy", "http://me:pw@proxy:3128") == "http://***@proxy:3128"
    assert shown_value("HF_ENDPOINT", "http://hub:80") == "http://hub:80"
