"""Which versions of vLLM are used, and what differs between them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.vllm.versions import NEWEST, OLDEST, family, may_refuse, problem, survives_refusals


@pytest.mark.parametrize(
    ("version", "survives"),
    [
        ("0.29.0", False),
        ("0.31.1", False),
        ("0.32.0", True),
        ("0.32.1+cpu", True),
        ("1.0", True),
        ("", True),
        ("dev", True),
    ],
)
def test_before_0_32_a_refused_hand_off_ends_the_engine(version: str, survives: bool) -> None:
    """Seen on live pairs of 0.29, 0.30 and 0.31 (CONTRACT section 0)."""
    assert survives_refusals(version) is survives


def test_a_version_outside_of_what_was_tried_is_named() -> None:
    for version in (f"{OLDEST}", f"{OLDEST}.1", f"{NEWEST}", f"{NEWEST}.7", f"{NEWEST}.1.dev3+g1", "", "dev"):
        assert problem(version) == ""
    assert "older than" in problem("0.11.2")
    assert "newer than" in problem(f"{NEWEST.major}.{NEWEST.minor + 1}.0")


def test_patch_versions_go_together_and_minor_ones_do_not() -> None:
    assert family("0.32.0") == family("0.32.5+cu130") != family("0.31.0")
    assert family("dev") == "dev"


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 51}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": "5"}, {"max_tokens": True},
        {"max_completion_tokens": 51, "max_tokens": 5}, {"max_output_tokens": 51}, {"max_tokens": 5, "min_tokens": 6},
        {"min_tokens": 51}, {"min_tokens": -1}, {"min_tokens": "5"}, {"max_tokens": 5.5},
    ],
)  # fmt: skip
def test_numbers_that_a_decode_node_would_refuse_are_foreseen(body: dict[str, Any]) -> None:
    assert may_refuse(body, prompt_tokens=50, max_model_len=100)


@pytest.mark.parametrize("body", [{}, {"max_tokens": 50}, {"max_tokens": 5, "min_tokens": 5}, {"min_tokens": 50}])
def test_numbers_that_fit_are_not_held_up(body: dict[str, Any]) -> None:
    assert not may_refuse(body, prompt_tokens=50, max_model_len=100)


def test_without_a_known_length_nothing_is_said_to_fit() -> None:
    assert may_refuse({"max_tokens": 5}, 50, None)
    assert not may_refuse({}, 50, None)


@given(st.integers(-5, 200), st.integers(-5, 200), st.integers(1, 99))
def test_what_is_not_foreseen_fits(most: int, least: int, prompt: int) -> None:
    if not may_refuse({"max_tokens": most, "min_tokens": least}, prompt, 100):
        assert 1 <= most <= 100 - prompt
        assert 0 <= least <= most
