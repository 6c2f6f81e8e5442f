"""tq-stream bench through click's runner, on the CPU; what a GPU adds is formatted from made-up figures."""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from streamer import StreamingEngine, rates
from streamer.benchmark import Timing
from streamer.checkpoint import Checkpoint
from streamer.cli import main

bench = sys.modules["streamer.cli.bench"]  # the name in the package is the command


def tq_stream(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=env)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_HOST_BYTES", 1 << 20)


def test_bench_prints_the_rates_and_the_figures(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "usable_cores", lambda: 2)
    result = tq_stream("bench", tiny, "--device", "cpu", "--prompt-tokens", "20", "--new-tokens", "4")
    assert result.exit_code == 0, result.stderr
    number = r"[\d.]+"
    expected = rf"""rates of this machine, GB/s
  copies in host memory, 1 thread +{number}
  copies in host memory, 2 threads +{number}
  files as the system serves them, \d+ threads +{number}.*
  files around the page cache, \d+ threads +{number}.*

prompt of 20 tokens, 4 new ones, on the CPU; KV cache of 4-bit keys and 4-bit values
  first token +{number} s, median of 3 \({number} prompt tok/s\)
  first generation +{number} s to its first token, {number} s before it
  decode +{number} tok/s, median of 3 tokens \(p20 {number}, p80 {number}\)
  bytes per pass +nothing streams: on the CPU the weights are read where the files are mapped
  bound by +the processor and host memory
(  host memory +peak of the process {number} [MG]iB, pages of files not counted; planned for the model: {number} [KM]iB
)?"""
    assert re.fullmatch(expected, result.stdout), result.stdout
    assert "timing 4 tokens" in result.stderr


def test_bench_json_is_one_object(tiny: Path) -> None:
    arguments = ("--device", "cpu", "--new-tokens", "5", "--json")
    result = tq_stream("bench", tiny, *arguments, env={"TQ_STREAM_PROMPT_TOKENS": "20", "TQ_STREAM_BITS": "3"})
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["model"], found["device"], found["prompt_tokens"], found["new_tokens"]) == (str(tiny), "cpu", 20, 5)
    assert (found["kv_bits"], found["num_layers"], found["layers_resident"]) == ([3, 3], 3, 3)
    assert len(found["step_s"]) == 4
    assert all(step > 0 for step in found["step_s"])
    assert found["tokens_per_s_p20"] <= found["tokens_per_s"] <= found["tokens_per_s_p80"]
    assert min(found["cold_first_token_s"], found["first_token_s"], found["assembly_s"]) > 0
    # nothing streams, so there is no limit to compare with
    assert (found["streamed_bytes"], found["staged_bytes"], found["limit_tokens_per_s"]) == (0, 0, None)
    assert (found["share_of_limit"], found["bound_by"], found["reader_bytes_per_s"]) == (None, "computing", None)
    assert (found["device_peak_bytes"], found["predicted_device_bytes"]) == (None, None)
    assert found["predicted_host_bytes"] > 0
    assert found["rates"]["pinned_link_bytes_per_s"] is None
    assert found["rates"]["files"]["bytes_per_s"] > 0


