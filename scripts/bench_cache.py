#!/usr/bin/env python3
"""Decoding with a compressed cache beside transformers' bfloat16 cache: a resident model, a long context, one run.

    scripts/bench_cache.py                                    # Qwen2.5-7B's shape, 32,768 tokens, 256 new ones, 3 bits
    scripts/bench_cache.py --prompt 4096 --bits 4 --new 64
    scripts/bench_cache.py --bits 4 --decay 4096:3,16384:2    # each width without and with a decay

Weights are random, made on the GPU; prompts are random tokens. Prints tokens per second, what the allocator holds after
the prompt beside what it held before, and with a decay the share of the decoding that ageing takes on the GPU; steps
with and without decay alternate.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Conversation:
    """A cache that holds the prompt, and the token that comes next."""

    cache: Any
    token: torch.Tensor
    held_bytes: int
    prompt_peak_bytes: int


@torch.inference_mode()
def begin(model: Any, cache: Any, ids: torch.Tensor) -> Conversation:
    """The prompt: bytes allocated by the cache behind it, the highest peak."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    del out
    torch.cuda.synchronize()
    return Conversation(cache, token, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated())


@torch.inference_mode()
def decode(model: Any, conversations: Sequence[Conversation], new: int) -> list[dict[str, Any]]:
    """`new` greedy steps of each, in turn, so that a slow machine is as slow for all of them."""
    steps: list[list[float]] = [[] for _ in conversations]
    ageing_s = [0.0] * len(conversations)
    for _ in range(new):
        for i, one in enumerate(conversations):
            with ageing() as aged:
                start = time.perf_counter()
                one.token = model(one.token, past_key_values=one.cache, use_cache=True).logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                steps[i].append(time.perf_counter() - start)
            # from one event to the next the GPU may have waited for Python: at most this
            ageing_s[i] += sum(first.elapsed_time(last) for first, last in aged) / 1e3
    return [
        {
            "ageing_share": aged_s / sum(own),
            "step_s": statistics.median(own),
            "tokens_per_s": new / sum(own),
            "held_bytes": one.held_bytes,
            "prompt_peak_bytes": one.prompt_peak_bytes,
        }
        for one, own, aged_s in zip(conversations, steps, ageing_s, strict=True)
    ]


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
    room = options.prompt + options.new
    for bits in (16, *options.bits):
        model.set_attn_implementation("sdpa" if bits == 16 else ATTENTION_NAME)
        of_width = ["off"] if bits == 16 else decays

        def make(bits: int, decay: str) -> Any:
            if bits == 16:
                return DynamicCache(config=config)
            return TurboQuantCache(model, bits, decay=decay, capacity_tokens=room)

        for decay in of_width:  # kernels compiled, libraries loaded; those of aged blocks need a prompt that ages
            warm_up = ids[:, :1024] if decay == "off" else ids
            decode(model, [begin(model, make(bits, decay), warm_up)], 4)
        conversations = [begin(model, make(bits, decay), ids) for decay in of_width]
        for decay, one, row in zip(of_width, conversations, decode(model, conversations, options.new), strict=True):
            row |= {"kind": "cache", "model": options.shape, "bits": bits, "prompt": options.prompt, "new": options.new}
            row |= {"decay": None if decay == "off" else decay}
            row["cache_bytes"] = dense_bytes if bits == 16 else one.cache.nbytes
            if rows:
                row["speed_ratio"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
                row["saved_share"] = (rows[0]["held_bytes"] - row["held_bytes"]) / dense_bytes
            if row["decay"]:
                row["undecayed_ratio"] = row["tokens_per_s"] / rows[-1]["tokens_per_s"]
            rows.append(row)
            print(described(row), flush=True)
        del conversations, one
    if options.out:
        measured_on = {"commit": options.commit or current_commit(), "versions": versions()}
        options.out.write_text(json.dumps([row | measured_on for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
