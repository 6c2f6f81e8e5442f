"""TurboQuantCache: a transformers Cache whose full-attention layers keep their keys and values compressed."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from turboquant.errors import OptionError, ShapeError, StateError, UnsupportedModelError
from turboquant.hf.dense import dense_attention
from turboquant.hf.key_bias import find_key_biases
from turboquant.hf.masks import CausalMask
from turboquant.key_bias import KeyBias
from turboquant.policy import NO_DECAY, Precision, check_decay, layer_precisions, parse_decay
from turboquant.store import CompressedKV, StoreOptions

logger = logging.getLogger("turboquant")

ATTENTION_NAME = "turboquant"

# Queries of one call that are answered from the codes; more (a prompt) read their layer uncompressed instead.
MAX_PACKED_QUERIES = 64

# A layer without a stated capacity grows by this many tokens at a time.
_DENSE_STEP_TOKENS = 256


@dataclass(frozen=True)
class LayerShape:
    """Heads and widths of one attention layer: G, Dk, Dv."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class LayerReport:
    """What one layer of the cache holds; bytes are sums over the tensors that exist.

    Attributes:
        layer: index. kind: "compressed", "dense", "sliding window" or "empty".
        key_bits, value_bits: widths of the stored code (16 = the model's dtype); blocks that have aged have fewer.
        tokens: tokens held per row. coded_tokens: those of them held as codes.
        nbytes: all bytes. parts: the same by kind ("codes", "scales", "means", "dense", "rotation", "bias", "tables").
        dense_nbytes: what the same tokens take in the model's dtype.
    """

    layer: int
    kind: str
    key_bits: int
    value_bits: int
    tokens: int
    coded_tokens: int
    nbytes: int
    parts: dict[str, int]
    dense_nbytes: int


class _Handle:
    """Stands for a layer's keys (or values) between `update` and our attention function, which asks the layer.

    Any other use is model code that wants the tensor itself: refused by name instead of answered wrongly.
    """

    def __init__(self, layer: "CompressedLayer", new: torch.Tensor):
        self.layer, self.new = layer, new

    def __getattr__(self, name: str) -> Any:
        raise _reads_keys_itself(name)

    def __getitem__(self, index: Any) -> Any:
        raise _reads_keys_itself("__getitem__")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _reads_keys_itself(getattr(func, "__name__", str(func)))


def _reads_keys_itself(asked_for: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this model reads the cached keys itself (asks for .{asked_for}), so it cannot use attention "
        f'"{ATTENTION_NAME}"; load it with attn_implementation="sdpa": the cache then unpacks a layer per call'
    )


