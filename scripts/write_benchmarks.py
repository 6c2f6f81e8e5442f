#!/usr/bin/env python3
"""Rows measured by the benchmarks -> docs/benchmarks.json, which keeps the latest of each kind, and the tables of
docs/benchmarks.md, between their markers, made from all that it holds.

scripts/write_benchmarks.py rows/*.json    adds rows, or replaces those of the same settings
scripts/write_benchmarks.py                writes the tables again
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

# Settings that make two rows the same measurement: the later one counts.
KEY = ("model", "runner", "vram", "prompt", "bits", "resident", "ram", "direct_io", "evict", "codec")

HEAD = (
    "| model | runner | budget | prompt | first token | decode tok/s (p20 to p80) | a pass | share of the limit | "
    "process peak (predicted) | times the speed of | commit |\n" + "| --- " * 11 + "|"
)


# Rows of other benchmarks have a kind: what makes two of a kind the same measurement, and the head of its table.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "attention": (
        ("shape",),
        "| attention of one token over | time | share of the rate of a plain copy | times as fast as | commit |",
    ),
    "encode": (("side", "bits", "dim", "heads", "tokens"), "| encode | time | share of a plain copy | commit |"),
    "unpack": (("side", "bits", "dim", "heads", "tokens"), "| unpack | time | share of a plain fill | commit |"),
    "cache": (
        ("model", "bits", "prompt", "new", "decay"),
        "| decoding, everything resident | tok/s | cache | held after the prompt | beside 16 bits | commit |",
    ),
    "codec": (
        ("what", "setting"),
        "| weights | GB/s of bfloat16 | share | bits a weight | host time of a call | commit |",
    ),
}

# Kinds that stand together between markers of their own.
SECTIONS = {"cache": ("attention", "encode", "unpack", "cache"), "codec": ("codec",)}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from others."""
    if "kind" not in row:
        return tuple(row.get(name) for name in KEY)
    return (row["kind"], *(json.dumps(row.get(name), sort_keys=True) for name in KINDS[row["kind"]][0]))


