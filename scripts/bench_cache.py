#!/usr/bin/env python3
"""Decoding with a compressed cache beside transformers' bfloat16 cache: a resident model, a long context, one run.

    scripts/bench_cache.py                                    # Qwen2.5-7B's shape, 32,768 tokens, 256 new ones, 3 bits
    scripts/bench_cache.py --prompt 4096 --bits 4 --new 64

Weights are random, made on the GPU; prompts are random tokens. Prints tokens per second, and what the allocator holds
after the prompt beside what it held before.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from bench_stream import current_commit, versions
from make_checkpoint import SHAPES, config_of
from turboquant import TurboQuantCache
from turboquant.hf import ATTENTION_NAME, register_attention


def make_model(shape: str) -> Any:
    """A model of that shape with random weights in bfloat16, made on the GPU."""
    config = AutoConfig.for_model(**config_of(SHAPES[shape]))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


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
    for _ in range(new):
        start = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    steps.sort()
    return {
        "step_s": steps[len(steps) // 2],
        "tokens_per_s": new / sum(steps),
        "held_bytes": held,
        "prompt_peak_bytes": peak,
        "decode_peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
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
    for bits in (16, *options.bits):
        model.set_attn_implementation("sdpa" if bits == 16 else ATTENTION_NAME)
        room = options.prompt + options.new

        def make(bits: int = bits, room: int = room) -> Any:
            return DynamicCache(config=config) if bits == 16 else TurboQuantCache(model, bits, capacity_tokens=room)

        measure(model, make(), ids[:, :1024], 4)  # kernels compiled, libraries loaded
        cache = make()
        row = measure(model, cache, ids, options.new)
        row |= {"kind": "cache", "model": options.shape, "bits": bits, "prompt": options.prompt, "new": options.new}
        row["cache_bytes"] = dense_bytes if bits == 16 else cache.nbytes
        del cache
        if rows:
            row["speed_ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
            row["saved_share"] = (rows[0]["held_bytes"] - row["held_bytes"]) / dense_bytes
        rows.append(row)
        print(
            f"{options.shape}, prompt {options.prompt}, {bits} bits: {row['tokens_per_s']:.2f} tok/s, "
            f"{1e3 * row['step_s']:.1f} ms a step; held after the prompt {row['held_bytes'] / 1e9:.2f} GB"
            + (
                f"; {row['speed_ratio']:.2f} x the speed, {100 * row['saved_share']:.0f} % of the bfloat16 cache saved"
                if len(rows) > 1
                else ""
            ),
            flush=True,
        )
    if options.out:
        measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