def test_bench_runs_what_it_says(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations of 1 token: the first, then three whose median counts; then the tokens asked for."""
    calls: list[tuple[tuple[int, ...], int]] = []
    firsts = iter([9.0, 3.0, 1.0, 2.0, 5.0])

    def timed_generate(model: Any, ids: torch.Tensor, new_tokens: int) -> Timing:
        calls.append((tuple(ids.shape), new_tokens))
        assert 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size
        return Timing(next(firsts), (0.5,) * (new_tokens - 1))

    monkeypatch.setattr("streamer.benchmark.timed_generate", timed_generate)
    result = tq_stream("bench", tiny, "--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "3", "--json")
    found = json.loads(result.stdout)
    assert calls == [((1, 9), 1)] * 4 + [((1, 9), 3)]
    assert (found["cold_first_token_s"], found["first_token_s"], found["tokens_per_s"]) == (9.0, 2.0, 2.0)


def test_bench_makes_room_for_the_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = []

    class Engine(StreamingEngine):
        def __init__(self, *arguments: Any, context: int | None, **options: Any):
            contexts.append(context)
            super().__init__(*arguments, context=context, **options)

    monkeypatch.setattr("streamer.engine.StreamingEngine", Engine)
    arguments = ("bench", tiny, "--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "3")
    assert tq_stream(*arguments).exit_code == 0
    assert tq_stream(*arguments, "--context", "40").exit_code == 0
    assert contexts == [12, 40]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--new-tokens", "1"], 2, "1 is not in the range x>=2"),
        (["--prompt-tokens", "0"], 2, "0 is not in the range x>=1"),
        (
            ["--context", "543"],
            2,
            "--context 543 has no room for 512 prompt tokens and 32 new ones: give --context 544 or more, or fewer "
            "--prompt-tokens or --new-tokens",
        ),
        (
            [],
            1,
            "512 prompt tokens and 32 new ones were asked for and the model was made for 512 tokens: give "
            "--prompt-tokens 480 or fewer",
        ),
        (["--context", "600"], 1, "the model was made for 512 tokens: give --prompt-tokens 480 or fewer"),
        (["--context", "600", "--prompt-tokens", "8"], 1, "the model was made for 512: give --context 512 or less"),
        (["--new-tokens", "600"], 1, "give --prompt-tokens and --new-tokens of 512 together"),
        (
            ["--ram", "1.2MiB", "--prompt-tokens", "400"],
            1,
            "Try --context 256 (needs 1021.1 KiB). That context takes --prompt-tokens 224 or fewer.",
        ),
    ],
)
def test_what_bench_refuses(arguments: list[str], code: int, expected: str, tiny: Path) -> None:
    result = tq_stream("bench", tiny, "--device", "cpu", *arguments)
    assert result.exit_code == code
    assert expected in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_bench_of_no_model() -> None:
    result = tq_stream("bench", "./absent")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "absent" in result.stderr


def test_a_file_cut_short_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamer.errors import TruncatedShardError

    def read_part(self: Checkpoint, name: str, *arguments: Any, **options: Any) -> None:
        raise TruncatedShardError("the file ends early.\n  Download the file again.", path=self.folder)

    monkeypatch.setattr(Checkpoint, "read_part", read_part)
    result = tq_stream("bench", tiny, "--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: the file ends early.\n  Download the file again.\n" in result.stderr


def test_defaults_are_those_of_the_engine() -> None:
    arguments = inspect.signature(StreamingEngine).parameters
    command = main.commands["bench"]
    shared = [option for option in command.params if option.name in arguments and option.name != "model"]
    with command.make_context("bench", ["m"]) as context:
        found = context.params
    assert {option.name for option in shared} == set(arguments) - {"model", "on_note"}
    for option in shared:
        assert found[option.name] == arguments[option.name].default, option.name


# ----------------------------------------------------------------------------------------- what a GPU and a plan add


def figures(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cuda:0",
        "device_name": "GPU X",
        "prompt_tokens": 512,
        "new_tokens": 3,
        "assembly_s": 1.0,
        "cold_first_token_s": 4.0,
        "first_token_s": 0.5,
        "tokens_per_s": 1.9,
        "tokens_per_s_p20": 1.8,
        "tokens_per_s_p80": 2.0,
        "step_s": [0.5, 0.5],
        "streamed_bytes": 26 * 10**9,
        "staged_bytes": 0,
        "layers_resident": 0,
        "num_layers": 48,
        "codec": "raw",
        "coded_share": 1.0,
        "kv_bits": (3, 3),
        "kv_layer_bits": "",
        "kv_decay": "off",
        "limit_tokens_per_s": 2.0,
        "share_of_limit": 0.95,
        "bound_by": "link",
        "device_peak_bytes": 5 << 30,
        "predicted_device_bytes": 6 << 30,
        "host_peak_bytes": None,
        "predicted_host_bytes": 0,
    } | changes


def test_a_streamed_run() -> None:
    assert bench._described(figures()).splitlines() == [
        "prompt of 512 tokens, 3 new ones, on GPU X; KV cache of 3-bit keys and 3-bit values",
        "  first token       0.50 s, median of 3 (1024 prompt tok/s)",
        "  first generation  4.00 s to its first token, 1.00 s before it",
        "  decode            1.90 tok/s, median of 2 tokens (p20 1.80, p80 2.00)",
        "  bytes per pass    26.00 GB over the link; 0 of 48 layers stay on the GPU",
        "  limit             2.00 tok/s; 95.0 % of it achieved",
        "  bound by          the link to the GPU",
        "  GPU memory        peak 5.0 GiB, predicted 6.0 GiB",
    ]


def test_a_decaying_cache_is_named() -> None:
    head = bench._described(figures(kv_decay="4096:3,32768:2")).splitlines()[0]
    assert head.endswith("3-bit values, 3 bits beyond 4096 tokens, 2 bits beyond 32768 tokens")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"staged_bytes": 10**10}, "26.00 GB over the link, 10.00 GB of them from the files; 0 of 48 layers stay"),
        ({"bound_by": "reader"}, "bound by          reading the files"),
        ({"bound_by": "computing"}, "bound by          computation on the GPU, or starting it"),
        ({"streamed_bytes": 0}, "bytes per pass    nothing streams: all layers stay on the GPU"),
        ({"codec": "lossless", "coded_share": 0.7}, "stay on the GPU, coded to 70.0 % of their bytes"),
    ],
)
def test_what_a_plan_changes(changes: dict[str, Any], expected: str) -> None:
    assert expected in bench._described(figures(**changes))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (None, ""),
        (0.0, "from the page cache"),
        (0.5, "50 % from the disk, the rest from the page cache"),
        (1.0, "from the disk"),
    ],
)
def test_where_files_came_from(share: float | None, expected: str) -> None:
    assert bench._origin(rates.FileRate(1.0, share)) == expected


def test_the_rates_of_a_gpu() -> None:
    file = rates.FileRate(7.3e9, None)
    machine = rates.MachineRates(54.6e9, 8.3e9, 6.5e9, 37e9, 16, file, file, 8)
    assert bench._described_rates(machine).splitlines()[1:3] == [
        "  host to GPU, page-locked memory                  54.60",
        "  host to GPU, pageable memory                      8.30",
    ]


@pytest.mark.gpu
def test_bench_of_a_streamed_model(tiny: Path) -> None:
    arguments = ("--resident", "0", "--prompt-tokens", "64", "--new-tokens", "8", "--json")
    result = tq_stream("bench", tiny, *arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["streamed_bytes"] > 0
    limit = found["rates"]["pinned_link_bytes_per_s"] / found["streamed_bytes"]
    assert found["limit_tokens_per_s"] == pytest.approx(limit)
    assert found["rates"]["pageable_link_bytes_per_s"] < found["rates"]["pinned_link_bytes_per_s"]
    assert found["device_peak_bytes"] > 0