def merged(kept: Iterable[dict[str, Any]], measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows, of two with the same settings the measured one, in the order of the table.

    Args:
        kept: rows of earlier runs. measured: rows of this one, later ones last.
    """
    rows = {key_of(row): row for row in (*kept, *measured)}
    streamed = sorted((row for row in rows.values() if "kind" not in row), key=order)
    return streamed + [row for kind in KINDS for row in rows.values() if row.get("kind") == kind]


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Models by size of their name's number, prompts, then ours before the baselines, small budgets first."""
    runners = ("streamed", "cpu_offload", "auto", "resident")
    number = re.search(r"([\d.]+)b\b", row["model"])
    budget = re.match(r"[\d.]+", row.get("vram") or "")
    return (
        float(number[1]) if number else 0.0,
        row["model"],
        row["prompt"],
        runners.index(row["runner"]),
        float(budget[0]) if budget else 0.0,
        *(str(row.get(name)) for name in KEY),
    )


def stream_row(row: dict[str, Any]) -> str:
    """One line of the streaming table."""
    gb = 1e9
    is_ours = row["runner"] == "streamed"
    name = row["runner"]
    rate = f"{row['tokens_per_s']:.2f} ({row['tokens_per_s_p20']:.2f} to {row['tokens_per_s_p80']:.2f})"
    peak = f"{row['process_peak_bytes'] / gb:.2f} GB"
    first = f"{row['first_token_s']:.2f} s"
    a_pass = share = ""
    if is_ours:
        name = f"tq-stream, {row['bits']}-bit cache, {row['layers_resident']} layers resident"
        name += f", --ram {row['ram']}" if row.get("ram") else ""
        name += f", --codec {row['codec']}" if row.get("codec") else ""
        peak += f" ({row['predicted_peak_bytes'] / gb:.2f})"
        a_pass = f"{row['streamed_bytes'] / gb:.2f} GB"
        if row.get("staged_bytes"):
            a_pass += f", {row['staged_bytes'] / gb:.2f} from the files"
        if row["share_of_limit"] is not None:
            share = f"{100 * row['share_of_limit']:.0f} % of {row['limit_tokens_per_s']:.2f} tok/s"
    baselines = ("cpu_offload", "auto", "resident", "raw")
    if row.get("read_once_s"):
        cold = row["setup_s"] + row["cold_first_token_s"]
        first += f"; cold, from the disk {cold:.1f} s, {cold / row['read_once_s']:.2f} times to read it once"
    if "first_token" in row.get("ratios", {}):
        first += f", {row['ratios']['first_token']:.2f} times the least"
    times = [f"{other} {row['ratios'][other]:.2f}" for other in baselines if other in row.get("ratios", {})]
    if "same_logits" in row.get("ratios", {}):
        times.append("same logits" if row["ratios"]["same_logits"] else "OTHER LOGITS")
    cells = [row["model"], name, row.get("vram") or "", str(row["prompt"]), first]
    cells += [rate, a_pass, share, peak, ", ".join(times), row["commit"]]
    return "| " + " | ".join(cells) + " |"


def kind_row(row: dict[str, Any]) -> str:
    """One line of the table of a kind."""
    if row["kind"] == "attention":
        shape = row["shape"]
        terms = "key terms" if shape["has_terms"] else "no key terms"
        cells = [
            f"batch {shape['batch']}, {shape['heads']}/{shape['kv_heads']} heads of {shape['dim']}, "
            f"{shape['tokens']} tokens, {shape['bits']} bits, {terms}",
            f"{1e6 * row['seconds']:.1f} µs",
            f"{100 * row['share_of_dram']:.0f} %",
            ", ".join(
                f"{name} {ratio:.2f} ({1e6 * row['dense_seconds'][name]:.1f} µs)"
                for name, ratio in row["ratios"].items()
            ),
        ]
    elif row["kind"] == "cache":
        ours = "speed_ratio" in row
        decay = f", decay {row['decay']}" if row.get("decay") else ""
        beside = [f"{row['speed_ratio']:.2f} times the speed, {100 * row['saved_share']:.0f} % saved"] if ours else []
        if decay:
            beside.append(
                f"{row['undecayed_ratio']:.2f} times the speed without decay, ageing {100 * row['ageing_share']:.1f} %"
            )
        cells = [
            f"{row['model']}, {row['prompt']} tokens, {row['bits']} bits{decay}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['cache_bytes'] / 1e9:.2f} GB",
            f"{row['held_bytes'] / 1e9:.2f} GB",
            "; ".join(beside),
        ]
    elif row["kind"] == "codec":
        disk = f" ({row['disk_bytes_per_s'] / 1e9:.2f} GB/s)" if "disk_bytes_per_s" in row else ""
        cells = [
            f"{row['what']}, {row['setting']}" + (f": {row['note']}" if "note" in row else ""),
            f"{row['bytes_per_s'] / 1e9:.2f}",
            f"{100 * row['share']:.0f} % of {row['share_of']}{disk}" if "share" in row else "",
            f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "",
            f"{1e6 * row['python_s']:.1f} µs" if "python_s" in row else "",
        ]
    else:
        cells = [
            f"{row['side']}, {row['bits']} bits, {row['heads']} heads of {row['dim']}, {row['tokens']} tokens",
            f"{1e6 * row['seconds']:.0f} µs",
            f"{100 * row['share']:.0f} %",
        ]
    return "| " + " | ".join([*cells, row["commit"]]) + " |"


def machines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What each commit's rows were measured with."""
    found: dict[str, list[str]] = {}
    for row in rows:
        used = row["versions"]
        packages = ", ".join(f"{name} {used[name]}" for name in ("torch", "transformers", "accelerate", "triton"))
        commits = found.setdefault(f"{used['gpu']}, driver {used['driver']}, {packages}", [])
        if row["commit"] not in commits:
            commits.append(row["commit"])
    return [f"{machine} (commit {', '.join(commits)})." for machine, commits in found.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """What stands between the markers of the streaming table."""
    lines = "\n".join([HEAD, *map(stream_row, rows)])
    return "\n\n".join([*machines(rows), "Random weights of the named shapes.", lines])


def kind_tables(rows: list[dict[str, Any]], section: str) -> str:
    """What stands between the markers of a section: a table for each of its kinds."""
    rows = [row for row in rows if row.get("kind") in SECTIONS[section]]
    if not rows:
        return "Not measured yet."
    parts = machines(rows)
    for kind in SECTIONS[section]:
        head = KINDS[kind][1]
        own = [kind_row(row) for row in rows if row["kind"] == kind]
        if own:
            parts.append("\n".join([head, "| --- " * (head.count("|") - 1) + "|", *own]))
    return "\n\n".join(parts)


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page's text with the tables of these rows."""
    blocks = {"stream": table([row for row in rows if "kind" not in row])}
    blocks |= {section: kind_tables(rows, section) for section in SECTIONS}
    for name, block in blocks.items():
        marked = f"<!-- {name}: begin -->\n{block}\n<!-- {name}: end -->"
        text = re.sub(
            rf"<!-- {name}: begin -->.*<!-- {name}: end -->", lambda _, marked=marked: marked, text, flags=re.DOTALL
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--commit", default="", help="of rows that name none, or that git could not name")
    args = parser.parse_args()
    measured = [row for path in sorted(args.files) for row in json.loads(path.read_text(encoding="utf-8"))]
    for row in measured:
        if args.commit and row.get("commit", "unknown") == "unknown":
            row["commit"] = args.commit
        row.setdefault("commit", "unknown")
    data = PAGE.with_suffix(".json")
    kept = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else []
    rows = merged(kept, measured)
    data.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(table([row for row in rows if "kind" not in row]))
    for section in SECTIONS:
        print(kind_tables(rows, section))


if __name__ == "__main__":
    main()
