#!/usr/bin/env python3
"""Decode and prefill speed of a streamed model beside accelerate and resident transformers, on the GPU, in one run.

scripts/bench_stream.py FOLDER --vram 8GiB --out rows.json                    all runners, one process each
scripts/bench_stream.py FOLDER --runner streamed --vram 8GiB --bits 3         one of them

Each runner is a process of its own under a hard cap of its memory (torch's allocator gets the budget less the CUDA
context), and device memory is watched through the driver's own counter. --out keeps the rows as JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RUNNERS = ("streamed", "cpu_offload", "auto", "resident")


def used_bytes() -> int:
    """Device memory in use, of all processes, as the driver counts it."""
    import torch

    return torch.cuda.device_memory_used(0)


class PeakWatcher:
    """Highest device memory use beyond what was there at the start, seen from outside the allocator."""

    def __init__(self) -> None:
        self._base, self.peak_bytes = used_bytes(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, used_bytes() - self._base)

    def stop(self) -> int:
        """The peak."""
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, used_bytes() - self._base)
        return self.peak_bytes


def link_bytes_per_s() -> float:
    """Median rate of eight page-locked copies of 256 MiB to the device."""
    import torch

    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for _ in range(9):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        device.copy_(host, non_blocking=True)
        stop.record()
        stop.synchronize()
        rates.append(host.nbytes / start.elapsed_time(stop) * 1e3)
    return statistics.median(rates[1:])


def prompt_ids(length: int) -> Any:
    """Random token ids [1, length]."""
    import torch

    return torch.randint(0, 150000, (1, length), generator=torch.Generator().manual_seed(1))


def timed_generate(model: Any, ids: Any, new_tokens: int) -> dict[str, float]:
    """Seconds to the first token (median of three), and the times between later ones: median and percentiles."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times = list[float]()

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing to end."""

    def run(count: int) -> tuple[float, list[float]]:
        clock = Clock()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, streamer=clock)
        torch.cuda.synchronize()
        tokens = clock.times[1:]  # the first put is the prompt
        return tokens[0] - start, [b - a for a, b in itertools.pairwise(tokens)]

    with torch.inference_mode():
        run(2)
        first = statistics.median(run(1)[0] for _ in range(3))
        _, steps = run(1 + new_tokens)
    steps.sort()
    return {
        "first_token_s": first,
        "tokens_per_s": 1 / statistics.median(steps),
        "tokens_per_s_p20": 1 / steps[int(0.8 * len(steps))],
        "tokens_per_s_p80": 1 / steps[int(0.2 * len(steps))],
        "new_tokens": new_tokens,
    }


def logits_of(model: Any, ids: Any, new_ids: Any) -> Any:
    """Logits at the end of the prompt and after each token of new_ids, fed one at a time: [1 + N, V] float32."""
    import torch

    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        rows, cache = [out.logits[0, -1].float().cpu()], out.past_key_values
        for i in range(new_ids.shape[1]):
            out = model(input_ids=new_ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].float().cpu())
    return torch.stack(rows)


def run_streamed(args: argparse.Namespace, watcher: PeakWatcher) -> dict[str, Any]:
    import torch

    from streamer import StreamingEngine
    from streamer.engine import measured_context_bytes

    start = time.perf_counter()
    engine = StreamingEngine(
        args.folder,
        bits=args.bits,
        vram=args.vram,
        resident=args.resident,
        context=args.prompt + args.new + 16,
        device="cuda",
    )
    model = engine.model
    ids = prompt_ids(args.prompt).cuda()
    first_run = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    cold_s = time.perf_counter() - first_run
    setup_s = first_run - start
    times = timed_generate(model, ids, args.new)
    plan = engine.plan
    weights = engine._runtime.weights
    moved = weights.bytes_moved
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    prompt_bytes = weights.bytes_moved - moved
    row = {
        "setup_s": setup_s,
        "cold_first_token_s": cold_s,
        **times,
        "streamed_bytes": plan.streamed_bytes,
        "prompt_bytes": prompt_bytes,
        "layers_resident": plan.layers_resident,
        "prefill_chunk": plan.prefill_chunk,
        "predicted_peak_bytes": plan.device_bytes,
        "terms": {term.name: term.nbytes for term in plan.terms},
        "allocator_peak_bytes": torch.cuda.max_memory_reserved(),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "context_bytes": measured_context_bytes(torch.device("cuda")),
    }
    if args.logits and Path(args.logits).is_file():
        saved = torch.load(args.logits)
        mine = logits_of(model, ids, saved["new_ids"].cuda())
        theirs = saved["logits"]
        row["logits_max_difference"] = (mine - theirs).abs().max().item()
        row["logits_relative_error"] = ((mine - theirs).norm() / theirs.norm()).item()
        row["logits_std"] = theirs.std().item()
        row["same_top1"] = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    row["process_peak_bytes"] = watcher.stop()
    del model
    engine.close()
    torch.cuda.set_per_process_memory_fraction(1.0)
    row["link_bytes_per_s"] = link_bytes_per_s() if args.measure_link else None
    return row


def run_transformers(args: argparse.Namespace, watcher: PeakWatcher) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from streamer.options import parse_size
    from streamer.plan import CONTEXT_BYTES

    if args.vram and args.runner != "resident":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((parse_size(args.vram) - CONTEXT_BYTES) / total)
    start = time.perf_counter()
    if args.runner == "resident":
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16, device_map={"": 0})
    elif args.runner == "auto":
        memory = {0: int(0.8 * parse_size(args.vram)), "cpu": 110 * 10**9}
        model = AutoModelForCausalLM.from_pretrained(
            args.folder, dtype=torch.bfloat16, device_map="auto", max_memory=memory
        )
    else:
        from accelerate import cpu_offload

        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
        cpu_offload(model, execution_device=0)
    model.eval()
    setup_s = time.perf_counter() - start
    ids = prompt_ids(args.prompt).cuda()
    times = timed_generate(model, ids, args.new if args.runner == "resident" else min(args.new, 8))
    row = {
        "setup_s": setup_s,
        **times,
        "allocator_peak_bytes": torch.cuda.max_memory_reserved(),
    }
    if args.runner == "resident" and args.logits:
        new_ids = prompt_ids(8)
        logits = logits_of(model, ids, new_ids.cuda())
        torch.save({"logits": logits, "new_ids": new_ids}, args.logits)
        # the same weights with another attention kernel: what bf16 itself leaves undecided
        model.set_attn_implementation("eager")
        other = logits_of(model, ids, new_ids.cuda())
        row["own_relative_error"] = ((other - logits).norm() / logits.norm()).item()
    return row


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    import accelerate
    import torch
    import transformers
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": driver.stdout.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "triton": triton.__version__,
    }


def run_one(args: argparse.Namespace) -> None:
    """One runner, in this process; its row is the last line of stdout."""
    watcher = PeakWatcher()
    row = (run_streamed if args.runner == "streamed" else run_transformers)(args, watcher)
    row.setdefault("process_peak_bytes", watcher.stop())
    row |= {
        "runner": args.runner,
        "model": Path(args.folder).name,
        "prompt": args.prompt,
        "bits": args.bits,
        "vram": args.vram,
    }
    row["versions"] = versions()
    print("ROW " + json.dumps(row))


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every runner in a process of its own; resident first, for its logits are what the streamed ones are held to."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runner in ("resident", "streamed", "cpu_offload", "auto"):
            if runner not in args.runners.split(","):
                continue
            command = [sys.executable, __file__, args.folder, "--runner", runner, "--vram", args.vram]
            command += ["--prompt", str(args.prompt), "--new", str(args.new), "--bits", str(args.bits)]
            if args.resident is not None:
                command += ["--resident", str(args.resident)]
            command += ["--logits", str(Path(folder) / "logits.pt"), "--measure-link"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if done.returncode or not lines:
                print(f"{runner} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
                continue
            rows.append(json.loads(lines[-1][4:]))
            print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    """The figures of a row that people compare."""
    gb = 1e9
    line = (
        f"{row['runner']:12} first {row['first_token_s']:.2f} s, {row['tokens_per_s']:.2f} tok/s, "
        f"process peak {row['process_peak_bytes'] / gb:.2f} GB"
    )
    if "own_relative_error" in row:
        line += f"; its own logits with eager attention differ by {row['own_relative_error']:.4f} relative"
    if row["runner"] == "streamed":
        limit = row["link_bytes_per_s"] / max(row["streamed_bytes"], 1)
        line += (
            f" (predicted {row['predicted_peak_bytes'] / gb:.2f}), context {row['context_bytes'] / gb:.2f}, "
            f"{row['layers_resident']} layers resident, {row['streamed_bytes'] / gb:.2f} GB a pass at "
            f"{row['link_bytes_per_s'] / gb:.1f} GB/s: {100 * row['tokens_per_s'] / limit:.1f} % of the link, "
            f"prompt moved {row['prompt_bytes'] / gb:.2f} GB, cold first token {row['cold_first_token_s']:.1f} s"
        )
        if "logits_relative_error" in row:
            line += f"; logits off by {row['logits_relative_error']:.4f} relative, top-1 same {row['same_top1']:.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--runner", choices=RUNNERS)
    parser.add_argument("--runners", default=",".join(RUNNERS))
    parser.add_argument("--vram", default="8GiB")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--resident", type=int)
    parser.add_argument("--logits", default="")
    parser.add_argument("--measure-link", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.runner:
        run_one(args)
        return
    rows = run_all(args)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
