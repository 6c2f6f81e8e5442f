#!/usr/bin/env python3
"""The lossless codec: decoding on the GPU beside a plain copy of the weights, encoding, packing; exactness and sizes.

    scripts/bench_codec.py --out rows/codec.json      # matrices and units of a 14B layer, about a minute
    scripts/bench_codec.py --warps 1 2 4              # other launches
    scripts/bench_codec.py --pack MODEL --cache NEW   # besides: pack to a folder that is not there yet, and unpack

What is decoded is rotated so that the L2 holds none of it; everything runs from CUDA graphs. A rate counts the bytes of
bfloat16 that come out, or go in; a decoded weight moves about 3.4 bytes of memory, a copied one 4.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench_stream import current_commit, versions
from packed_caches import ROTATED_BYTES, gpu_seconds
from streamer.ops.lossless import CodedTensor, encode
from streamer.ops.lossless import kernel as lossless_kernel
from streamer.ops.lossless.together import CodedPart, PartsDecoder
from streamer.packed import SLICE_BYTES, SliceCoder, open_file, write_bytes
from streamer.packing import PackedFolder, pack, unpack
from streamer.rates import usable_cores

# Matrices of a layer of Qwen2.5-14B: queries and outputs; keys and values; the MLP's.
SHAPES = ((5120, 5120), (1024, 5120), (13824, 5120))

# Its units: tensors that cross the link together, biases among them.
UNITS = {
    "attention unit": ((5120, 5120), (1024, 5120), (1024, 5120), (5120, 5120), (5120,), (1024,), (1024,)),
    "MLP unit": ((13824, 5120), (13824, 5120), (5120, 13824)),
}

# Standard deviations of the logarithms of the rows' scales; measured checkpoints lie between 0.2 and 0.4.
SPREADS = (0.0, 0.4)

WEIGHTS_STD = 0.02

# Host time of a launch: of as many calls as no queue is full of.
CALLS = 100

# Written to learn what the disk takes; and, of the files that were packed, unpacked again.
PROBE_BYTES = 4 << 30
UNPACKED_BYTES = 8 << 30


def random_weights(shape: tuple[int, ...], spread: float, seed: int) -> torch.Tensor:
    """Normal numbers whose rows have scales of their own, bfloat16 on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    rows = torch.exp(spread * torch.randn(shape[0], *(1,) * (len(shape) - 1), device="cuda", generator=generator))
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


