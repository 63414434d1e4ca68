"""Make a tiny random model of some kind. Run by the engine's own Python: `python make.py KIND FOLDER`.

As the tiny model of the demo is made (`engines/plugins/pd_tiny_model.py`): nothing is downloaded, the seed is fixed,
and the weights are so wide that each token depends on the whole prompt.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_spec = importlib.util.spec_from_file_location(
    "pd_tiny_model", Path(__file__).parents[2] / "engines" / "plugins" / "pd_tiny_model.py"
)
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

Tokenizer = PreTrainedTokenizerFast
_WIDE = 0.15
_IMAGE_SIZE = 56


def _common(vocabulary: Tokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": tiny.CONTEXT_TOKENS,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": None,
        "initializer_range": _WIDE,
        "tie_word_embeddings": False,
    }


def gqa(vocabulary: Tokenizer) -> PreTrainedModel:
    """Eight query heads share one KV head, fewer than most tensor-parallel sizes."""
    config = transformers.Qwen3Config(**_common(vocabulary), num_key_value_heads=1, head_dim=32)
    return transformers.Qwen3ForCausalLM(config)


def mla(vocabulary: Tokenizer) -> PreTrainedModel:
    """DeepSeek's shape: one compressed latent for all heads, and experts."""
    config = transformers.DeepseekV3Config(
        **_common(vocabulary), num_key_value_heads=8, kv_lora_rank=512, q_lora_rank=128, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=128, first_k_dense_replace=1, topk_method="noaux_tc",
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def hybrid(vocabulary: Tokenizer) -> PreTrainedModel:
    """Qwen3-Next's shape: layers with a recurrent state (GDN) between layers with attention."""
    config = transformers.Qwen3NextConfig(
        **_common(vocabulary), num_key_value_heads=2, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=128, shared_expert_intermediate_size=128,
        layer_types=["linear_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def mamba(vocabulary: Tokenizer) -> PreTrainedModel:
    """Granite 4's shape: Mamba-2 layers between layers with attention."""
    config = transformers.GraniteMoeHybridConfig(
        **_common(vocabulary), num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=64, mamba_n_groups=1,
        mamba_d_state=64, mamba_expand=2, mamba_chunk_size=64, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=512, layer_types=["mamba", "attention"] * 2, position_embedding_type="rope",
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def moe(vocabulary: Tokenizer) -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        **_common(vocabulary), num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=128, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def sliding(vocabulary: Tokenizer) -> PreTrainedModel:
    """Gemma 3's shape: layers that see only the last tokens between layers that see all."""
    config = transformers.Gemma3TextConfig(
        **_common(vocabulary), num_key_value_heads=2, head_dim=32, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def vision(vocabulary: Tokenizer) -> PreTrainedModel:
    """Idefics 3's shape: an image becomes tokens of the prompt, four of them here."""
    text = transformers.LlamaConfig(**_common(vocabulary), num_key_value_heads=4)
    image = vocabulary.convert_tokens_to_ids("<image>")
    config = transformers.Idefics3Config(
        text_config=text.to_dict(), image_token_id=image, pad_token_id=1, scale_factor=2, tie_word_embeddings=False,
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": _IMAGE_SIZE, "patch_size": 14, "initializer_range": _WIDE,
        },
    )  # fmt: skip
    return transformers.Idefics3ForConditionalGeneration(config)


def _image_processor(vocabulary: Tokenizer) -> transformers.ProcessorMixin:
    size = {"longest_edge": _IMAGE_SIZE}
    images = transformers.Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    return transformers.Idefics3Processor(images, vocabulary, image_seq_len=4, chat_template=tiny.CHAT_TEMPLATE)


def embeddings(vocabulary: Tokenizer) -> PreTrainedModel:
    """An encoder, which makes no tokens."""
    common = _common(vocabulary) | {"initializer_range": 0.02, "max_position_embeddings": 512}
    return transformers.BertModel(transformers.BertConfig(**common))


MODELS: dict[str, Callable[[Tokenizer], PreTrainedModel]] = {
    "gqa": gqa,
    "mla": mla,
    "hybrid": hybrid,
    "mamba": mamba,
    "moe": moe,
    "sliding": sliding,
    "vision": vision,
    "embeddings": embeddings,
    "reasoning": gqa,
}
_MORE_TOKENS = {
    "vision": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"],
    "reasoning": ["<think>", "</think>"],
}


def adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter for the demo's model, on the projections of every layer."""
    config = tiny.model(tiny.tokenizer()).config  # it sets a seed of its own
    torch.manual_seed(seed)
    targets = {"q_proj": config.hidden_size, "v_proj": config.hidden_size}
    weights = {}
    for layer in range(config.num_hidden_layers):
        for name, size in targets.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{place}.lora_A.weight"] = torch.randn(8, config.hidden_size) * 0.2
            weights[f"{place}.lora_B.weight"] = torch.randn(size, 8) * 0.2
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def main(kind: str, folder: Path) -> None:
    if kind.startswith("adapter-"):
        adapter(folder, int(kind.removeprefix("adapter-")))
        return
    torch.manual_seed(tiny.SEED)
    vocabulary = tiny.tokenizer()
    vocabulary.add_tokens(_MORE_TOKENS.get(kind, []), special_tokens=True)
    network = MODELS[kind](vocabulary).to(torch.bfloat16)
    if hasattr(network, "lm_head"):
        with torch.no_grad():
            network.lm_head.weight[tiny.unreadable(vocabulary)] = 0
    vocabulary.save_pretrained(folder)
    network.save_pretrained(folder)
    if kind == "vision":
        _image_processor(vocabulary).save_pretrained(folder)
    print(json.dumps({"kind": kind, "parameters": network.num_parameters()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
