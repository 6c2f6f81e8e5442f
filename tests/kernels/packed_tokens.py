"""One layer's tokens as the kernels read them, made by plain PyTorch: its own records, shuffled, poisoned."""

from dataclasses import dataclass

import torch

from turboquant.blocks import read_records, write_records
from turboquant.key_bias import KeyBias
from turboquant.layout import BLOCK_TOKENS, BlockLayout, PackedTokens, SideLayout
from turboquant.ops.age import age_records
from turboquant.ops.attend import Segment, attend
from turboquant.rotation import Rotation, make_rotation


@dataclass
class Case:
    """What a test of attention varies; see the fields' names."""

    key_bits: int = 3
    value_bits: int = 3
    key_dim: int = 128
    value_dim: int | None = None
    groups: int = 2
    heads_per_group: int = 4
    lengths: tuple[int, ...] = (1000,)
    queries: int = 1
    dtype: torch.dtype = torch.float16
    has_means: bool = True
    has_bias: bool = False
    interleaved: bool = False
    rotary_dim: int | None = None
    softcap: float | None = None
    has_sink_logits: bool = False
    sinks: int = 4
    window: int = 128
    rotation: str = "hadamard"
    value_scale: float = 1.0
    query_scale: float = 1.0
    is_aged: bool = False  # older blocks have fewer planes
    seed: int = 0

    @property
    def width(self) -> int:
        """Width of the values."""
        return self.value_dim or self.key_dim


