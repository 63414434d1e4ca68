"""Make the tiny model of the demo and the tests. Run by the engine's own Python: `python pd_tiny_model.py FOLDER`.

A random 2.8-million-parameter Llama and a byte-level BPE tokenizer of about 300 tokens. Nothing is downloaded, and
the fixed seed gives every run the same weights, so greedy answers can be compared. It speaks nonsense; what matters
is that a real engine computes, moves and reads real KV for it.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20260101
CONTEXT_TOKENS = 2048
SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TRAINING_TEXT = [
    "prefill computes the KV cache of a prompt and decode generates from it",
    "the quick brown fox jumps over the lazy dog, hello world, what is the answer",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|assistant|>' if m['role'] == 'assistant' else '<|user|>' }}"
    "{{ m['role'] + ': ' if m['role'] not in ('user', 'assistant') else '' }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '' }}{% endfor %}"
    "{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so any text can be encoded and any output decoded."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TRAINING_TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )


def model(vocabulary: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Weights wide enough (0.15) that each token depends on the whole prompt: wrong KV shows at once."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        initializer_range=0.15,
    )
    network = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        network.lm_head.weight[unreadable(vocabulary)] = 0  # a logit of 0 never wins: answers are printable
    return network


def unreadable(vocabulary: PreTrainedTokenizerFast) -> list[int]:
    """Every token that is not printable ASCII, EOS excepted: an answer may end."""
    tokens = range(len(vocabulary))
    texts = {token: vocabulary.decode([token]) for token in tokens if token != vocabulary.eos_token_id}
    special = set(vocabulary.convert_tokens_to_ids(SPECIAL_TOKENS))
    return [token for token, text in texts.items() if token in special or not (text.isascii() and text.isprintable())]


def main(folder: Path) -> None:
    vocabulary = tokenizer()
    network = model(vocabulary)
    vocabulary.save_pretrained(folder)
    network.save_pretrained(folder)
    print(json.dumps({"parameters": network.num_parameters(), "tokens": len(vocabulary)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
