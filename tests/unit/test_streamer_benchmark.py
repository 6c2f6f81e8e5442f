"""Timing of a generation, the watch on host memory, and the scripts that keep and print the rows."""

import json
import mmap
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_stream
import write_benchmarks
from streamer import benchmark
from streamer.benchmark import HostPeak, Timing, random_ids, timed_generate, unmapped_host_bytes
from streamer.errors import OptionError

# ------------------------------------------------------------------------------------------------------- generation


class Model:
    """Says a prompt and new tokens, 0.1 s of a clock of its own apart, and 0.5 s before the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.options = 0.0, dict[str, Any]()
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: self.now)

    def generate(self, ids: torch.Tensor, **options: Any) -> None:
        self.options = options
        assert torch.is_inference_mode_enabled()
        self.now += 0.25
        options["streamer"].put(ids)
        self.now += 0.15
        for _ in range(options["max_new_tokens"]):
            self.now += 0.1
            options["streamer"].put(torch.zeros(1))
        options["streamer"].end()


def test_the_first_token_counts_from_the_call_and_steps_from_token_to_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    timing = timed_generate(model, torch.zeros(1, 3, dtype=torch.long), 4)
    assert timing.first_token_s == pytest.approx(0.5)
    assert timing.step_s == pytest.approx([0.1] * 3)
    assert timed_generate(model, torch.zeros(1, 3, dtype=torch.long), 1).step_s == ()


def test_ids_equal_to_the_padding_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    timed_generate(model, torch.zeros(1, 3, dtype=torch.long), 1)
    assert model.options["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_real_model_makes_exactly_the_tokens_and_takes_the_likeliest(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    # most tokens end an answer, and the config asks for drawing: neither may show
    model = AutoModelForCausalLM.from_pretrained(random_checkpoint("llama"))
    model.generation_config.eos_token_id = list(range(100))
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    made = []
    put = benchmark._Clock.put
    monkeypatch.setattr(benchmark._Clock, "put", lambda self, value: (made.append(value), put(self, value))[1])
    ids = random_ids(128, 9)
    assert len(timed_generate(model, ids, 6).step_s) == 5
    first, made[:] = torch.stack(made[1:]), []
    timed_generate(model, ids, 6)
    assert torch.stack(made[1:]).equal(first)


def test_no_token_is_no_generation() -> None:
    with pytest.raises(OptionError, match="at least 1 token is generated; got 0"):
        timed_generate(None, torch.zeros(1, 1), 0)


def test_rates_are_the_median_and_its_neighbours() -> None:
    # ten steps of 1 to 10 s, unsorted: eight of ten last less than the ninth
    timing = Timing(0.5, (3.0, 1.0, 2.0, 10.0, 5.0, 4.0, 6.0, 9.0, 8.0, 7.0))
    assert timing.tokens_per_s == 1 / 5.5
    assert (timing.tokens_per_s_p20, timing.tokens_per_s_p80) == (1 / 9, 1 / 3)
    assert Timing(0.5, (2.0,)).tokens_per_s_p20 == Timing(0.5, (2.0,)).tokens_per_s_p80 == 0.5
    alone = Timing(0.5, ())
    assert (alone.tokens_per_s, alone.tokens_per_s_p20, alone.tokens_per_s_p80) == (None, None, None)


def test_random_ids_are_the_same_each_time_and_within_the_vocabulary() -> None:
    ids = random_ids(7, 500)
    assert (ids.shape, ids.dtype) == ((1, 500), torch.int64)
    assert ids.unique().tolist() == list(range(7))
    assert ids.equal(random_ids(7, 500))


# ------------------------------------------------------------------------------------------------------ host memory


def test_the_peak_sees_memory_that_is_gone_again_and_no_mapped_file(tmp_path: Path) -> None:
    if unmapped_host_bytes() is None:
        pytest.skip("this system does not say what is resident")
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    with HostPeak() as peak:
        before = peak.peak_bytes
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[::4096]) == 0
            time.sleep(0.2)
        with_file = peak.peak_bytes
        private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        shared = mmap.mmap(-1, size)
        for memory in (private, shared):
            memory[::4096] = b"x" * (size // 4096)
        time.sleep(0.2)
        private.close()
        shared.close()
    assert before is not None
    assert with_file is not None
    assert peak.peak_bytes is not None
    assert with_file - before < size // 2
    assert 2 * size <= peak.peak_bytes - before < 3 * size


# ------------------------------------------------------------------------------------------------------------ ratios

VERSIONS = {"gpu": "G", "driver": "1", "torch": "2", "transformers": "3", "accelerate": "4", "triton": "5"}


def row_of(runner: str, **changes: Any) -> dict[str, Any]:
    row = {
        "model": "qwen2.5-7b",
        "runner": runner,
        "vram": None if runner == "resident" else "8GiB",
        "prompt": 512,
        "bits": 16 if runner == "streamed" else None,
        "first_token_s": 0.5,
        "tokens_per_s": 4.0,
        "tokens_per_s_p20": 3.0,
        "tokens_per_s_p80": 5.0,
        "process_peak_bytes": 2 * 10**9,
        "versions": VERSIONS,
        "commit": "abc1234",
    }
    if runner == "streamed":
        row |= {"streamed_bytes": 10**10, "link_bytes_per_s": 5e10, "limit_tokens_per_s": 5.0, "share_of_limit": 0.8}
        row |= {"layers_resident": 3, "predicted_peak_bytes": 3 * 10**9}
    return row | changes


def test_ratios_to_every_baseline() -> None:
    others = [
        row_of("cpu_offload", tokens_per_s=0.5),
        row_of("auto", tokens_per_s=0.8),
        row_of("resident", tokens_per_s=8.0, first_token_s=0.1),
    ]
    # the link allows 5 tok/s, resident 8; a sweep takes 10 / 50 = 0.2 s, resident 0.1
    expected = {"cpu_offload": 8, "auto": 5, "resident": 0.5, "possible": 0.8, "first_token": 2.5}
    assert bench_stream.ratios(row_of("streamed"), others) == pytest.approx(expected)


def test_resident_bounds_where_it_is_the_slower() -> None:
    found = bench_stream.ratios(row_of("streamed"), [row_of("resident", tokens_per_s=2.0, first_token_s=1.0)])
    assert (found["possible"], found["first_token"]) == (2.0, 0.5)
    nothing_streams = row_of("streamed", streamed_bytes=0, limit_tokens_per_s=None)
    assert bench_stream.ratios(nothing_streams, [row_of("resident", tokens_per_s=2.0)])["possible"] == 2.0


def test_coded_weights_are_compared_with_those_as_they_are() -> None:
    raw = row_of("streamed", logits_digest="a")
    coded = row_of("streamed", codec="lossless", tokens_per_s=6.0, logits_digest="a")
    assert bench_stream.ratios(coded, [raw, coded]) == {"raw": 1.5, "same_logits": True}
    assert bench_stream.ratios(coded | {"logits_digest": "b"}, [raw, coded])["same_logits"] is False
    not_asked = {"logits_digest": None}
    for ours, theirs in ((coded | not_asked, raw), (coded, raw | not_asked), (coded | not_asked, raw | not_asked)):
        assert bench_stream.ratios(ours, [theirs]) == {"raw": 1.5}
    assert bench_stream.ratios(coded | {"versions": VERSIONS | {"gpu": "H"}}, [raw]) == {}
    assert bench_stream.ratios(raw, [raw, coded]) == {}
    assert bench_stream.ratios(coded | {"vram": "9GiB"}, [raw]) == {}


@pytest.mark.parametrize(
    "other",
    [
        row_of("auto", vram="24GiB"),
        row_of("resident", prompt=8192),
        row_of("resident", model="qwen2.5-14b"),
        row_of("resident", versions=VERSIONS | {"gpu": "H"}),
        row_of("streamed"),
    ],
    ids=["budget", "prompt", "model", "gpu", "ours"],
)
def test_what_cannot_be_compared_gives_no_ratio(other: dict[str, Any]) -> None:
    assert bench_stream.ratios(row_of("streamed"), [other]) == {}


def test_offloading_moves_all_bytes_whatever_the_budget() -> None:
    assert bench_stream.ratios(row_of("streamed"), [row_of("cpu_offload", vram="24GiB")]) == {"cpu_offload": 1.0}


def test_the_first_of_two_baselines_counts() -> None:
    # rows of the same run come before those of earlier ones
    others = [row_of("resident", tokens_per_s=2.0), row_of("resident", tokens_per_s=1.0)]
    assert bench_stream.ratios(row_of("streamed"), others)["resident"] == 2.0


@pytest.mark.parametrize(
    ("codec", "streamed"), [("raw", ["raw"]), ("lossless", ["lossless"]), ("raw,lossless", ["raw", "lossless"])]
)
def test_every_runner_runs_whatever_the_codec(codec: str, streamed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command[command.index("--runner") + 1], command[command.index("--codec") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["bench_stream.py", "model", "--vram", "6GiB", "--codec", codec])
    with pytest.raises(SystemExit):  # no rows were made
        bench_stream.main()
    ours = [("streamed", name) for name in streamed]
    assert ran == [("resident", "raw"), *ours, ("cpu_offload", "raw"), ("auto", "raw")]


def test_a_runner_of_its_own_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--vram", "6GiB", "--prompt", "32", "--new", "7", "--bits", "3", "--resident", "0", "--ram", "4GiB"]
    asked += ["--context", "100", "--no-direct-io", "--codec", "raw,lossless"]
    runs = []
    monkeypatch.setattr(bench_stream, "run_one", runs.append)
    monkeypatch.setattr(bench_stream, "run_all", lambda args: runs.append(args) or [{}])
    monkeypatch.setattr("sys.argv", ["bench_stream.py", "model", "--runners", "streamed", *asked])
    bench_stream.main()
    command = bench_stream.command_of(runs[0], "streamed", "lossless", "there")
    monkeypatch.setattr("sys.argv", command[1:])
    bench_stream.main()
    first, second = (vars(run) for run in runs)
    assert first["codec"] == ["raw", "lossless"]
    changed = {"runner": "streamed", "logits": "there", "runners": ",".join(bench_stream.RUNNERS)}
    assert second == first | changed | {"codec": "lossless", "digest": True}
    assert (first["prompt"], first["resident"], first["direct_io"], first["ram"]) == ([32], 0, False, "4GiB")


# ------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- stream: begin -->\nstale\n<!-- stream: end -->\nbehind\n")
    monkeypatch.setattr(write_benchmarks, "PAGE", page)
    return page


def write(page: Path, monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any], commit: str = "") -> list[dict[str, Any]]:
    """Runs the script on some rows; the rows kept after it."""
    (page.parent / "measured").write_text(json.dumps(rows))
    arguments = ["write_benchmarks.py", str(page.parent / "measured"), "--commit", commit]
    monkeypatch.setattr("sys.argv", arguments)
    write_benchmarks.main()
    kept: list[dict[str, Any]] = json.loads(page.with_suffix(".json").read_text())
    return kept


def test_a_later_run_replaces_rows_of_the_same_settings_and_keeps_the_others(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(page, monkeypatch, row_of("streamed"), row_of("resident"), row_of("streamed", bits=3, first_token_s=7.0))
    kept = write(page, monkeypatch, row_of("streamed", tokens_per_s=4.5, commit="def5678"), row_of("auto"))
    assert [(row["runner"], row["bits"], row["tokens_per_s"], row["commit"]) for row in kept] == [
        ("streamed", 16, 4.5, "def5678"),
        ("streamed", 3, 4.0, "abc1234"),
        ("auto", None, 4.0, "abc1234"),
        ("resident", None, 4.0, "abc1234"),
    ]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nbehind\n")
    assert "stale" not in text
    rows = [line for line in text.splitlines() if line.startswith("| qwen")]
    assert [re.split(r" *\| *", row)[-2] for row in rows] == ["def5678", "abc1234", "abc1234", "abc1234"]
    assert "G, driver 1, torch 2, transformers 3, accelerate 4, triton 5 (commit def5678, abc1234)." in text


@pytest.mark.parametrize("changed", ["model", "vram", "prompt", "bits", "resident", "ram", "direct_io", "codec"])
def test_other_settings_are_another_row(changed: str) -> None:
    other = "other" if changed in ("model", "vram", "ram") else 7
    assert len(write_benchmarks.merged([row_of("streamed")], [row_of("streamed", **{changed: other})])) == 2


def test_a_row_without_a_commit_gets_the_one_given(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown, known = row_of("streamed", commit="unknown"), row_of("resident")
    kept = write(page, monkeypatch, unknown, known, commit="0badf00")
    assert [row["commit"] for row in kept] == ["0badf00", "abc1234"]
    assert [row["commit"] for row in write(page, monkeypatch, unknown)] == ["unknown", "abc1234"]


def test_a_line_of_the_table() -> None:
    ratios = {"cpu_offload": 8.0, "resident": 0.5, "first_token": 1.25}
    assert write_benchmarks.stream_row(row_of("streamed", ratios=ratios, ram="4GiB", staged_bytes=10**9)) == (
        "| qwen2.5-7b | tq-stream, 16-bit cache, 3 layers resident, --ram 4GiB | 8GiB | 512 "
        "| 0.50 s, 1.25 times the least | 4.00 (3.00 to 5.00) | 10.00 GB, 1.00 from the files | 80 % of 5.00 tok/s "
        "| 2.00 GB (3.00) | cpu_offload 8.00, resident 0.50 | abc1234 |"
    )
    coded = row_of("streamed", codec="lossless", ratios={"raw": 1.4, "same_logits": True})
    cells = write_benchmarks.stream_row(coded).split(" | ")
    assert cells[1].endswith("3 layers resident, --codec lossless")
    assert cells[-2] == "raw 1.40, same logits"
    assert write_benchmarks.stream_row(row_of("resident")) == (
        "| qwen2.5-7b | resident |  | 512 | 0.50 s | 4.00 (3.00 to 5.00) |  |  | 2.00 GB |  | abc1234 |"
    )
    assert len(write_benchmarks.HEAD.splitlines()[0].split("|")) == len(
        write_benchmarks.stream_row(row_of("resident")).split("|")
    )


def test_rows_of_the_codec_have_a_table_of_their_own(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write_text("<!-- cache: begin -->\n<!-- cache: end -->\n<!-- codec: begin -->\nstale\n<!-- codec: end -->\n")
    common = {"kind": "codec", "commit": "abc1234", "versions": row_of("streamed")["versions"]}
    unit = common | {
        "what": "decode an MLP unit",
        "setting": "spread 0.4",
        "bytes_per_s": 1.5e12,
        "share": 0.83,
        "share_of": "the rate of a plain copy",
        "bits_per_weight": 11.21,
        "python_s": 7.4e-6,
    }
    packing = {"what": "pack m", "setting": "threads 16", "share": 0.9, "share_of": "the disk's write rate"}
    packing = common | packing | {"bytes_per_s": 1.25e9, "disk_bytes_per_s": 1e9}
    encoding = common | {"what": "encode on the GPU", "setting": "threads 1", "bytes_per_s": 3e9}
    write(page, monkeypatch, unit | {"bytes_per_s": 1e12}, packing)
    kept = write(page, monkeypatch, unit, encoding)
    assert [row["what"] for row in kept] == ["decode an MLP unit", "pack m", "encode on the GPU"]
    before, _, behind = page.read_text().partition("<!-- codec: begin -->")
    assert "Not measured yet." in before
    assert [line for line in behind.splitlines() if line.startswith("|")] == [
        "| weights | GB/s of bfloat16 | share | bits a weight | host time of a call | commit |",
        "| --- | --- | --- | --- | --- | --- |",
        "| decode an MLP unit, spread 0.4 | 1500.00 | 83 % of the rate of a plain copy | 11.21 | 7.4 µs | abc1234 |",
        "| pack m, threads 16 | 1.25 | 90 % of the disk's write rate (1.00 GB/s) |  |  | abc1234 |",
        "| encode on the GPU, threads 1 | 3.00 |  |  |  | abc1234 |",
    ]


def test_the_table_of_the_page_is_made_from_the_rows_beside_it() -> None:
    rows = json.loads(write_benchmarks.PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    text = write_benchmarks.PAGE.read_text(encoding="utf-8")
    assert rows == write_benchmarks.merged(rows, [])
    assert write_benchmarks.page(text, rows) == text


def test_a_decaying_cache_has_a_line_of_its_own() -> None:
    row = {"kind": "cache", "model": "m", "bits": 4, "prompt": 99, "new": 9, "tokens_per_s": 5.0, "commit": "abc1234"}
    row |= {"cache_bytes": 10**9, "held_bytes": 2 * 10**9, "speed_ratio": 1.5, "saved_share": 0.7}
    decayed = row | {"decay": "64:3", "undecayed_ratio": 1.02, "ageing_share": 0.015}
    assert len(write_benchmarks.merged([row, row | {"decay": None}], [decayed])) == 2
    assert write_benchmarks.kind_row(decayed) == (
        "| m, 99 tokens, 4 bits, decay 64:3 | 5.00 | 1.00 GB | 2.00 GB | 1.50 times the speed, 70 % saved; 1.02 times "
        "the speed without decay, ageing 1.5 % | abc1234 |"
    )
