#!/usr/bin/env python3
"""Decoding coded weights on the GPU beside a plain copy of the weights, in one run; exactness, sizes, encoding.

    scripts/bench_codec.py --out rows/codec.json      # matrices of a 14B layer, about a minute
    scripts/bench_codec.py --warps 1 2 4              # other launches

Matrices are rotated so that the L2 holds none of them; everything runs from CUDA graphs. A rate counts the bytes of
bfloat16 that come out; a decoded weight moves about 3.4 bytes of memory, a copied one 4.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench_stream import current_commit, versions
from packed_caches import ROTATED_BYTES, gpu_seconds
from streamer.ops.lossless import CodedTensor, encode
from streamer.ops.lossless import kernel as lossless_kernel

# Matrices of a layer of Qwen2.5-14B: queries and outputs; keys and values; the MLP's.
SHAPES = ((5120, 5120), (1024, 5120), (13824, 5120))

# Standard deviations of the logarithms of the rows' scales; measured checkpoints lie between 0.2 and 0.4.
SPREADS = (0.0, 0.4)

WEIGHTS_STD = 0.02


def random_weights(shape: tuple[int, int], spread: float, seed: int) -> torch.Tensor:
    """Normal numbers whose rows have scales of their own, bfloat16 on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    rows = torch.exp(spread * torch.randn(shape[0], 1, device="cuda", generator=generator))
    return (WEIGHTS_STD * rows * torch.randn(shape, device="cuda", generator=generator)).bfloat16()


def broken_weights(shape: tuple[int, int]) -> torch.Tensor:
    """Weights of which 5 % are any of the 65,536 patterns."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = random_weights(shape, 0.0, 1)
    other = torch.randint(-(2**15), 2**15, shape, device="cuda", generator=generator).to(torch.int16)
    is_other = torch.rand(shape, device="cuda", generator=generator) < 0.05
    return torch.where(is_other, other.view(torch.bfloat16), weights)


def decode(coded: CodedTensor, out: torch.Tensor, warps: int) -> None:
    """One decoding, by the kernel whatever the dispatch would choose."""
    lossless_kernel.decode(coded.stored, out.view(-1).view(torch.int16), warps=warps)


def is_exact(weights: torch.Tensor, coded: CodedTensor, warps: int) -> bool:
    """Whether every bit comes back, into memory that held none of them."""
    out = torch.full_like(weights, float("nan"))
    decode(coded, out, warps)
    return torch.equal(out.view(torch.int16), weights.view(torch.int16))


def copy_seconds(shape: tuple[int, int]) -> float:
    """Of a plain copy of as many bfloat16 weights, through the same sets of memory."""
    count = sets_of(shape)
    source = torch.empty(count, *shape, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return gpu_seconds([lambda i=i: target[i].copy_(source[i]) for i in range(count)])


def sets_of(shape: tuple[int, int]) -> int:
    """As many matrices as defeat the L2."""
    return max(2, -(-ROTATED_BYTES // (2 * shape[0] * shape[1])))


def rows_of(shape: tuple[int, int], spread: float, launches: list[int], copied_s: float) -> list[dict[str, Any]]:
    """A row for each launch."""
    weights = [random_weights(shape, spread, seed) for seed in range(sets_of(shape))]
    encode(weights[0])  # the first call loads kernels
    torch.cuda.synchronize()
    start = time.perf_counter()
    coded = [encode(matrix) for matrix in weights]
    torch.cuda.synchronize()
    encode_s = (time.perf_counter() - start) / len(coded)
    out = torch.empty_like(torch.stack(weights))
    nbytes = weights[0].nbytes
    rows = []
    for warps in launches:
        exact = all(is_exact(matrix, one, warps) for matrix, one in zip(weights, coded, strict=True))
        seconds = gpu_seconds([lambda i=i, warps=warps: decode(coded[i], out[i], warps) for i in range(len(coded))])
        moved = coded[0].nbytes + nbytes
        row = {
            "kind": "codec",
            "shape": list(shape),
            "row_spread": spread,
            "warps": warps,
            "is_exact": exact,
            "bits_per_weight": 8 * sum(one.nbytes for one in coded) / sum(matrix.numel() for matrix in weights),
            "seconds": seconds,
            "bytes_per_s": nbytes / seconds,
            "copy_seconds": copied_s,
            "share_of_dram": (moved / seconds) / (2 * nbytes / copied_s),
            "encode_bytes_per_s": nbytes / encode_s,
        }
        print(
            f"{shape[0]} x {shape[1]}, row spread {spread}, {warps} warps: {'exact' if exact else 'WRONG'}, "
            f"{row['bits_per_weight']:.2f} bits, {row['bytes_per_s'] / 1e12:.2f} TB/s of bfloat16, "
            f"{100 * row['share_of_dram']:.0f} % of the memory's rate; a copy {nbytes / copied_s / 1e12:.2f} TB/s; "
            f"encode {row['encode_bytes_per_s'] / 1e9:.1f} GB/s",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--warps", type=int, nargs="+", choices=(1, 2, 4), default=[1])
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_codec measures a GPU, and there is none here")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        copied_s = copy_seconds(shape)
        for spread in SPREADS:
            rows += rows_of(shape, spread, options.warps, copied_s)
    broken = broken_weights(SHAPES[0])
    coded = encode(broken)
    wrong = [warps for warps in options.warps if not is_exact(broken, coded, warps)]
    print(
        f"weights with 5 % of any pattern: {'WRONG' if wrong else 'exact'}, {100 * coded.nbytes / broken.nbytes:.1f} %"
    )
    measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")
    if wrong or not all(row["is_exact"] for row in rows):
        raise SystemExit("bench_codec: decoded weights differ from those that were coded")


if __name__ == "__main__":
    main()