@dataclass
class Layer:
    """A case, made: its packed tokens, and what the reference needs."""

    case: Case
    packed: PackedTokens
    rotations: tuple[Rotation, Rotation]
    key_bias: KeyBias | None
    records: torch.Tensor
    blocks: list[list[tuple[int, BlockLayout]]]
    sink_logits: torch.Tensor | None
    q: torch.Tensor

    @property
    def most_blocks(self) -> int:
        """Blocks of the longest row."""
        return max(len(blocks) for blocks in self.blocks)

    def reference(self) -> torch.Tensor:
        """[B, H, T, Dv] float32 by ops/attend/reference.py, from the very codes and tails of `packed`."""
        case = self.case
        scale = case.key_dim**-0.5
        out = []
        for b, length in enumerate(case.lengths):
            if not length:
                out.append(torch.zeros(self.q.shape[1], case.queries, case.width, device=self.q.device))
                continue
            q = self.q[b].float().unflatten(0, (case.groups, -1)).flatten(1, 2)  # [G, H / G * T, D]
            keys, values, index = self.tokens(b)
            terms = self.key_bias.scores(q, index) if self.key_bias is not None else None
            query = torch.arange(length - case.queries, length).clamp_min(0).to(index.device)
            visible = (index[None, :] <= query[:, None]).repeat(case.heads_per_group, 1)
            logits = None
            if self.sink_logits is not None:
                logits = self.sink_logits.view(case.groups, -1, 1).expand(-1, -1, case.queries).flatten(1)
            result = attend(
                self.rotations[0].apply(q),
                [Segment(keys, values, terms, visible)],
                scale=scale,
                softcap=case.softcap,
                sink_logits=logits,
            )
            plain = self.rotations[1].invert(result)
            out.append(plain.unflatten(1, (case.heads_per_group, case.queries)).flatten(0, 1))
        return torch.stack(out)

    def tokens(self, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated keys and values [G, length, D] float32 of row b, and their indices."""
        case, packed = self.case, self.packed
        length, sinks = case.lengths[b], min(case.sinks, case.lengths[b])
        blocks = len(self.blocks[b])
        sides = []
        for side, tail in enumerate((packed.key_tail, packed.value_tail)):
            parts = [tail[b, :, :sinks].float()]
            for at, layout in self.blocks[b]:
                parts.append(read_records(self.records[None, at : at + layout.nbytes], layout, side))
            ring = tail.shape[2] - case.sinks
            recent = [case.sinks + (t % ring) for t in range(BLOCK_TOKENS * blocks, length - case.sinks)]
            parts.append(tail[b][:, recent].float())
            sides.append(torch.cat(parts, 1))
        return sides[0], sides[1], torch.arange(length, device=sides[0].device)


def make_layer(case: Case, device: str = "cpu") -> Layer:
    """Random tokens for a case; memory that nobody should read holds NaN."""
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    batch, groups, heads = len(case.lengths), case.groups, case.groups * case.heads_per_group
    layout = BlockLayout(
        groups,
        SideLayout(case.key_bits, case.key_dim, case.dtype, case.has_means),
        SideLayout(case.value_bits, case.width, case.dtype, False),
    )
    blocks = [max(0, (length - case.sinks - case.window) // BLOCK_TOKENS) for length in case.lengths]
    spare = 3
    records = torch.full((sum(blocks) + spare, layout.nbytes), 0xFF, dtype=torch.uint8)  # NaN in every dtype
    order = torch.randperm(len(records), generator=draw).tolist()
    slots = case.sinks + case.window + BLOCK_TOKENS
    tails, ids = [], []
    for _ in case.lengths:
        ids.append([order.pop() for _ in range(blocks[len(ids)])])
    for side, (dim, factor) in enumerate(((case.key_dim, 1.0), (case.width, case.value_scale))):
        tail = torch.full((batch, groups, slots, dim), float("nan"), dtype=case.dtype)
        for b, length in enumerate(case.lengths):
            # keys that share a mean within a block, as real ones do
            tokens = (normal(groups, length, dim) + 0.5 * normal(groups, 1, dim)) * factor
            tokens = tokens.to(case.dtype)
            tail[b, :, : case.sinks][:, :length] = tokens[:, : case.sinks]
            after = tokens[:, case.sinks :]
            for k, record in enumerate(ids[b]):
                view = records[record : record + 1]
                write_records(view, layout, side, after[:, BLOCK_TOKENS * k : BLOCK_TOKENS * (k + 1)])
            ring = slots - case.sinks
            for t in range(BLOCK_TOKENS * blocks[b], after.shape[1]):
                tail[b, :, case.sinks + t % ring] = after[:, t]
        tails.append(tail)
    flat = [records.view(-1)]
    end, stride = flat[0].numel(), layout.nbytes
    placed: list[list[tuple[int, BlockLayout]]] = [[(record * stride, layout) for record in own] for own in ids]
    if case.is_aged:
        # the oldest third by all but one plane, the next by one
        steps = [
            layout.with_bits(*(bits if bits == 16 else least(bits) for bits in (case.key_bits, case.value_bits)))
            for least in (lambda bits: 2, lambda bits: max(bits - 1, 2))
        ]
        for own, row in zip(ids, placed, strict=True):
            for k, record in enumerate(own[: len(own) * 2 // 3]):
                aged = steps[k >= len(own) // 3]
                flat.append(torch.full((aged.nbytes,), 0xFF, dtype=torch.uint8))
                age_records(records[record : record + 1], layout, flat[-1][None], aged)
                row[k] = (end, aged)
                end += aged.nbytes
    everything = torch.cat(flat)
    table = torch.full((batch, max(blocks, default=0) + 1), -(1 << 60), dtype=torch.int64)
    for b, row in enumerate(placed):
        for k, (at, own_layout) in enumerate(row):
            table[b, k] = at | own_layout.key.num_planes | own_layout.value.num_planes << 2
    key_bias = None
    if case.has_bias:
        rotary = case.key_dim if case.rotary_dim is None else case.rotary_dim
        inverse = 10_000.0 ** -(torch.arange(0, rotary, 2) / max(rotary, 1))
        # a few coordinates carry most of it, as in Qwen2.5
        bias = 4 * normal(groups, case.key_dim)
        bias[:, 3] = 40.0
        key_bias = KeyBias(bias.to(device), inverse.to(device), 1.1, case.interleaved)
    everything = everything.to(device)
    packed = PackedTokens(
        layout,
        everything,
        table.to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        tails[0].to(device),
        tails[1].to(device),
        case.sinks,
        case.window,
    )
    rotations = (make_rotation(case.rotation, case.key_dim, 5), make_rotation(case.rotation, case.width, 6))
    q = (normal(batch, heads, case.queries, case.key_dim) * case.query_scale).to(case.dtype).to(device)
    logits = normal(heads).to(device) if case.has_sink_logits else None
    return Layer(case, packed, rotations, key_bias, everything, placed, logits, q)
