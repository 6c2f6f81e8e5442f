"""Compressed caches for transformers: the only package here that imports transformers."""

from turboquant.hf.attention import install_cache, register_attention, remove_cache, turboquant_attention, wrap
from turboquant.hf.cache import (
    ATTENTION_NAME,
    CompressedLayer,
    DenseLayer,
    LayerReport,
    LayerShape,
    TurboQuantCache,
    layer_shape,
    plain_cache_layers,
)
from turboquant.hf.dense import FLOAT32_SCORE_BYTES
from turboquant.hf.key_bias import attention_of, decoder_layers, find_key_biases, key_bias_of, rotary_of
from turboquant.hf.masks import CausalMask, turboquant_mask

__all__ = [
    "ATTENTION_NAME",
    "FLOAT32_SCORE_BYTES",
    "CausalMask",
    "CompressedLayer",
    "DenseLayer",
    "LayerReport",
    "LayerShape",
    "TurboQuantCache",
    "attention_of",
    "decoder_layers",
    "find_key_biases",
    "install_cache",
    "key_bias_of",
    "layer_shape",
    "plain_cache_layers",
    "register_attention",
    "remove_cache",
    "rotary_of",
    "turboquant_attention",
    "turboquant_mask",
    "wrap",
]
