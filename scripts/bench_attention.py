#!/usr/bin/env python3
"""Attention over packed codes beside SDPA on bfloat16, encode and unpack beside copies; GPU times, in one run.

    scripts/bench_attention.py --out rows/attention.json          # the shapes of docs/benchmarks.md, about 3 minutes
    scripts/bench_attention.py --lengths 4096 32768 --bits 3      # some of them

Caches are rotated so that the L2 holds none of them; everything runs from CUDA graphs. Rotations of queries and
results, block tables, sinks, window, key terms and the merging of parts are included on our side.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench_stream import current_commit, versions
from packed_caches import ROTATED_BYTES, Caches, Shape, gpu_seconds
from turboquant.layout import BLOCK_TOKENS, BlockLayout, SideLayout
from turboquant.ops.encode import encode_records
from turboquant.ops.unpack import unpack_records

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense_seconds(shape: Shape) -> dict[str, float]:
    """GPU time of SDPA on a bfloat16 cache of the same tokens; heads of a group are rows of one query."""
    nbytes = 4 * shape.batch * shape.kv_heads * shape.tokens * shape.dim
    sets = [
        torch.randn(2, shape.batch, shape.kv_heads, shape.tokens, shape.dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(max(2, -(-ROTATED_BYTES // nbytes)))
    ]
    q = torch.randn(
        shape.batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim, dtype=torch.bfloat16, device="cuda"
    )
    seconds = {}
    for name, backend in BACKENDS.items():

        def call(both: torch.Tensor, backend: Any = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, both[0], both[1])

        try:
            seconds[name] = gpu_seconds([lambda both=both: call(both) for both in sets])
        except RuntimeError as error:  # a backend that does not serve this shape or device
            print(f"{name}: {str(error).splitlines()[0]}")
    return seconds


def attention_row(shape: Shape, dense: dict[str, float], copy_bytes_per_s: float) -> dict[str, Any]:
    """One row: ours beside the dense ones."""
    caches = Caches(shape)
    seconds = gpu_seconds(caches.calls())
    row = {
        "kind": "attention",
        "shape": vars(shape) | {},
        "seconds": seconds,
        "dense_seconds": dense,
        "ratios": {name: other / seconds for name, other in dense.items()},
        "read_bytes": caches.nbytes,
        "share_of_dram": caches.nbytes / seconds / copy_bytes_per_s,
    }
    others = ", ".join(f"{name} {1e6 * other:.1f} us = {other / seconds:.2f} x" for name, other in dense.items())
    print(f"{shape}: {1e6 * seconds:.1f} us, {100 * row['share_of_dram']:.0f} % of DRAM; {others}", flush=True)
    return row


def copy_rate() -> float:
    """Bytes per second that a plain copy of 1 GiB reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds([lambda: target.copy_(source)])


def write_rate() -> float:
    """Bytes per second that filling 1 GiB writes."""
    target = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    return target.nbytes / gpu_seconds([lambda: target.fill_(1.0)])


def code_rows(bits: int, dim: int, heads: int, tokens: int) -> list[dict[str, Any]]:
    """Encode beside a copy of the bytes that it reads and writes, unpack beside a fill of what it writes."""
    dtype = torch.bfloat16
    layout = BlockLayout(heads, SideLayout(bits, dim, dtype, True), SideLayout(bits, dim, dtype, False))
    blocks = tokens // BLOCK_TOKENS
    records = torch.zeros(blocks, layout.nbytes, dtype=torch.uint8, device="cuda")
    table = torch.randperm(blocks, device="cuda")[None] * layout.nbytes | 5
    sources = [torch.randn(1, heads, tokens, dim, dtype=dtype, device="cuda") for _ in range(4)]
    copy_bytes_per_s, write_bytes_per_s = copy_rate(), write_rate()
    rows = []
    for index, side in enumerate((layout.key, layout.value)):

        def encode(source: torch.Tensor, index: int = index) -> None:
            encode_records(source, layout, index, records, table, first_block=0, blocks=blocks)

        def unpack(target: torch.Tensor, index: int = index) -> None:
            unpack_records(layout, index, records, table[0], target[0])

        moved = sources[0].nbytes + blocks * heads * side.nbytes
        jobs: list[tuple[str, Callable[[torch.Tensor], None], float]] = [
            ("encode", encode, moved / copy_bytes_per_s),
            ("unpack", unpack, sources[0].nbytes / write_bytes_per_s),
        ]
        for name, job, least in jobs:
            seconds = gpu_seconds([lambda source=source, job=job: job(source) for source in sources])
            kind = "keys" if index == 0 else "values"
            print(
                f"{name} {kind}, {bits} bits, d {dim}: {1e6 * seconds:.0f} us for {tokens} tokens of {heads} heads, "
                f"{100 * least / seconds:.0f} % of the speed of a plain {'copy' if name == 'encode' else 'fill'}",
                flush=True,
            )
            rows.append({
                "kind": name, "side": kind, "bits": bits, "dim": dim, "heads": heads, "tokens": tokens,
                "seconds": seconds, "share": least / seconds,
            })  # fmt: skip
    return rows


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--main", action="store_true", help="only 40/8 heads of 128, batch 1")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_attention measures a GPU, and there is none here")
    rows: list[dict[str, Any]] = []
    rate = copy_rate()
    print(f"plain copy: {rate / 1e12:.2f} TB/s read and written")
    for tokens in options.lengths:
        dense = dense_seconds(Shape(tokens=tokens))
        for bits in options.bits:
            for has_terms in (True, False):
                rows.append(attention_row(Shape(tokens=tokens, bits=bits, has_terms=has_terms), dense, rate))
    if not options.main:
        others = [
            Shape(batch=8, tokens=8192),
            Shape(batch=8, tokens=32768),
            Shape(heads=28, kv_heads=4, tokens=8192),
            Shape(heads=28, kv_heads=4, tokens=32768),
            Shape(dim=64, tokens=8192),
            Shape(dim=64, tokens=32768),
            Shape(dim=256, heads=16, kv_heads=4, tokens=8192),
            Shape(dim=256, heads=16, kv_heads=4, tokens=32768),
        ]
        for shape in others:
            rows.append(attention_row(shape, dense_seconds(shape), rate))
        for bits in options.bits:
            rows += code_rows(bits, 128, 8, 32768)
    measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
