"""append on the GPU: new keys and values rotated, the keys' bias taken out, into their place; one launch for both."""

import torch
import triton
import triton.language as tl

from turboquant.layout import PackedTokens
from turboquant.ops.attend.bias import BiasTerms
from turboquant.ops.attend.parts import turned

# Tokens of a program. The same whatever the call brings, so that a token's result does not depend on its neighbours.
_TOKENS = 16


@triton.jit
def _rotate(
    x,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    matrix,
    bias,
    frequencies,
    bias_scaling,
    out,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    positions,
    lengths,
    b,
    g,
    tokens,
    sinks,
    ring,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TO_TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """TOKENS vectors of one head, times the rotation's matrix in float32, rounded once."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = t < tokens
    d = tl.arange(0, DIM_PADDED)
    source = x + b.to(tl.int64) * x_batch_stride + g.to(tl.int64) * x_head_stride + t[:, None] * x_token_stride
    position = tl.load(positions + b) + t
    total = tl.zeros((TOKENS, DIM_PADDED), tl.float32)
    for start in tl.static_range(0, DIM, CHUNK):
        c = start + tl.arange(0, CHUNK)
        mask = is_token[:, None] & (c < DIM)[None, :]
        part = tl.load(source + c[None, :], mask=mask, other=0).to(tl.float32)
        if HAS_BIAS:
            # coordinate c of R_t b: its own share times cos, its partner's times sin
            is_turned = c < 2 * PAIRS
            if INTERLEAVED:
                pair = c // 2
                is_first = c % 2 == 0
                partner = tl.where(is_first, c + 1, c - 1)
            else:
                is_first = c < PAIRS
                pair = tl.where(is_first, c, c - PAIRS)
                partner = tl.where(is_first, c + PAIRS, c - PAIRS)
            own = bias + g.to(tl.int64) * DIM
            share = tl.load(own + c, mask=c < DIM, other=0)
            other = tl.load(own + partner, mask=is_turned, other=0)
            cos, sin = turned(position[:, None], tl.load(frequencies + pair, mask=is_turned, other=0)[None, :])
            sign = tl.where(is_first, -1.0, 1.0)
            moved = (share[None, :] * cos + (sign * other)[None, :] * sin) * bias_scaling
            part -= tl.where(is_turned[None, :], moved, share[None, :])
            part = tl.where(mask, part, 0.0)
        turn = tl.load(matrix + d[None, :] * DIM + c[:, None], mask=(c < DIM)[:, None] & (d < DIM)[None, :], other=0)
        total = tl.dot(part, turn, total, input_precision="ieee")
    if TO_TAIL:
        token = tl.load(lengths + b) + t
        t = tl.where(token < sinks, token, sinks + (token - sinks) % ring)
    to = out + b.to(tl.int64) * out_batch_stride + g.to(tl.int64) * out_head_stride + t[:, None] * out_token_stride
    tl.store(to + d[None, :], total.to(out.dtype.element_ty), mask=is_token[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["groups", "tokens", "sinks", "ring"])
def _append(
    keys,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    values,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    key_matrix,
    value_matrix,
    bias,
    frequencies,
    bias_scaling,
    out_keys,
    out_key_batch_stride,
    out_key_head_stride,
    out_key_token_stride,
    out_values,
    out_value_batch_stride,
    out_value_head_stride,
    out_value_token_stride,
    positions,
    lengths,
    groups,
    tokens,
    sinks,
    ring,
    KEY_DIM: tl.constexpr,
    KEY_DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TO_TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(1) // groups
    g = tl.program_id(1) % groups
    if tl.program_id(2) == 0:
        _rotate(
            keys, key_batch_stride, key_head_stride, key_token_stride, key_matrix, bias, frequencies, bias_scaling,
            out_keys, out_key_batch_stride, out_key_head_stride, out_key_token_stride,
            positions, lengths, b, g, tokens, sinks, ring,
            KEY_DIM, KEY_DIM_PADDED, HAS_BIAS, PAIRS, INTERLEAVED, TO_TAIL, TOKENS, CHUNK,
        )  # fmt: skip
    else:
        _rotate(
            values, value_batch_stride, value_head_stride, value_token_stride, value_matrix, bias, frequencies,
            bias_scaling, out_values, out_value_batch_stride, out_value_head_stride, out_value_token_stride,
            positions, lengths, b, g, tokens, sinks, ring,
            VALUE_DIM, VALUE_DIM_PADDED, False, PAIRS, INTERLEAVED, TO_TAIL, TOKENS, CHUNK,
        )  # fmt: skip


def rotate(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_matrix: torch.Tensor,
    value_matrix: torch.Tensor,
    bias: BiasTerms | None,
    positions: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor],
    packed: PackedTokens | None = None,
) -> None:
    """New keys and values, rotated and rounded to the dtype of `out`.

    Args:
        keys: [B, G, T, Dk], values: [B, G, T, Dv], last axis contiguous.
        key_matrix: [Dk, Dk], value_matrix: [Dv, Dv] float32, see Rotation.matrix.
        bias: what to take out of the keys, or None. positions: [B] int32, of each row's first token.
        out: where they go: two tensors [B, G, T, D]; with `packed`, its two tails, each token in its slot.
        packed: gives the tokens that each row holds (before these), the number of sinks and the length of the ring.
    """
    batch, groups, tokens, key_dim = keys.shape
    value_dim = values.shape[-1]
    to_tail = packed is not None
    out_keys, out_values = out
    _append[(-(-tokens // _TOKENS), batch * groups, 2)](
        keys,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        key_matrix,
        value_matrix,
        bias.bias if bias is not None else key_matrix,
        bias.tables.frequencies if bias is not None else positions,
        bias.scaling if bias is not None else 1.0,
        out_keys,
        out_keys.stride(0),
        out_keys.stride(1),
        out_keys.stride(2),
        out_values,
        out_values.stride(0),
        out_values.stride(1),
        out_values.stride(2),
        positions,
        packed.lengths if packed is not None else positions,
        groups,
        tokens,
        packed.sinks if packed is not None else 0,
        packed.key_tail.shape[2] - packed.sinks if packed is not None else 1,
        KEY_DIM=key_dim,
        KEY_DIM_PADDED=max(16, triton.next_power_of_2(key_dim)),
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=max(16, triton.next_power_of_2(value_dim)),
        HAS_BIAS=bias is not None,
        PAIRS=bias.tables.pairs if bias is not None else 0,
        INTERLEAVED=bias is not None and bias.interleaved,
        TO_TAIL=to_tail,
        TOKENS=_TOKENS,
        CHUNK=32 if max(key_dim, value_dim) <= 128 else 16,
        num_warps=4 if max(key_dim, value_dim) <= 128 else 8,
    )
