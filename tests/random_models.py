"""Configs of the tiny random models that tests run: one of each family, with what the family is known for."""

from typing import Any

VOCAB_SIZE = 128

# Sizes shared by the families whose configs use the usual names; head_dim 16 is the smallest multiple of 8 above 8.
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB_SIZE,
}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": VOCAB_SIZE}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# model_type -> config arguments; what differs from _COMMON is what the family is known for.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 24},  # not hidden_size / num_attention_heads
    "mistral": _COMMON | {"sliding_window": 16, "head_dim": 16},
    "gemma2": _COMMON
    | {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4, "layer_types": _ALTERNATING}
    | {"query_pre_attn_scalar": 16},
    "gemma3_text": _COMMON
    | {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4, "layer_types": _ALTERNATING}
    | {"query_pre_attn_scalar": 16},
    "phi3": _COMMON | {"sliding_window": 16},
    "olmo2": _COMMON,
    "gpt_neox": _COMMON | {"rotary_pct": 0.5},
    "mixtral": _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _COMMON | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "opt": _COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": _GPT,
    "starcoder2": _COMMON | {"sliding_window": 16},
    "cohere": _COMMON | {"logit_scale": 1.0},
    "phi": _COMMON | {"partial_rotary_factor": 0.5},
    "stablelm": _COMMON | {"partial_rotary_factor": 0.25},
    "gpt_oss": _COMMON
    | {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4, "layer_types": _ALTERNATING}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
}

_GATED = _COMMON | {"head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 16, "layer_types": _ALTERNATING}

# Families whose answers are compared at 16 bits only.
MORE_RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB_SIZE},
    "cohere2": _COMMON | _SLIDING,
    "exaone4": _COMMON | _SLIDING,
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE},
    "gemma": _GATED,
    "glm4": _GATED | {"partial_rotary_factor": 0.5},
    "gptj": _GPT | {"rotary_dim": 8},
    "granite": _COMMON | {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "llama4_text": _GATED
    | {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}
    | {"attention_chunk_size": 16, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0]},
    "nanochat": _COMMON,  # its norms have no weights
    "nemotron": _GATED,
    "olmo": _COMMON,  # likewise
    "olmo3": _COMMON | _SLIDING,
    "qwen2_moe": _COMMON | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "seed_oss": _GATED,
    "smollm3": _COMMON | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
