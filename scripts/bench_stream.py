#!/usr/bin/env python3
"""Decode and prefill speed of a streamed model beside accelerate and resident transformers, on the GPU, in one run.

scripts/bench_stream.py FOLDER --vram 8GiB --out rows.json                    all runners, one process each
scripts/bench_stream.py FOLDER --runners streamed --vram 8GiB --bits 3        one of them
scripts/bench_stream.py FOLDER --runners resident --prompt 512,8192           one process, a row for each prompt
scripts/bench_stream.py FOLDER --runners streamed --beside rows.json          ratios to rows measured before

Each runner is a process of its own under a hard cap of its memory (torch's allocator gets the budget less the CUDA
context), and device memory is watched through the driver's own counter. Baselines that move weights make 8 tokens, the
others --new. --out keeps the rows, ratios included, as JSON for scripts/write_benchmarks.py.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RUNNERS = ("resident", "streamed", "cpu_offload", "auto")  # resident first: the others' logits are held to its own

_BASELINE_TOKENS = 8  # of baselines that take up to 5 s a token
_LOGITS_TOKENS = 8

# Resident logits are compared with those of eager attention up to this prompt: its scores take T x T memory.
_EAGER_TOKENS = 2048

# What a reader's rate alone is measured over: more than a disk's own cache.
_READER_BYTES = 8 << 30


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


def prompt_ids(length: int) -> Any:
    """Random token ids [1, length], on the CPU."""
    from streamer.benchmark import random_ids

    return random_ids(150000, length)


def first_token_s(model: Any, ids: Any) -> float:
    """Median of three times to the first token."""
    from streamer.benchmark import timed_generate

    return statistics.median(timed_generate(model, ids, 1).first_token_s for _ in range(3))


def decode_row(timing: Any) -> dict[str, Any]:
    """Tokens per second of a Timing: median and percentiles."""
    return {
        "tokens_per_s": timing.tokens_per_s,
        "tokens_per_s_p20": timing.tokens_per_s_p20,
        "tokens_per_s_p80": timing.tokens_per_s_p80,
        "new_tokens": len(timing.step_s),
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


def digest_of_logits(model: Any, ids: Any) -> str:
    """SHA-256 of the logits at the end of the prompt and after some greedy tokens; in the memory that is planned."""
    import torch

    with torch.inference_mode():
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_LOGITS_TOKENS,
            min_new_tokens=_LOGITS_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return hashlib.sha256(torch.stack(made.logits).float().cpu().numpy().data).hexdigest()


def run_streamed(args: argparse.Namespace, watcher: PeakWatcher) -> Iterator[dict[str, Any]]:
    """One row: the first of --prompt."""
    import torch

    from streamer import StreamingEngine
    from streamer.benchmark import settle, timed_generate
    from streamer.engine import measured_context_bytes
    from streamer.forecast import Machine, predict
    from streamer.rates import disk_bytes_read, link_rate

    prompt = args.prompt[0]
    read_once_s = None
    if args.evict:
        read_once_s = read_evicted(Path(args.folder), args.codec)
    start = time.perf_counter()
    engine = StreamingEngine(
        args.folder,
        bits=args.bits,
        vram=args.vram,
        ram=args.ram,
        resident=args.resident,
        context=args.context or prompt + args.new + 16,
        direct_io=args.direct_io,
        codec=args.codec,
        device="cuda",
    )
    model, plan = engine.model, engine.plan
    weights, files = engine._runtime.weights, engine._runtime.files
    setup_s = time.perf_counter() - start
    ids = prompt_ids(prompt).cuda()
    cold_s = timed_generate(model, ids, 1).first_token_s
    settling = time.perf_counter()
    settle(model, ids, weights)
    settling_s = time.perf_counter() - settling
    moved = weights.bytes_moved
    first_s = first_token_s(model, ids)
    prompt_bytes = (weights.bytes_moved - moved) / 3
    blocked_s, from_disk = weights.blocked_s, disk_bytes_read()
    timing = timed_generate(model, ids, 1 + args.new)
    passes = 1 + args.new  # the prompt is one
    row = {
        "setup_s": setup_s,
        "cold_first_token_s": cold_s,
        "read_once_s": read_once_s,
        "settling_s": settling_s,
        "first_token_s": first_s,
        **decode_row(timing),
        "streamed_bytes": plan.streamed_bytes,
        "staged_bytes": plan.staged_bytes,
        "prompt_bytes": prompt_bytes,
        "blocked_s": weights.blocked_s - blocked_s,
        "disk_bytes_per_pass": (disk_bytes_read() - from_disk) / passes if from_disk is not None else None,
        "host": plan.host,
        "uses_direct_io": plan.direct_io,
        "coded_share": plan.coded_share if plan.is_coded else None,
        "layers_resident": plan.layers_resident,
        "prefill_chunk": plan.prefill_chunk,
        "predicted_peak_bytes": plan.device_bytes,
        "predicted_host_bytes": plan.bytes_at("host"),
        "terms": {term.name: term.nbytes for term in plan.terms},
        "allocator_peak_bytes": torch.cuda.max_memory_reserved(),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"],
        "context_bytes": measured_context_bytes(torch.device("cuda")),
        "engine_link_bytes_per_s": engine.link_bytes_per_s,
    }
    if args.logits and logits_path(args, prompt).is_file():
        saved = torch.load(logits_path(args, prompt))
        mine = logits_of(model, ids, saved["new_ids"].cuda())
        theirs = saved["logits"]
        row["logits_max_difference"] = (mine - theirs).abs().max().item()
        row["logits_relative_error"] = ((mine - theirs).norm() / theirs.norm()).item()
        row["logits_std"] = theirs.std().item()
        row["same_top1"] = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    row["process_peak_bytes"] = watcher.stop()
    if args.digest:
        row["logits_digest"] = digest_of_logits(model, ids)
    del model, weights
    engine.close()
    torch.cuda.set_per_process_memory_fraction(1.0)
    row["link_bytes_per_s"] = link_rate(torch.device("cuda"))
    row["reader_bytes_per_s"] = reader_rate(files, plan) if plan.staged_bytes else None
    limit = predict(plan, Machine(row["link_bytes_per_s"], row["reader_bytes_per_s"]))
    row["limit_tokens_per_s"] = limit.tokens_per_s
    row["share_of_limit"] = row["tokens_per_s"] / limit.tokens_per_s if limit.tokens_per_s else None
    yield row


def read_evicted(folder: Path, codec: str) -> float:
    """Drops the files from the page cache, reads those of the codec once as the readers do, and drops them again.

    Returns:
        seconds of the reading.
    """
    from streamer.rates import read_rate
    from streamer.weights.host import reader_threads

    with read_files(folder, codec) as files:
        folders = {folder, files.folder}
        evict(folders)
        rate = read_rate(files, direct=False, threads=reader_threads(), max_bytes=1 << 62)
        evict(folders)
        return files.total_bytes / rate


@contextmanager
def read_files(folder: Path, codec: str) -> Iterator[Any]:
    """The checkpoint whose files a run with that codec reads: the one in the folder, or what it was packed to."""
    from streamer.checkpoint import Checkpoint
    from streamer.codec import LikelyWeights, open_packed

    with Checkpoint.open(folder) as checkpoint:
        packed = open_packed(checkpoint, codec, None, on_note=print)
        if isinstance(packed, LikelyWeights):
            raise SystemExit(f"{folder} has not been packed: tq-stream pack {folder}")
        yield packed.checkpoint if packed is not None else checkpoint


def evict(folders: Iterable[Path]) -> None:
    """Ask the system to drop pages of weights, packed or not, from its page cache."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reader_rate(files: Any, plan: Any) -> float:
    """Bytes per second of the readers that a staged plan uses, run alone."""
    from streamer.rates import read_rate
    from streamer.weights.host import reader_threads

    return read_rate(files, direct=plan.direct_io, threads=reader_threads(), max_bytes=_READER_BYTES)


