"""Whole random models with what is known of models that are not here: a layer whose keys are mostly a constant, and
wide heads that share one KV head, with a window in all layers but one.

Divergences follow the squared error of the codes: a bit less multiplies both by the same.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamer.quality import CacheSetting, Quality, measure_quality
from turboquant import TurboQuantCache, wrap
from turboquant.hf import CompressedLayer

# Squared errors of codes of 4, 3 and 2 bits (docs/math.md) with the unbiased scale, d / (1 - d).
ERRORS = {bits: d / (1 - d) for bits, d in {4: 0.00950, 3: 0.03485, 2: 0.1203}.items()}
TOKENS, PREFILL = 400, 200


def build(model_type: str, **changes: Any) -> Any:
    """A model with random weights, under our attention."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(model_type, **(sizes | special | {"max_position_embeddings": 512} | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.125 if parameter.dim() > 1 else parameter + noise * 0.1)
    return wrap(model, bits=16)


def window() -> torch.Tensor:
    return torch.randint(0, 128, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def measured(model: Any, settings: Iterable[dict[str, Any]]) -> list[Quality]:
    named = [CacheSetting(str(i), options) for i, options in enumerate(settings)]
    return measure_quality(model, window(), named, prefill=PREFILL, step=20)


def projected(model: Any, projection: torch.nn.Module) -> torch.Tensor:
    """What a projection of the first layer gives for the window, [S, heads, 64]."""
    outputs: list[torch.Tensor] = []
    hook = projection.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(window())
    hook.remove()
    return outputs[0].view(TOKENS, -1, 64)


def test_keys_that_are_mostly_a_constant_cost_what_their_text_costs() -> None:
    """Layer 0 keys of norm 277, a constant for 97 % of it, as measured on a model of 0.5B with key biases."""
    model = build("qwen2", num_key_value_heads=2, head_dim=64, num_hidden_layers=2)
    attention = model.model.layers[0].self_attn
    norm, constant = 277.0, 0.97 * 277.0
    with torch.no_grad():
        attention.q_proj.bias.zero_()
        attention.k_proj.bias.zero_()
        # queries small enough that a softmax over scores of such keys is not one token's alone
        attention.q_proj.weight *= 0.3 / projected(model, attention.q_proj).norm(dim=-1).mean()
        text_norm = projected(model, attention.k_proj).square().sum(-1).mean().sqrt()
        attention.k_proj.weight *= (norm**2 - constant**2) ** 0.5 / text_norm
        planted = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
        attention.k_proj.bias.copy_((constant * planted / planted.norm(dim=-1, keepdim=True)).flatten())
    assert float(projected(model, attention.k_proj).norm(dim=-1).mean()) == pytest.approx(norm, rel=0.02)

    unknown = {"key_biases": [None, None]}
    keys = {bits: {"bits": bits, "value_bits": 16} for bits in (4, 3, 2)}  # the error of values would cover theirs
    found = measured(model, [options | more for options in keys.values() for more in ({}, unknown)])
    known, left_in = {4: found[0], 3: found[2], 2: found[4]}, {4: found[1], 3: found[3], 2: found[5]}
    for bits in (4, 3, 2):
        # block means take out part of what is left in, the part that turns slowly
        assert left_in[bits].kl_mean > 4 * known[bits].kl_mean
    assert left_in[4].kl_mean > known[3].kl_mean
    for fewer, more in ((3, 4), (2, 3)):
        ratio = known[fewer].kl_mean / known[more].kl_mean
        assert ratio == pytest.approx(ERRORS[fewer] / ERRORS[more], rel=0.25)  # 199 positions of a skewed distribution
    neither = measured(model, [keys[3] | unknown | {"block_means": False}])[0]
    assert neither.kl_mean > 8 * known[3].kl_mean


def test_wide_heads_and_sliding_layers_cost_what_their_codes_cost() -> None:
    """head_dim 256, one KV head, a window in five layers of six: only the sixth grows, and only it errs."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = build(
        "gemma3_text",
        num_key_value_heads=1,
        head_dim=256,
        num_hidden_layers=6,
        sliding_window=64,
        layer_types=kinds,
        query_pre_attn_scalar=256,
    )
    exact, *found = measured(model, [{"bits": bits} for bits in (16, 4, 3, 2)])
    assert exact.kl_mean < 1e-9
    four, three, two = found
    for fewer, more, bits in ((three, four, 3), (two, three, 2)):
        ratio = fewer.kl_mean / more.kl_mean
        assert ratio == pytest.approx(ERRORS[bits] / ERRORS[bits + 1], rel=0.25)  # 199 positions, skewed
    assert [isinstance(layer, CompressedLayer) for layer in TurboQuantCache(model, 4).layers] == [False] * 5 + [True]
    for quality, bits in zip(found, (4, 3, 2), strict=True):
        vector_bytes = 256 * bits // 8 + 2
        mean_bytes = 2 * 256 // 64
        # of the last 200 tokens three blocks of 64 were coded, as many as left the window
        assert quality.bytes_per_token == (2 * vector_bytes + mean_bytes) * 3 * 64 / 200
