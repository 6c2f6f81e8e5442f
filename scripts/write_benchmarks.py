#!/usr/bin/env python3
"""Rows measured by the benchmarks -> the tables of docs/benchmarks.md, between their markers.

scripts/write_benchmarks.py rows/*.json
"""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = (
    "| model | runner | budget | prompt | first token | decode tok/s (p20 to p80) | a pass | share of the link | "
    "process peak (predicted) |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def stream_row(row: dict[str, Any]) -> str:
    """One line of the streaming table."""
    gb = 1e9
    is_ours = row["runner"] == "streamed"
    name = f"tq-stream, {row['bits']}-bit cache, {row['layers_resident']} layers resident" if is_ours else row["runner"]
    rate = f"{row['tokens_per_s']:.2f} ({row['tokens_per_s_p20']:.2f} to {row['tokens_per_s_p80']:.2f})"
    peak = f"{row['process_peak_bytes'] / gb:.2f} GB"
    a_pass = share = ""
    if is_ours:
        peak += f" ({row['predicted_peak_bytes'] / gb:.2f})"
        a_pass = f"{row['streamed_bytes'] / gb:.2f} GB"
        if row["streamed_bytes"]:
            limit = row["link_bytes_per_s"] / row["streamed_bytes"]
            share = f"{100 * row['tokens_per_s'] / limit:.0f} % of {row['link_bytes_per_s'] / gb:.1f} GB/s"
    budget = "" if row["runner"] == "resident" else row["vram"]
    cells = [row["model"], name, budget, str(row["prompt"]), f"{row['first_token_s']:.2f} s", rate, a_pass, share, peak]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    rows = [row for path in sorted(args.files) for row in json.loads(path.read_text(encoding="utf-8"))]
    streams = [row for row in rows if "first_token_s" in row]
    if not streams:
        return
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=PAGE.parent)
    commit = args.commit or done.stdout.strip() or "unknown"
    used = streams[0]["versions"]
    lines = [
        f"{used['gpu']}, driver {used['driver']}, "
        + ", ".join(f"{name} {used[name]}" for name in ("torch", "transformers", "accelerate", "triton"))
        + f"; commit {commit}; random weights of the named shapes.",
        "",
        HEAD,
    ]
    lines += [stream_row(row) for row in streams]
    text = PAGE.read_text(encoding="utf-8")
    block = "<!-- stream: begin -->\n" + "\n".join(lines) + "\n<!-- stream: end -->"
    PAGE.write_text(
        re.sub(r"<!-- stream: begin -->.*<!-- stream: end -->", lambda _: block, text, flags=re.DOTALL), "utf-8"
    )
    print(block)


if __name__ == "__main__":
    main()
