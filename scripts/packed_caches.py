"""Random compressed caches and GPU times, for bench_attention.py and tune_kernels.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turboquant.layout import BLOCK_TOKENS, BlockLayout, PackedTokens, SideLayout, side_parts
from turboquant.ops.attend import BiasTerms, attend_packed, bias_terms
from turboquant.ops.attend.kernel import Launch
from turboquant.ops.attend.kernel import attend_packed as launch_attend

# All caches that calls rotate among together: several times any L2.
ROTATED_BYTES = 400 << 20
SINKS, WINDOW = 4, 128


@dataclass(frozen=True)
class Shape:
    """One call of attention: rows of the batch, query heads, KV heads, head width, tokens, bits, key terms."""

    batch: int = 1
    heads: int = 40
    kv_heads: int = 8
    dim: int = 128
    tokens: int = 32768
    bits: int = 3
    has_terms: bool = True

    def __str__(self) -> str:
        terms = "key terms" if self.has_terms else "no key terms"
        return (
            f"batch {self.batch}, {self.heads}/{self.kv_heads} heads, d {self.dim}, {self.tokens} tokens, "
            f"{self.bits} bits, {terms}"
        )


class Caches:
    """As many caches of one shape as defeat the L2, and the queries. dtype: bfloat16."""

    def __init__(self, shape: Shape, device: str = "cuda"):
        self.shape, self.dtype = shape, torch.bfloat16
        draw = torch.Generator(device=device).manual_seed(1)
        layout = BlockLayout(
            shape.kv_heads,
            SideLayout(shape.bits, shape.dim, self.dtype, shape.has_terms),
            SideLayout(shape.bits, shape.dim, self.dtype, False),
        )
        blocks = (shape.tokens - SINKS - WINDOW) // BLOCK_TOKENS
        self.nbytes = shape.batch * blocks * layout.nbytes  # that a call must read
        count = max(2, -(-ROTATED_BYTES // max(self.nbytes, 1)))
        self.packed: list[PackedTokens] = []
        slots = SINKS + WINDOW + BLOCK_TOKENS
        for _ in range(count):
            records = torch.randint(
                0, 256, (shape.batch * blocks, layout.nbytes), dtype=torch.uint8, device=device, generator=draw
            )
            for index in (0, 1):
                parts = side_parts(records, layout, index)
                if parts.scales is not None:
                    parts.scales.fill_(1.0)
                if parts.mean is not None:
                    parts.mean.fill_(0.5)
            order = torch.randperm(len(records), device=device, generator=draw).view(shape.batch, blocks)
            tails = torch.randn(
                2, shape.batch, shape.kv_heads, slots, shape.dim, dtype=self.dtype, device=device, generator=draw
            )
            self.packed.append(
                PackedTokens(
                    layout,
                    records.view(-1),
                    order * layout.nbytes | layout.key.num_planes | layout.value.num_planes << 2,
                    torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=device),
                    torch.zeros(shape.batch, dtype=torch.int32, device=device),
                    tails[0],
                    tails[1],
                    SINKS,
                    WINDOW,
                )
            )
        self.q = torch.randn(shape.batch, shape.heads, 1, shape.dim, device=device, generator=draw).to(self.dtype)
        matrix = torch.linalg.qr(torch.randn(shape.dim, shape.dim, device=device, generator=draw))[0].contiguous()
        self.matrices = matrix, matrix
        self.bias: BiasTerms | None = None
        if shape.has_terms:
            bias = torch.randn(shape.kv_heads, shape.dim, device=device, generator=draw)
            self.bias = bias_terms(bias, 1e6 ** -torch.linspace(0, 1, shape.dim // 2), 1.0, False)
        self.most_blocks = blocks
        if records.is_cuda:
            torch.cuda.synchronize()

    def calls(self, launch: Launch | None = None) -> list[Callable[[], Any]]:
        """One call of attention for each cache."""
        options: dict[str, Any] = {"scale": self.shape.dim**-0.5, "most_blocks": self.most_blocks}

        def call(packed: PackedTokens) -> torch.Tensor:
            if launch is None:
                return attend_packed(self.q, packed, self.matrices, self.bias, **options)
            return launch_attend(
                self.q,
                packed,
                *self.matrices,
                self.bias,
                softcap=None,
                sink_logits=None,
                is_mixed=False,
                launch=launch,
                **options,
            )

        return [lambda packed=packed: call(packed) for packed in self.packed]


def gpu_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 15) -> float:
    """GPU time of one call: all of them in one graph, so that no launch waits for Python; the median of its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which fills what the calls read
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    few = -(-20 // len(calls))  # at least 20 calls in a graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(few):
            for call in calls:
                call()
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (few * len(calls)))
    return sorted(times[2:])[repeats // 2]