class CompressedLayer(CacheLayerMixin):
    """One full-attention layer whose tokens live in a CompressedKV."""

    is_sliding = False
    is_croppable = True

    def __init__(self, store: CompressedKV, attention_of: PreTrainedConfig):
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self.store = store
        self._config = attention_of
        # the exact keys and values of a prompt that arrives in chunks: [B, G, old + new, D], and how many are there
        self._scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._expected = self._filled = self._old = 0
        self._pads: tuple[int, ...] | None = None  # of the rows of the prompt that is being read
        self.announced_pads: tuple[int, ...] | None = None  # for a foreign attention, which keeps its mask to itself

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the store takes dtype, device and batch from its first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys and values [B, G, T, D] of the new tokens.

        Returns:
            Under our attention: two handles that it answers. Under any other: the whole layer unpacked, in the
            model's dtype, new tokens exact; tensors that live as long as the call holds them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._config._attn_implementation == ATTENTION_NAME:
            return _Handle(self, key_states), _Handle(self, value_states)
        tokens = key_states.shape[-2]
        if self.store.batch_size == 0:
            self.store.append(key_states, value_states, self.announced_pads)
            return key_states, value_states
        keys, values = self.store.unpacked(extra_columns=tokens)
        keys[:, :, -tokens:], values[:, :, -tokens:] = key_states, value_states
        self.store.append(key_states, value_states)
        return keys, values

    # -------------------------------------------------------- our attention
    @contextmanager
    def prompt(self, tokens: int) -> Iterator[None]:
        """Within this, `tokens` new tokens arrive in several calls and attend to each other uncompressed.

        They are coded when the block ends; if it ends early, by an error, none of them is kept.
        """
        if self._expected:
            raise StateError("a prompt is already being read by this layer")
        self._expected, self._filled = tokens, 0
        try:
            yield
            if self._scratch is not None and self._filled == tokens:
                keys, values = self._scratch
                self._append(keys[:, :, self._old :], values[:, :, self._old :])
        finally:
            self._scratch, self._expected, self._pads = None, 0, None

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the new keys and values [B, G, T, D] and answer the queries [B, H, T, D] over the whole layer."""
        tokens = q.shape[2]
        pads = mask.pads if isinstance(mask, CausalMask) and mask.padding is not None else None
        # padding that an earlier call stored as tokens (it came with another mask) has to be masked, like any pattern
        fits = self.store.accepts_padding(pads)
        special = mask is not None and not (isinstance(mask, CausalMask) and mask.sliding_window is None and fits)
        self._pads = pads if fits else None
        packed = not self._expected and not special and tokens <= MAX_PACKED_QUERIES
        if packed and (tokens == 1 or self.store.batch_size):
            self._append(keys, values)
            return self.store.attend(q, scale=scale, softcap=softcap, sink_logits=sink_logits)
        if not self._expected:
            with self.prompt(tokens):
                return self._attend_exactly(module, q, keys, values, mask, scale, softcap, sink_logits)
        return self._attend_exactly(module, q, keys, values, mask, scale, softcap, sink_logits)

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.store.append(keys, values, self._pads)
        self._pads = None

    def _attend_exactly(
        self,
        module: nn.Module,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens = keys.shape[2]
        if self._scratch is None:
            self._old = self.store.columns
            if self._old == 0 and tokens == self._expected:
                self._scratch = (keys, values)  # the whole prompt at once: its own tensors are the scratch
            elif self._old == 0:
                shape = (*keys.shape[:2], self._expected)
                self._scratch = (keys.new_empty(*shape, keys.shape[-1]), values.new_empty(*shape, values.shape[-1]))
            else:
                self._scratch = self.store.unpacked(extra_columns=self._expected)
        start = self._old + self._filled
        stop = start + tokens
        if stop > self._old + self._expected:
            raise StateError(f"a prompt of {self._expected} tokens was announced and more arrived")
        all_keys, all_values = self._scratch
        if all_keys is not keys:
            all_keys[:, :, start:stop], all_values[:, :, start:stop] = keys, values
        self._filled += tokens
        return dense_attention(
            module,
            q,
            all_keys[:, :, :stop],
            all_values[:, :, :stop],
            mask,
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
        )

    # ------------------------------------------------- transformers' layer API
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        return self.store.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self.store.columns

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Appended tokens may be taken back by crop without a trace (assisted generation)."""
        self.store.record_past()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: a negative count, or (older releases) the positive length to keep."""
        self.store.crop(_tokens_to_drop(tokens_to_remove, self.store.columns))

    def reset(self) -> None:
        """Forget all tokens."""
        self.store.reset()
        self._pads = self.announced_pads = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order of beam_idx [B] (beam search)."""
        self.store.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, copies side by side."""
        self.store.select_rows([row for row in range(self.store.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that indices name (integers, or one boolean per row)."""
        self.store.select_rows(torch.arange(self.store.batch_size)[indices.cpu()].tolist())

    def offload(self) -> None:
        """Refused: the cache is made to stay on the device."""
        raise UnsupportedModelError("TurboQuantCache does not move to host memory; build it without offloading")

    def prefetch(self) -> None:
        """Refused, like offload."""
        raise UnsupportedModelError("TurboQuantCache does not move to host memory; build it without offloading")


