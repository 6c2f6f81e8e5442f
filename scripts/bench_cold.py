#!/usr/bin/env python3
"""Cold starts from packed weights beside those from the checkpoint: nothing in the page cache, in turn.

    scripts/bench_cold.py FOLDER                          # three starts of each, the whole model in 24 GiB
    scripts/bench_cold.py FOLDER --vram 12GiB --repeats 5

FOLDER has been packed (`tq-stream pack FOLDER`). A start is timed from the engine's first step to the first token of a
short prompt; Python and torch are loaded before.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench_stream import current_commit, evict, prompt_ids, read_files, versions
from streamer import StreamingEngine
from streamer.benchmark import timed_generate

CODECS = ("raw", "lossless")


def start_s(folder: Path, codec: str, vram: str, prompt: int) -> float:
    """Seconds to the first token, with no byte of the files in the page cache."""
    ids = prompt_ids(prompt).cuda()
    gc.collect()
    torch.cuda.empty_cache()
    with read_files(folder, codec) as files:
        evict({folder, files.folder})
    start = time.perf_counter()
    with StreamingEngine(folder, vram=vram, context=prompt + 16, codec=codec, device="cuda") as engine:
        timed_generate(engine.model, ids, 1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_cold measures a GPU, and there is none here")
    read_bytes = {}
    for codec in CODECS:
        with read_files(options.folder, codec) as files:
            read_bytes[codec] = files.total_bytes
    found: dict[str, list[float]] = {codec: [] for codec in CODECS}
    for _ in range(options.repeats):
        for codec in CODECS:
            found[codec].append(start_s(options.folder, codec, options.vram, options.prompt))
            print(f"{codec}: {found[codec][-1]:.1f} s for {read_bytes[codec] / 1e9:.1f} GB of files", flush=True)
    rows: list[dict[str, Any]] = []
    measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
    for codec, seconds in found.items():
        row = {
            "kind": "codec",
            "what": f"cold start {options.folder.name} in {options.vram}, --codec {codec}",
            "setting": f"median of {options.repeats} in turn",
            "note": f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f}) for "
            f"{read_bytes[codec] / 1e9:.1f} GB of files",
            "all_seconds": seconds,
            "bytes_per_s": read_bytes["raw"] / statistics.median(seconds),
        }
        if codec != "raw":
            row["share"] = statistics.median(found["raw"]) / statistics.median(seconds)
            row["share_of"] = "the speed of raw weights"
        rows.append(row | measured_on)
    print(f"lossless {100 * rows[-1]['share']:.0f} % of the speed of raw weights")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