def run_transformers(args: argparse.Namespace, watcher: PeakWatcher) -> Iterator[dict[str, Any]]:
    """A row for each of --prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    from streamer.benchmark import timed_generate
    from streamer.options import parse_size
    from streamer.plan import CONTEXT_BYTES
    from streamer.rates import link_rate

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
    for prompt in args.prompt:
        ids = prompt_ids(prompt).cuda()
        timed_generate(model, ids, 1)  # the first call makes handles and plans
        # a generation of a baseline that moves its weights takes up to a minute: one gives both figures
        timing = timed_generate(model, ids, 1 + (args.new if args.runner == "resident" else _BASELINE_TOKENS))
        first_s = first_token_s(model, ids) if args.runner == "resident" else timing.first_token_s
        row = {
            "setup_s": setup_s,
            "first_token_s": first_s,
            **decode_row(timing),
            "allocator_peak_bytes": torch.cuda.max_memory_reserved(),
            "prompt": prompt,
        }
        if args.runner == "resident" and args.logits and prompt <= _EAGER_TOKENS:
            new_ids = prompt_ids(_LOGITS_TOKENS)
            logits = logits_of(model, ids, new_ids.cuda())
            torch.save({"logits": logits, "new_ids": new_ids}, logits_path(args, prompt))
            # the same weights with another attention kernel: what bf16 itself leaves undecided
            attention = model.config._attn_implementation
            model.set_attn_implementation("eager")
            other = logits_of(model, ids, new_ids.cuda())
            model.set_attn_implementation(attention)
            row["own_relative_error"] = ((other - logits).norm() / logits.norm()).item()
        if prompt == args.prompt[-1]:
            row["process_peak_bytes"] = watcher.stop()
            torch.cuda.set_per_process_memory_fraction(1.0)
        else:
            row["process_peak_bytes"] = watcher.peak_bytes
        row["link_bytes_per_s"] = link_rate(torch.device("cuda"))
        yield row


def logits_path(args: argparse.Namespace, prompt: int) -> Path:
    """Where the resident run leaves its logits for the streamed one."""
    return Path(args.logits) / f"logits-{prompt}.pt"


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
    """One runner, in this process; each of its rows is a line of stdout."""
    from streamer.benchmark import HostPeak

    watcher = PeakWatcher()
    is_ours = args.runner == "streamed"
    settings = {
        "runner": args.runner,
        "model": Path(args.folder).name,
        "prompt": args.prompt[0],
        # what a baseline does not know is not said of it
        "vram": args.vram if args.runner != "resident" else None,
        "bits": args.bits if is_ours else None,
        "resident": args.resident if is_ours else None,
        "ram": args.ram if is_ours else None,
        "direct_io": args.direct_io if is_ours else None,
        "codec": args.codec if is_ours and args.codec != "raw" else None,
        "evict": args.evict if is_ours else None,
        "versions": versions(),
    }
    with HostPeak() as host:
        for row in (run_streamed if is_ours else run_transformers)(args, watcher):
            print("ROW " + json.dumps(settings | row | {"host_peak_bytes": host.peak_bytes}), flush=True)


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every runner in a process of its own, then the ratios; the rows made here."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = [(runner, codec) for runner in RUNNERS for codec in (args.codec if runner == "streamed" else ["raw"])]
        for runner, codec in runs:
            if runner not in args.runners.split(","):
                continue
            command = command_of(args, runner, codec, folder)
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
            made = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if done.returncode or not made:
                print(f"{runner} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
            for row in made:
                rows.append(row | {"commit": args.commit or current_commit()})
                print_row(row)
    earlier = [row for path in args.beside for row in json.loads(Path(path).read_text(encoding="utf-8"))]
    for row in rows:
        if row["runner"] == "streamed":
            row["ratios"] = ratios(row, [*rows, *earlier])
            print_ratios(row)
    return rows


def command_of(args: argparse.Namespace, runner: str, codec: str, folder: str) -> list[str]:
    """The command that runs one runner with the same settings."""
    command = [sys.executable, __file__, args.folder, "--runner", runner, "--vram", args.vram, "--logits", folder]
    command += ["--prompt", ",".join(map(str, args.prompt)), "--new", str(args.new), "--bits", str(args.bits)]
    for name in ("resident", "ram", "context"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    command += ["--codec", codec]
    if len(args.codec) > 1:
        command.append("--digest")
    if args.evict:
        command.append("--evict")
    if args.direct_io is not None:
        command.append("--direct-io" if args.direct_io else "--no-direct-io")
    return command


def current_commit() -> str:
    """The commit measured, with -dirty behind it when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def ratios(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our speed over that of each baseline of the same model, prompt and GPU, and over what it must reach.

    Returns:
        cpu_offload, auto (same budget), resident: tokens per second over theirs, greater is better.
        raw: tokens per second of coded weights over those of weights as they are, all else equal. same_logits: whether
            both gave the same logits, bit for bit, if both were asked (--digest).
        possible: tokens per second over the smaller of the link's (and readers') limit and resident's.
        first_token: our time to it over the larger of one sweep over the link and resident's, smaller is better.
    """
    found: dict[str, float] = {}
    baselines = {}
    for other in others:
        if all(other[key] == row[key] for key in ("model", "prompt")) and other["versions"] == row["versions"]:
            if other["runner"] == "auto" and other["vram"] != row["vram"]:
                continue
            baselines.setdefault(other["runner"], other)
    for name in ("cpu_offload", "auto", "resident"):
        if name in baselines:
            found[name] = row["tokens_per_s"] / baselines[name]["tokens_per_s"]
    alike = ("runner", "model", "prompt", "vram", "bits", "resident", "ram", "direct_io", "evict", "versions")
    raw = [o for o in others if all(o.get(key) == row.get(key) for key in alike) and not o.get("codec")]
    if row.get("codec") and raw:
        found["raw"] = row["tokens_per_s"] / raw[0]["tokens_per_s"]
        digests = row.get("logits_digest"), raw[0].get("logits_digest")
        if None not in digests:  # neither taken is not the same
            found["same_logits"] = digests[0] == digests[1]
    resident = baselines.get("resident")
    if resident is not None:
        limit = row["limit_tokens_per_s"]
        rate = min(limit, resident["tokens_per_s"]) if limit is not None else resident["tokens_per_s"]
        found["possible"] = row["tokens_per_s"] / rate
        sweep_s = row["streamed_bytes"] / row["link_bytes_per_s"]
        found["first_token"] = row["first_token_s"] / max(sweep_s, resident["first_token_s"])
    return found


def print_ratios(row: dict[str, Any]) -> None:
    """A line for each ratio of a streamed row."""
    names = {
        "cpu_offload": "streamed / cpu_offload",
        "auto": "streamed / auto",
        "resident": "streamed / resident",
        "possible": "streamed / min(limit, resident)",
        "raw": "coded / raw",
        "same_logits": "same logits as raw, bit for bit",
        "first_token": "first token / max(sweep, resident's)",
    }
    for name, ratio in row["ratios"].items():
        print(f"  {names[name]:40}{ratio:8.2f}", flush=True)


def print_row(row: dict[str, Any]) -> None:
    """The figures of a row that people compare."""
    gb = 1e9
    line = (
        f"{row['runner']:12} prompt {row['prompt']}, first {row['first_token_s']:.2f} s, "
        f"{row['tokens_per_s']:.2f} tok/s, process peak {row['process_peak_bytes'] / gb:.2f} GB"
    )
    if row["host_peak_bytes"] is not None:
        line += f", host {row['host_peak_bytes'] / gb:.2f}"
    line += f", link {row['link_bytes_per_s'] / gb:.1f} GB/s"
    if "own_relative_error" in row:
        line += f"; its own logits with eager attention differ by {row['own_relative_error']:.4f} relative"
    if row["runner"] == "streamed":
        line += (
            f" (predicted {row['predicted_peak_bytes'] / gb:.2f}), context {row['context_bytes'] / gb:.2f}, "
            f"{row['layers_resident']} layers resident, {row['host']}, {row['streamed_bytes'] / gb:.2f} GB a pass"
        )
        if row.get("coded_share"):
            line += f", coded to {100 * row['coded_share']:.1f} %"
        if row["share_of_limit"] is not None:
            line += f": {100 * row['share_of_limit']:.1f} % of the limit of {row['limit_tokens_per_s']:.2f} tok/s"
        line += f"; prompt moved {row['prompt_bytes'] / gb:.2f} GB"
        line += f", cold first token {row['setup_s']:.1f} + {row['cold_first_token_s']:.1f} s"
        if row["settling_s"] > 1:
            line += f", {row['settling_s']:.0f} s until host memory was filled"
        if row["read_once_s"] is not None:
            cold_s = row["setup_s"] + row["cold_first_token_s"]
            line += (
                f", from the disk: {cold_s / row['read_once_s']:.2f} times {row['read_once_s']:.1f} s to read it once"
            )
        if row["staged_bytes"]:
            line += (
                f"; {row['staged_bytes'] / gb:.2f} GB a pass from the files, whose readers alone reach "
                f"{row['reader_bytes_per_s'] / gb:.2f} GB/s"
            )
            if row["disk_bytes_per_pass"] is not None:
                line += f", {row['disk_bytes_per_pass'] / gb:.2f} GB of it from the disk"
        if row["blocked_s"] is not None:
            line += f"; waited {row['blocked_s']:.2f} s for readers"
        if "logits_relative_error" in row:
            line += f"; logits off by {row['logits_relative_error']:.4f} relative, top-1 same {row['same_top1']:.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--runner", choices=RUNNERS, help="run this one here, and print its rows as JSON")
    parser.add_argument("--runners", default=",".join(RUNNERS), help="of them, with commas between")
    parser.add_argument("--vram", default="8GiB", help="budget and hard cap of each runner but resident")
    parser.add_argument("--ram", help="host memory for weights, streamed runner")
    parser.add_argument("--context", type=int, help="of the streamed runner; default: prompt and new tokens")
    parser.add_argument(
        "--prompt", default="512", help="tokens; several, with commas between, for transformers' runners"
    )
    parser.add_argument("--new", type=int, default=64, help="tokens timed; baselines that move weights time 8")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--resident", type=int)
    parser.add_argument("--direct-io", action=argparse.BooleanOptionalAction, help="read around the page cache")
    parser.add_argument("--codec", default="raw", help="of the streamed runner; raw,lossless runs it twice")
    parser.add_argument("--digest", action="store_true", help="of the logits, to compare codecs by")
    parser.add_argument("--evict", action="store_true", help="start with no byte of the files in the page cache")
    parser.add_argument("--logits", default="", help="folder through which resident hands its logits on")
    parser.add_argument("--beside", action="append", default=[], help="rows of earlier runs to form ratios with")
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    parser.add_argument("--out")
    args = parser.parse_args()
    args.prompt = [int(tokens) for tokens in args.prompt.split(",")]
    if len(args.prompt) > 1 and "streamed" in (args.runner or args.runners).split(","):
        parser.error("the streamed runner takes one --prompt: its memory is planned for it")
    if args.runner:
        run_one(args)
        return
    args.codec = args.codec.split(",")
    rows = run_all(args)
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if len(rows) < len(args.prompt) * len(args.runners.split(",")):
        sys.exit(1)


if __name__ == "__main__":
    main()