class DenseLayer(CacheLayerMixin):
    """One layer in the model's dtype, in a buffer that is written in place (no concatenation per step)."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity_tokens: int | None = None):
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own
        self._capacity = capacity_tokens
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for the stated capacity, or for a first step."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._allocate(key_states, value_states, self._capacity or 0)
        self.is_initialized = True

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        old_keys, old_values = self.keys, self.values
        self.keys = keys.new_empty(*keys.shape[:2], tokens, keys.shape[-1])
        self.values = values.new_empty(*values.shape[:2], tokens, values.shape[-1])
        if old_keys is not None and old_values is not None:
            self.keys[:, :, : self._length] = old_keys[:, :, : self._length]
            self.values[:, :, : self._length] = old_values[:, :, : self._length]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write keys and values [B, G, T, D]; returns views of all tokens held, valid until the next update."""
        if not self.is_initialized or (not self._length and not self._serves(key_states, value_states)):
            self.keys = self.values = None
            self.lazy_initialization(key_states, value_states)
        stop = self._length + key_states.shape[-2]
        if stop > self._buffers()[0].shape[-2]:
            self._allocate(key_states, value_states, -(-stop // _DENSE_STEP_TOKENS) * _DENSE_STEP_TOKENS)
        keys, values = self._buffers()
        keys[:, :, self._length : stop] = key_states
        values[:, :, self._length : stop] = value_states
        self._length = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def _serves(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether buffers that were allocated before the first tokens came are the right ones."""
        return all(
            (own.shape[:2], own.shape[3], own.dtype, own.device) == (new.shape[:2], new.shape[3], new.dtype, new.device)
            for own, new in zip(self._buffers(), (keys, values), strict=True)
        )

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            raise StateError("the layer is empty: update it first")
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._length

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: a negative count, or (older releases) the positive length to keep."""
        self._length = max(0, self._length - _tokens_to_drop(tokens_to_remove, self._length))

    def reset(self) -> None:
        """Forget all tokens and give the buffers back."""
        self.keys = self.values = None
        self._length, self.is_initialized = 0, False

    def _select(self, index: torch.Tensor) -> None:
        if self.is_initialized:
            keys, values = self._buffers()
            index = index.to(keys.device)
            self.keys, self.values = keys.index_select(0, index), values.index_select(0, index)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order of beam_idx [B] (beam search)."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, copies side by side."""
        if self.is_initialized:
            self._select(torch.arange(self._buffers()[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that indices name (integers, or one boolean per row)."""
        if self.is_initialized:
            self._select(torch.arange(self._buffers()[0].shape[0])[indices.cpu()])


def _tokens_to_drop(tokens_to_remove: int, length: int) -> int:
    """transformers 5 passes minus the number of tokens to drop; transformers 4 passed the length to keep."""
    return -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)


class TurboQuantCache(Cache):
    """Compressed KV cache for `model.generate(past_key_values=TurboQuantCache(model, bits=3))`.

    Args:
        model: a transformers decoder (key biases are then taken out exactly), or its config alone.
        bits: bits of each key and value coordinate: 2, 3, 4, or 16 for none; 2.5 and 3.5 give keys one bit more than
            values.
        key_bits, value_bits: override `bits` for one side.
        layer_bits: other bits for some layers, as in "0-3:4,-1:4/3": 4 bits for the first four, 4-bit keys and 3-bit
            values for the last.
        protected_layers: layers kept in the model's dtype; negative indices count from the end.
        window: newest tokens kept in the model's dtype (up to 63 more wait for a whole block).
        sinks: first tokens of each sequence kept in the model's dtype.
        rotation: "hadamard" or "qr". seed: of the rotations.
        block_means: take the mean of each block of 64 tokens out of its keys.
        capacity_tokens: allocate for that many tokens at once; None grows in steps.
        skip_below: kernels may leave out the values of blocks whose weights are all below this share of the largest,
            see `ops.attend.attend_packed` for the bound of the error; 0 leaves nothing out.
        decay: from which ages on tokens keep fewer bits, block by block, as in "4096:3,32768:2" (`parse_decay`): older
            than 4096 tokens at most 3 bits, older than 32768 at most 2; sinks and window stay. "off": they keep all.
        key_biases: one KeyBias or None per layer, for a caller that knows them; default: read from `model`.
    Layers with a sliding window keep transformers' own layer. Under our attention (`wrap`, or
    `model.set_attn_implementation("turboquant")`) codes are read in place; under any other, `update` unpacks the
    layer for that call.
    Raises:
        OptionError: a bad option. UnsupportedModelError: a layer kind that cannot be compressed, by name.
    """

    def __init__(
        self,
        model: nn.Module | PreTrainedConfig,
        bits: float = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        layer_bits: str = "",
        protected_layers: Iterable[int] = (),
        window: int = 128,
        sinks: int = 4,
        rotation: str = "hadamard",
        seed: int = 0,
        block_means: bool = True,
        capacity_tokens: int | None = None,
        skip_below: float = 0.0,
        decay: str = NO_DECAY,
        key_biases: Sequence[KeyBias | None] | None = None,
    ):
        config = cast(
            PreTrainedConfig, model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
        )
        if not isinstance(config, PreTrainedConfig):
            raise OptionError(f"TurboQuantCache needs a transformers model or its config; got {type(model).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{config.model_type} is an encoder-decoder; the compressed cache serves decoder-only models"
            )
        takes_caches = getattr(model, "_supports_default_dynamic_cache", None)  # a model's word on its own class
        if takes_caches is not None and not takes_caches():
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps its past in a form of its own; it takes no cache"
            )
        self.config = config.get_text_config(decoder=True)
        plain_layers = plain_cache_layers(self.config)
        precisions = layer_precisions(
            len(plain_layers),
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            layer_bits=layer_bits,
            protected_layers=tuple(protected_layers),
        )
        steps = parse_decay(decay)
        check_decay(steps, precisions)
        if key_biases is None:
            key_biases = find_key_biases(model) if isinstance(model, nn.Module) else [None] * len(plain_layers)
        if len(key_biases) != len(plain_layers):
            raise OptionError(f"key_biases needs one entry per layer ({len(plain_layers)}); got {len(key_biases)}")
        layers: list[Any] = []
        for i, (plain, precision, bias) in enumerate(zip(plain_layers, precisions, key_biases, strict=True)):
            if isinstance(plain, DynamicSlidingWindowLayer):
                layers.append(plain)
            elif precision == Precision(16, 16):
                layers.append(DenseLayer(capacity_tokens))
            else:
                options = StoreOptions(
                    precision,
                    window,
                    sinks,
                    rotation,
                    _layer_seed(seed, i),
                    block_means,
                    capacity_tokens,
                    skip_below,
                    steps,
                )
                layers.append(CompressedLayer(CompressedKV(options, key_bias=bias), self.config))
        super().__init__(layers=layers)
        self._capacity_tokens = capacity_tokens
        self._has_named_attention = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Hand the new keys and values [B, G, T, D] to their layer; see CompressedLayer.update."""
        attention = self.config._attn_implementation
        is_foreign = attention != ATTENTION_NAME and isinstance(self.layers[layer_idx], CompressedLayer)
        if is_foreign and not self._has_named_attention:
            self._has_named_attention = True
            logger.warning(
                "attention is %s: compressed layers are unpacked for each call; wrap(model) or "
                "attn_implementation='%s' reads them in place",
                attention,
                ATTENTION_NAME,
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the stated capacity of all layers at once, before the first token.

        Layer by layer, between the activations of a prompt, buffers leave holes that nothing else fits. Layers that
        hold something stay as they are; without a stated capacity nothing is done. Tokens of another shape, dtype or
        device than the config and these arguments tell get buffers of their own when they come.

        Args:
            batch: rows to come. dtype, device: of their keys and values.
        Raises:
            ShapeError: the config does not tell a layer's shape, or not one that can be coded.
        """
        if self._capacity_tokens is None:
            return
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, (CompressedLayer, DenseLayer)) or layer.is_initialized:
                continue
            shape = layer_shape(self.config, i)
            keys = torch.empty(batch, shape.num_kv_heads, 0, shape.key_dim, dtype=dtype, device=device)
            values = torch.empty(batch, shape.num_kv_heads, 0, shape.value_dim, dtype=dtype, device=device)
            if isinstance(layer, CompressedLayer):
                layer.store.set_aside(keys, values)
            else:
                layer.lazy_initialization(keys, values)

    def announce_padding(self, attention_mask: torch.Tensor) -> None:
        """Tell an empty cache which columns of its first tokens are padding, where the attention cannot.

        Under our attention the mask says so itself. Under another, tokens reach the cache without their mask, and
        padding would be stored and coded among them: right, but another code than the row alone would get.

        Args:
            attention_mask: [B, S], 0 for padding, which counts where it stands on the left.
        """
        if self.get_seq_length():
            return
        pads = tuple((attention_mask.cumsum(-1) == 0).sum(-1).tolist())
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.announced_pads = pads

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        return sum(row.nbytes for row in self.report())

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first token."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer) and layer.store.batch_size:
                return layer.store.batch_size
            if isinstance(layer, (DenseLayer, DynamicSlidingWindowLayer)) and layer.keys is not None:
                return int(layer.keys.shape[0])
        return -1

    def report(self) -> list[LayerReport]:
        """Layer by layer: what is compressed, how, and its real bytes."""
        return [_report_layer(i, layer) for i, layer in enumerate(self.layers)]


def _layer_seed(seed: int, layer: int) -> int:
    """Another rotation for every layer of every seed: errors of different layers must not line up."""
    return 10_007 * seed + layer


def _report_layer(index: int, layer: Any) -> LayerReport:
    if isinstance(layer, CompressedLayer):
        store = layer.store
        precision = store.options.precision
        return LayerReport(
            index,
            "compressed" if store.batch_size else "empty",
            precision.key_bits,
            precision.value_bits,
            store.columns,
            store.coded_tokens,
            store.nbytes,
            store.bytes_by_part(),
            store.dense_nbytes,
        )
    held = layer.keys.nbytes + layer.values.nbytes if layer.is_initialized and layer.keys is not None else 0
    kind = "sliding window" if isinstance(layer, DynamicSlidingWindowLayer) else "dense"
    parts = {"codes": 0, "scales": 0, "means": 0, "dense": held, "rotation": 0, "bias": 0, "tables": 0}
    return LayerReport(
        index, kind if layer.get_seq_length() else "empty", 16, 16, layer.get_seq_length(), 0, held, parts, held
    )


def plain_cache_layers(config: PreTrainedConfig) -> list[Any]:
    """transformers' own cache layers for this config, once each kind is known to be one that we can serve.

    Raises:
        UnsupportedModelError: a layer with recurrent state, shared keys, an indexer or latent keys (MLA), by name.
    """
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{config.model_type} uses multi-head latent attention (kv_lora_rank {config.kv_lora_rank}), whose cache "
            "cannot be compressed yet; use transformers' own cache"
        )
    if getattr(config, "num_attention_heads", None) is None and getattr(config, "per_layer_config", None) is None:
        raise UnsupportedModelError(
            f"{config.model_type} states no attention heads; its state cannot be kept in this cache"
        )
    layers = list(DynamicCache(config=config).layers)
    if not layers:
        raise UnsupportedModelError(f"{config.model_type} states no layers; a decoder's config is needed")
    if len(layers) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{config.model_type} has {config.num_hidden_layers} layers and keeps keys and values for {len(layers)} of "
            "them (the others share), which cannot be compressed yet; use transformers' own cache"
        )
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedModelError(
                f"layer {i} of {config.model_type} keeps a {type(layer).__name__} (not plain keys and values), "
                "which cannot be compressed yet; use transformers' own cache"
            )
    return layers


def layer_shape(config: PreTrainedConfig, layer: int) -> LayerShape:
    """KV heads and head widths of one layer, from the config (never from hidden_size / heads when stated)."""
    per_layer: Any = getattr(config, "per_layer_config", None)
    own: Any = config if per_layer is None else per_layer[layer]
    heads = own.num_attention_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // heads
    kv_heads = getattr(own, "num_key_value_heads", None) or getattr(own, "num_kv_heads", None) or heads
    if getattr(own, "multi_query", False) and not getattr(own, "new_decoder_architecture", False):
        kv_heads = 1  # Falcon, GPT-BigCode
    if not isinstance(kv_heads, int):
        raise ShapeError(f"num_key_value_heads of {config.model_type} is {kv_heads!r}; one number was expected")
    value_dim = getattr(own, "v_head_dim", None) or head_dim
    return LayerShape(kv_heads, head_dim, value_dim)
