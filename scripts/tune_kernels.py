#!/usr/bin/env python3
"""Find launch parameters of the attention kernel on the GPU at hand and write them into its table.

    scripts/tune_kernels.py               # measure, print the best of each class
    scripts/tune_kernels.py --write       # and put them into turboquant/ops/attend/kernel.py

A class is a number of query rows of one KV head and a head width. Every candidate is compiled first, by several
processes at once, then timed over short and long rows; the least geometric mean wins.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from packed_caches import Caches, Shape, gpu_seconds
from turboquant.ops.attend import kernel
from turboquant.ops.attend.fragments import ROWS as FRAGMENT_ROWS
from turboquant.ops.attend.kernel import Launch
from turboquant.ops.devices import capability

# (most query rows, widest head): a shape that stands for the class.
CLASSES: dict[tuple[int, int], Shape] = {
    (8, 128): Shape(heads=40, kv_heads=8, dim=128),
    (8, 256): Shape(heads=32, kv_heads=4, dim=256),
    (16, 128): Shape(heads=72, kv_heads=8, dim=128),
    (16, 256): Shape(heads=48, kv_heads=4, dim=256),
}
LENGTHS = (4096, 8192, 32768, 131072)


def candidates(rows: int) -> Iterator[Launch]:
    """Launches worth trying for up to 8 or up to 16 query rows."""
    if rows <= FRAGMENT_ROWS:
        for programs, registers in itertools.product((2, 3, 4, 5), (0, 128, 168)):
            yield Launch(16, True, 4, 2, programs, registers)
        return
    for swap, warps, stages in itertools.product((False, True), (2, 4, 8), (2, 3, 4)):
        # swapped tiles of 8 warps gave wrong answers with a key bias (Triton 3.6, H100)
        if not (swap and warps == 8):
            yield from (Launch(16, swap, warps, stages, programs) for programs in (2, 3, 4, 5, 6))


def compiled(job: tuple[Shape, Launch]) -> bool:
    """Compile, by calling once with few tokens; False where the launch does not fit the device."""
    shape, launch = job
    try:
        Caches(shape).calls(launch)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  any reason rules the candidate out
        print(f"{launch}: {str(error).splitlines()[0][:100]}", flush=True)
        return False
    return True


def is_right(found: torch.Tensor, wanted: torch.Tensor, launch: Launch) -> bool:
    """Whether a launch gives what the present one gives, up to bfloat16's rounding."""
    error = ((found - wanted).norm() / wanted.norm()).item()
    if error > 1e-2:
        print(f"{launch}: wrong, relative difference {error:.1e}", flush=True)
    return error <= 1e-2


def measured(shape: Shape, launches: list[Launch], bits: list[int]) -> dict[Launch, float]:
    """Geometric mean over lengths and bits of each launch's time over the best one's."""
    logs: dict[Launch, float] = dict.fromkeys(launches, 0.0)
    for tokens, width in itertools.product(LENGTHS, bits):
        caches = Caches(Shape(**(vars(shape) | {"tokens": tokens, "bits": width})))
        times = {launch: gpu_seconds(caches.calls(launch), repeats=5) for launch in launches}
        best = min(times, key=lambda launch: times[launch])
        print(f"  {tokens} tokens, {width} bits: {1e6 * times[best]:.1f} us, {best}", flush=True)
        for launch, seconds in times.items():
            logs[launch] += math.log(seconds / times[best])
    return {launch: math.exp(total / len(LENGTHS) / len(bits)) for launch, total in logs.items()}


def table_lines(best: dict[tuple[int, int], Launch]) -> str:
    """Entries of the table in kernel.py."""
    most = {rows: str(rows) if rows <= FRAGMENT_ROWS else "1 << 30" for rows, _ in best}
    return "".join(f"        ({most[rows]}, {width}, {launch}),\n" for (rows, width), launch in best.items())


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the best into the table")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--classes", type=int, default=len(CLASSES), help="only the first so many")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--keep", type=int, default=12, help="candidates that are timed at every length")
    parser.add_argument("--out", type=Path, help="write all times there, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels measures a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    best: dict[tuple[int, int], Launch] = {}
    report = []
    for (rows, width), shape in itertools.islice(CLASSES.items(), options.classes):
        launches = list(candidates(rows))
        jobs = [
            (Shape(**(vars(shape) | {"tokens": 1024, "bits": bits})), launch)
            for launch in launches
            for bits in options.bits
        ]
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            fits = dict.fromkeys(launches, True)
            for (_, launch), is_good in zip(jobs, pool.map(compiled, jobs), strict=True):
                fits[launch] &= is_good
        launches = [one for one in launches if fits[one]]
        print(f"up to {rows} rows, heads up to {width}: {len(launches)} launches", flush=True)
        caches = Caches(Shape(**(vars(shape) | {"tokens": 32768, "bits": options.bits[0]})))
        wanted = caches.calls()[0]().float()
        launches = [one for one in launches if is_right(caches.calls(one)[0]().float(), wanted, one)]
        first = {launch: gpu_seconds(caches.calls(launch), repeats=3) for launch in launches}
        del caches
        launches = sorted(launches, key=lambda launch: first[launch])[: options.keep]
        scores = measured(shape, launches, options.bits)
        best[rows, width] = min(scores, key=lambda launch: scores[launch])
        report.append({
            "rows": rows, "width": width,
            "first_us": [asdict(launch) | {"us": 1e6 * seconds} for launch, seconds in first.items()],
            "scores": [asdict(launch) | {"score": score} for launch, score in scores.items()],
        })  # fmt: skip
        print(f"  best: {best[rows, width]}, {scores[best[rows, width]]:.3f} of the best at each length", flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = table_lines(best)
    print(lines)
    if options.write:
        path = Path(kernel.__file__)
        text = path.read_text(encoding="utf-8")
        key = capability(device) if capability(device) in kernel._LAUNCHES else 0
        for entry in lines.splitlines():
            start = re.match(r"\s+\(([\d <]+), (\d+), ", entry)
            assert start is not None  # noqa: S101  made above
            old = rf"(\n    {key}: \[(?:\n.*?)*?)\n {{8}}\({start[1]}, {start[2]}, Launch\(.*?\)\),"
            text, found = re.subn(old, lambda match, entry=entry: match[1] + "\n" + entry, text, count=1)
            print(f"{'written' if found else 'no entry to replace'}: {entry.strip()}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
