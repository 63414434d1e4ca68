"""The simulator's tokenizer and "model"."""

from hypothesis import given
from hypothesis import strategies as st

from engines.sim import tokens
from engines.sim.tokens import Sampling

prompts = st.lists(st.integers(0, tokens.VOCABULARY - 1), min_size=1, max_size=40)


@given(st.text())
def test_text_survives_its_tokens(text: str) -> None:
    clean = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert tokens.decode(tokens.encode(text)) == clean


@given(prompts, st.integers(1, 20))
def test_an_answer_goes_on_the_same_way_from_a_prompt_that_holds_its_beginning(prompt: list[int], cut: int) -> None:
    whole = [token for token, _ in tokens.generate(prompt, Sampling(max_tokens=20, ignore_eos=True))]
    rest = tokens.generate([*prompt, *whole[:cut]], Sampling(max_tokens=20 - cut, ignore_eos=True))
    assert [*whole[:cut], *(token for token, _ in rest)] == whole


@given(prompts)
def test_another_prompt_gives_another_answer(prompt: list[int]) -> None:
    sampling = Sampling(max_tokens=30, ignore_eos=True)
    other = [*prompt[:-1], (prompt[-1] + 1) % tokens.VOCABULARY]
    assert list(tokens.generate(prompt, sampling)) != list(tokens.generate(other, sampling))


@given(prompts)
def test_min_tokens_masks_eos(prompt: list[int]) -> None:
    sampling = Sampling(max_tokens=2, min_tokens=1, logit_bias=((tokens.EOS, 100.0),))
    made = list(tokens.generate(prompt, sampling))
    assert made[0][0] != tokens.EOS
    assert made[1] == (tokens.EOS, "stop")


def test_what_changes_a_real_templates_output_changes_this_ones() -> None:
    messages = [{"role": "user", "content": "x"}]
    plain = tokens.render_chat(messages, {})
    assert tokens.render_chat(messages, {"tools": [1]}) != plain
    assert tokens.render_chat(messages, {"add_generation_prompt": False}) != plain
    assert tokens.render_chat([{"role": "user", "content": [{"type": "text", "text": "x"}]}], {}) == plain