def copy_seconds(nbytes: int) -> float:
    """Of a plain copy of as many bytes, through the same sets of memory."""
    count = sets_of(nbytes)
    source = torch.empty(count, nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return gpu_seconds([lambda i=i: target[i].copy_(source[i]) for i in range(count)])


def sets_of(nbytes: int) -> int:
    """As many matrices, or units, of that many bytes as defeat the L2."""
    return max(2, -(-ROTATED_BYTES // nbytes))


def decoded_row(
    what: str, setting: str, *, nbytes: int, stored_bytes: int, seconds: float, copied_s: float, is_exact: bool
) -> dict[str, Any]:
    """A row of decoding."""
    return {
        "kind": "codec",
        "what": what,
        "setting": setting,
        "is_exact": is_exact,
        "bits_per_weight": 16 * stored_bytes / nbytes,
        "seconds": seconds,
        "bytes_per_s": nbytes / seconds,
        "copy_seconds": copied_s,
        "share": ((stored_bytes + nbytes) / seconds) / (2 * nbytes / copied_s),
        "share_of": "the rate of a plain copy",
    }


def matrix_rows(shape: tuple[int, int], spread: float, launches: list[int], copied_s: float) -> list[dict[str, Any]]:
    """A row for each launch."""
    nbytes = 2 * shape[0] * shape[1]
    weights = [random_weights(shape, spread, seed) for seed in range(sets_of(nbytes))]
    coded = [encode(matrix) for matrix in weights]
    out = torch.empty_like(torch.stack(weights))
    rows = []
    for warps in launches:
        seconds = gpu_seconds([lambda i=i, warps=warps: decode(coded[i], out[i], warps) for i in range(len(coded))])
        rows.append(
            decoded_row(
                f"decode {shape[0]} x {shape[1]}",
                f"row spread {spread}, warps {warps}",
                nbytes=nbytes,
                stored_bytes=sum(one.nbytes for one in coded) // len(coded),
                seconds=seconds,
                copied_s=copied_s,
                is_exact=all(is_exact(matrix, one, warps) for matrix, one in zip(weights, coded, strict=True)),
            )
        )
    return rows


class Unit:
    """A unit's tensors as bytes; the same coded, in slices as a packed file has them; and what decodes them."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], spread: float, seed: int):
        stored, weights, parts = [], [], []
        stored_at = at = 0
        for number, shape in enumerate(shapes):
            content = random_weights(shape, spread, 100 * seed + number).view(-1)
            for piece in content.split(SLICE_BYTES // 2):
                coded = encode(piece)
                parts.append(CodedPart(stored_at, coded.nbytes, at, piece.nbytes))
                stored.append(padded(coded.stored))
                weights.append(padded(piece.view(torch.uint8)))
                stored_at += stored[-1].nbytes
                at += weights[-1].nbytes
        self.parts, self.stored, self.weights = parts, torch.cat(stored), torch.cat(weights)
        self.out = torch.zeros_like(self.weights)
        self.decoder = PartsDecoder(parts, self.out.device)

    def decode(self) -> None:
        """One launch."""
        self.decoder.decode(self.stored, self.out)


def padded(content: torch.Tensor) -> torch.Tensor:
    """Bytes, and zeros up to a multiple of 16."""
    return torch.nn.functional.pad(content, (0, -content.nbytes % 16))


def unit_row(name: str, spread: float, copied_s: float) -> dict[str, Any]:
    """A row of decoding a whole unit by one launch, with the host time of a call."""
    units = [Unit(UNITS[name], spread, seed) for seed in range(sets_of(unit_bytes(name)))]
    for unit in units:
        unit.decode()
    is_exact = all(torch.equal(unit.out, unit.weights) for unit in units)
    seconds = gpu_seconds([unit.decode for unit in units])
    host_s = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            units[0].decode()
        host_s.append((time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
    row = decoded_row(
        f"decode an {name}",
        f"row spread {spread}",
        nbytes=unit_bytes(name),
        stored_bytes=sum(part.stored_bytes for part in units[0].parts),
        seconds=seconds,
        copied_s=copied_s,
        is_exact=is_exact,
    )
    return row | {"parts": len(units[0].parts), "python_s": sorted(host_s)[2]}


def unit_bytes(name: str) -> int:
    """Of a unit's weights."""
    return 2 * sum(torch.Size(shape).numel() for shape in UNITS[name])


def encode_rows() -> list[dict[str, Any]]:
    """Slices of a packed file, coded from host memory to host memory: by the GPU, and by threads of the CPU."""
    content = random_weights((SLICE_BYTES // 2,), 0.0, 1).cpu().view(torch.uint8)
    rows = []
    for device, threads in (("cuda", 1), ("cuda", usable_cores()), ("cpu", 1), ("cpu", usable_cores())):
        coder = SliceCoder(torch.device(device))
        room = coder.room(SLICE_BYTES).copy_(content).view(torch.bfloat16)
        count = 2 * threads if device == "cpu" else 64
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            list(pool.map(lambda _, coder=coder, room=room: coder.encode(room), range(threads)))  # the first calls
            start = time.perf_counter()
            list(pool.map(lambda _, coder=coder, room=room: coder.encode(room).nbytes, range(count)))
            seconds = time.perf_counter() - start
        rows.append({
            "kind": "codec",
            "what": f"encode on the {'GPU' if device == 'cuda' else 'CPU'}",
            "setting": f"slices of 32 MiB in host memory, threads {threads}",
            "seconds": seconds / count,
            "bytes_per_s": count * SLICE_BYTES / seconds,
        })
    return rows


def pack_rows(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Packing a checkpoint on the GPU, and unpacking the first of its files, beside what the disk takes.

    The packed folder stays in the cache; what is unpacked is deleted.
    """
    cache.mkdir(parents=True)
    disk = write_rate(cache / "probe")
    threads = usable_cores()
    start = time.perf_counter()
    packed = pack(folder, cache, threads=threads, device=torch.device("cuda"))
    seconds = time.perf_counter() - start
    common = {"kind": "codec", "setting": f"threads {threads}", "disk_bytes_per_s": disk}
    written = packed.nbytes / packed.source_bytes
    made = common | {
        "what": f"pack {folder.name}",
        "seconds": seconds,
        "bits_per_weight": 16 * written,
        "bytes_per_s": packed.source_bytes / seconds,
        "share": packed.nbytes / seconds / disk,
        "share_of": "the disk's write rate",
    }
    some = first_files(packed)
    target = cache / "unpacked"
    start = time.perf_counter()
    unpack(some, target, threads=threads)
    seconds = time.perf_counter() - start
    exact = [digest(target / file.source.name) == digest(folder / file.source.name) for file in some.files]
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    back = common | {
        "what": f"unpack {folder.name}",
        "seconds": seconds,
        "is_exact": all(exact),
        "bytes_per_s": some.source_bytes / seconds,
        "share": some.source_bytes / seconds / disk,
        "share_of": "the disk's write rate",
    }
    return [made, back]


def first_files(packed: PackedFolder) -> PackedFolder:
    """As many of its files as UNPACKED_BYTES hold, one at least: disks have room for the packed ones and these."""
    held, files = 0, []
    for file in packed.files:
        held += file.source.nbytes
        if files and held > UNPACKED_BYTES:
            break
        files.append(file)
    return replace(packed, files=tuple(files))


def write_rate(path: Path) -> float:
    """Bytes per second that a file takes until they are on the disk; written as records are."""
    block = os.urandom(SLICE_BYTES)
    start = time.perf_counter()
    with open_file(path, os.O_RDWR | os.O_CREAT) as file:
        for offset in range(0, PROBE_BYTES, SLICE_BYTES):
            write_bytes(file, path, block, offset)
        os.fsync(file)
    seconds = time.perf_counter() - start
    path.unlink()
    return PROBE_BYTES / seconds


def digest(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(row: dict[str, Any]) -> str:
    """A row as a line."""
    parts = [f"{row['what']}, {row['setting']}: {row['bytes_per_s'] / 1e9:.2f} GB/s of bfloat16"]
    if "share" in row:
        parts.append(f"{100 * row['share']:.0f} % of {row['share_of']}")
    if "bits_per_weight" in row:
        parts.append(f"{row['bits_per_weight']:.2f} bits")
    if "python_s" in row:
        parts.append(f"{row['parts']} parts, {1e6 * row['python_s']:.1f} µs of Python a call")
    if "disk_bytes_per_s" in row:
        parts.append(f"the disk takes {row['disk_bytes_per_s'] / 1e9:.2f} GB/s")
    if not row.get("is_exact", True):
        parts.append("WRONG")
    return ", ".join(parts)


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--warps", type=int, nargs="+", choices=(1, 2, 4), default=[1])
    parser.add_argument("--pack", type=Path, metavar="MODEL", help="a checkpoint folder to pack as well")
    parser.add_argument("--cache", type=Path, help="where to, and where it stays: a folder that is not there yet")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_codec measures a GPU, and there is none here")
    if options.pack and (options.cache is None or options.cache.exists()):
        raise SystemExit("bench_codec: --pack needs --cache, a folder that is not there yet")
    rows: list[dict[str, Any]] = []

    def measured(measure: Callable[[], list[dict[str, Any]]]) -> None:
        for row in measure():
            print(shown(row), flush=True)
            rows.append(row)

    for shape in SHAPES:
        copied_s = copy_seconds(2 * shape[0] * shape[1])
        for spread in SPREADS:
            measured(partial(matrix_rows, shape, spread, options.warps, copied_s))
    for name in UNITS:
        copied_s = copy_seconds(unit_bytes(name))
        for spread in SPREADS:
            measured(lambda name=name, spread=spread, copied_s=copied_s: [unit_row(name, spread, copied_s)])
    measured(encode_rows)
    if options.pack:
        torch.cuda.empty_cache()
        measured(partial(pack_rows, options.pack, options.cache))
    broken = broken_weights(SHAPES[0])
    coded = encode(broken)
    wrong = [warps for warps in options.warps if not is_exact(broken, coded, warps)]
    print(
        f"weights with 5 % of any pattern: {'WRONG' if wrong else 'exact'}, {100 * coded.nbytes / broken.nbytes:.1f} %"
    )
    measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")
    if wrong or not all(row.get("is_exact", True) for row in rows):
        raise SystemExit("bench_codec: decoded weights differ from those that were coded")


if __name__ == "__main__":
    main()
