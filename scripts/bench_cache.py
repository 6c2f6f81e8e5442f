#!/usr/bin/env python3
"""Decoding with a compressed cache beside transformers' bfloat16 cache: a resident model, a long context, one run.

    scripts/bench_cache.py                                    # Qwen2.5-7B's shape, 32,768 tokens, 256 new ones, 3 bits
    scripts/bench_cache.py --prompt 4096 --bits 4 --new 64
    scripts/bench_cache.py --bits 4 --decay 4096:3,16384:2    # each width without and with a decay

Weights are random, made on the GPU; prompts are random tokens. Prints tokens per second, what the allocator holds after
the prompt beside what it held before, and with a decay the share of the decoding that ageing takes on the GPU.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bench_stream import current_commit, versions
from make_checkpoint import SHAPES, config_of
from turboquant import TurboQuantCache
from turboquant.hf import ATTENTION_NAME, register_attention
from turboquant.store import CompressedKV


def make_model(shape: str) -> Any:
    """A model of that shape with random weights in bfloat16, made on the GPU."""
    config = AutoConfig.for_model(**config_of(SHAPES[shape]))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


@contextmanager
def ageing() -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """Within this, events around everything that ages blocks."""
    real, events = CompressedKV._age, []

    def timed(store: CompressedKV, *args: Any) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        real(store, *args)
        end.record()
        events.append((begin, end))

    CompressedKV._age = timed
    try:
        yield events
    finally:
        CompressedKV._age = real


@torch.inference_mode()
def measure(model: Any, cache: Any, ids: torch.Tensor, new: int) -> dict[str, Any]:
    """Prompt, then `new` greedy steps: seconds a step (median), bytes allocated by the cache, the highest peak."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    del out
    torch.cuda.synchronize()
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps = []
    with ageing() as aged:
        for _ in range(new):
            start = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - start)
    # from one event to the next the GPU may have waited for Python: at most this
    ageing_s = sum(begin.elapsed_time(end) for begin, end in aged) / 1e3
    steps.sort()
    return {
        "ageing_share": ageing_s / sum(steps),
        "step_s": steps[len(steps) // 2],
        "tokens_per_s": new / sum(steps),
        "held_bytes": held,
        "prompt_peak_bytes": peak,
        "decode_peak_bytes": torch.cuda.max_memory_allocated(),
    }


def described(row: dict[str, Any]) -> str:
    """A row as a line."""
    decay = f", decay {row['decay']}" if row["decay"] else ""
    line = (
        f"{row['model']}, prompt {row['prompt']}, {row['bits']} bits{decay}: {row['tokens_per_s']:.2f} tok/s, "
        f"{1e3 * row['step_s']:.1f} ms a step; cache {row['cache_bytes'] / 1e9:.2f} GB, held after the prompt "
        f"{row['held_bytes'] / 1e9:.2f} GB"
    )
    if "speed_ratio" in row:
        line += f"; {row['speed_ratio']:.2f} x the speed, {100 * row['saved_share']:.0f} % of the bfloat16 cache saved"
    if "undecayed_ratio" in row:
        ageing = f"ageing {100 * row['ageing_share']:.2f} % of the time at most"
        line += f"; {row['undecayed_ratio']:.2f} x the speed without decay, {ageing}"
    return line


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--decay", help='each width once more with this decay, e.g. "4096:3,16384:2"')
    parser.add_argument("--commit", default="", help="written into the rows; default: what git says")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_cache measures a GPU, and there is none here")
    register_attention()
    model = make_model(options.shape)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, options.prompt), generator=draw).cuda()
    rows = []
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim * options.prompt
    decays = ["off", options.decay] if options.decay else ["off"]
    for bits, decay in [(16, "off"), *((bits, decay) for bits in options.bits for decay in decays)]:
        model.set_attn_implementation("sdpa" if bits == 16 else ATTENTION_NAME)
        room = options.prompt + options.new

        def make(bits: int = bits, decay: str = decay, room: int = room) -> Any:
            if bits == 16:
                return DynamicCache(config=config)
            return TurboQuantCache(model, bits, decay=decay, capacity_tokens=room)

        measure(model, make(), ids[:, :1024], 4)  # kernels compiled, libraries loaded
        cache = make()
        row = measure(model, cache, ids, options.new)
        row |= {"kind": "cache", "model": options.shape, "bits": bits, "prompt": options.prompt, "new": options.new}
        row |= {"decay": None if decay == "off" else decay}
        row["cache_bytes"] = dense_bytes if bits == 16 else cache.nbytes
        del cache
        if rows:
            row["speed_ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            row["saved_share"] = (rows[0]["held_bytes"] - row["held_bytes"]) / dense_bytes
        if row["decay"]:
            row["undecayed_ratio"] = row["tokens_per_s"] / rows[-1]["tokens_per_s"]
        rows.append(row)
        print(described(row), flush=True)
    if options.out:
        measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
