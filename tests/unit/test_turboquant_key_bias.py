"""KeyBias against transformers' rotary embeddings, and find_key_biases on tiny random models."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_part_of_neighbours
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from turboquant import KeyBias, ShapeError
from turboquant.hf import find_key_biases

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
POSITIONS = torch.tensor([[0, 1, 5, 64, 999, 3000]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(**rope: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    config = AutoConfig.for_model("llama", **TINY, head_dim=16, rope_parameters={"rope_theta": 1e4, **rope})
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), POSITIONS)
    return cos, sin, rotary.inv_freq, float(rotary.attention_scaling)


def check(bias: KeyBias, turned: torch.Tensor) -> None:
    """turned: [G, S, D], what transformers makes of the bias at POSITIONS."""
    got = bias.vectors(POSITIONS[0])
    torch.testing.assert_close(got, turned, atol=1e-3, rtol=1e-3)  # its angles are float32 products
    q = draw(2, 3, turned.shape[-1], seed=5)
    torch.testing.assert_close(bias.scores(q, POSITIONS[0]), q @ got.transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_halves_as_in_llama() -> None:
    cos, sin, frequencies, _ = tables(rope_type="default")
    b = draw(2, 16)
    turned = rotate_halves(b[None, :, None], b[None, :, None].expand(-1, -1, 6, -1), cos, sin)[1][0]
    check(KeyBias(b, frequencies), turned)


def test_yarn_factor() -> None:
    cos, sin, frequencies, scaling = tables(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=512, attention_factor=1.3
    )
    b = draw(2, 16)
    turned = rotate_halves(b[None, :, None], b[None, :, None].expand(-1, -1, 6, -1), cos, sin)[1][0]
    assert scaling == pytest.approx(1.3)
    check(KeyBias(b, frequencies, scaling), turned)


def test_neighbours_as_in_cohere() -> None:
    _, _, frequencies, _ = tables(rope_type="default")
    angles = (POSITIONS[..., None] * frequencies).repeat_interleave(2, -1)
    b = draw(2, 16)
    keys = b[None, :, None].expand(-1, -1, 6, -1)
    check(KeyBias(b, frequencies, interleaved=True), rotate_neighbours(keys, keys, angles.cos(), angles.sin())[1][0])


def test_part_of_the_neighbours_as_in_glm() -> None:
    _, _, frequencies, _ = tables(rope_type="default")
    angles = (POSITIONS[..., None] * frequencies).repeat(1, 1, 2)
    b = draw(2, 24)
    keys = b[None, :, None].expand(-1, -1, 6, -1)
    turned = rotate_part_of_neighbours(keys, keys, angles.cos(), angles.sin())[1][0]
    assert torch.equal(turned[:, 0, 16:], turned[:, 5, 16:])
    check(KeyBias(b, frequencies, interleaved=True), turned)


def test_rows_with_their_own_positions() -> None:
    bias = KeyBias(draw(2, 16), torch.rand(8, generator=torch.Generator().manual_seed(1)))
    positions = torch.tensor([[0, 1, 2], [-5, -4, 3]])
    got = bias.vectors(positions)
    assert got.shape == (2, 2, 3, 16)
    for row in range(2):
        torch.testing.assert_close(got[row], bias.vectors(positions[row]))


def test_a_bias_without_rotary_is_constant() -> None:
    b = draw(2, 8)
    bias = KeyBias(b, torch.empty(0))
    assert torch.equal(bias.vectors(torch.arange(4)), b[:, None].expand(-1, 4, -1))
    q = draw(2, 3, 8, seed=2)
    torch.testing.assert_close(bias.scores(q, torch.arange(4)), (q @ b[..., None]).expand(-1, -1, 4))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"got \(2, 8\) and a rotary width of 16"):
        KeyBias(draw(2, 8), torch.ones(8))


# ---------------------------------------------------------------- the models' own


def build(model_type: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(model_type, **(TINY | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}


def keys_of_first_layer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model caches for a prompt, [G, S, D]."""
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values.layers[0].keys[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model_type", "changes", "parameter", "rotary_width"),
    [
        ("qwen2", {}, "k_proj.bias", 16),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "k_proj.bias", 16),
        ("starcoder2", {}, "k_proj.bias", 16),
        ("gpt_neox", {"rotary_pct": 0.5}, "query_key_value.bias", 8),
        ("phi", {"partial_rotary_factor": 0.5}, "k_proj.bias", 8),
        ("gpt2", GPT2, "c_attn.bias", 0),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}, "k_proj.bias", 0),
        ("glm", {"head_dim": 16, "attention_bias": True}, "k_proj.bias", 8),
        ("cohere", {"attention_bias": True, "logit_scale": 1.0}, "k_proj.bias", 16),
    ],
    ids=["qwen2", "qwen2-yarn", "starcoder2", "gpt_neox", "phi", "gpt2", "opt", "glm", "cohere"],
)
def test_what_is_found_is_what_the_models_keys_hold(
    model_type: str, changes: dict[str, Any], parameter: str, rotary_width: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(model_type, **changes)
    with caplog.at_level(logging.WARNING, "turboquant"):
        biases = find_key_biases(model)
    assert [record.message for record in caplog.records if record.name == "turboquant"] == []
    assert len(biases) == 2
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    bias = biases[0]
    assert bias is not None
    assert 2 * bias.inverse_frequencies.numel() == rotary_width
    expected = keys_of_first_layer(model, ids)
    for name, tensor in model.named_parameters():
        if name.endswith(parameter):
            tensor.data.zero_()
    expected = expected - keys_of_first_layer(model, ids)
    assert bool((expected.abs() > 0.05).any())
    torch.testing.assert_close(bias.vectors(torch.arange(40)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("qwen3", {"attention_bias": True}), ("olmo2", {"attention_bias": True})],
    ids=["no bias", "norm on the keys", "norm on the flat keys"],
)
def test_nothing_constant_nothing_found(model_type: str, changes: dict[str, Any]) -> None:
    assert find_key_biases(build(model_type, **changes)) == [None, None]


def test_rotary_that_changes_with_length_keeps_its_bias_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen2", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert find_key_biases(model) == [None, None]
    assert "rotary type dynamic changes with length" in caplog.text


def test_biases_that_are_not_in_memory_are_left_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen2").to("meta")
    assert find_key_biases(model) == [None, None]
    assert "not in memory" in caplog.text
