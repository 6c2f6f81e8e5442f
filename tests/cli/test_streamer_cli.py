"""Every command through click's runner: what goes to which stream, exit statuses, messages; no process is started."""

import inspect
import json
import os
import re
import select
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import streamer.checkpoint
from make_checkpoint import SHAPES, write_checkpoint
from streamer import StreamingEngine
from streamer.cli import main
from streamer.cli.group import as_click_error
from streamer.cli.screen import Screen
from streamer.cli.summary import RunSummary, summarize
from streamer.engine import plan_report
from streamer.errors import OptionError
from streamer.forecast import Lever
from streamer.options import parse_size
from streamer.report import MemoryReport
from streamer.stats import READING_PROMPT, RunStats

PROMPT = "The tide rises, the tide falls"  # 30 tokens: the tokenizer's are bytes
SUMMARY = re.compile(
    r"prompt 30 tokens in [\d.]+ s, [\d.]+ tok/s \| answer 5 tokens, [\d.]+ tok/s \| peak memory [\d.]+ [MG]iB "
    r"\| KV cache [\d.]+ KiB\n"
)


def tq_stream(*arguments: str | Path, input: str | bytes | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=input, env=env)


def run_tiny(tiny: Path, *arguments: str | Path, **options: Any) -> Result:
    settings = ("--device", "cpu", "--max-new-tokens", "5", "--temperature", "0")
    return tq_stream("run", tiny, *settings, *arguments, **options)


# ------------------------------------------------------------------- wrong usage, before anything heavy is imported


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run'?"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "m", "p", "--tempurature", "1"], "No such option '--tempurature'. Did you mean '--temperature'?"),
        (["run", "m", "p", "--bits", "5"], "'5' is not one of '2', '2.5', '3', '3.5', '4', '16'"),
        (["run", "m", "p", "--vram", "12"], "'12' is not a size: write a number and a unit, as in 8GiB"),
        (["run", "m", "p", "--dtype", "int8"], "'int8' is not a dtype to compute in"),
        (["run", "m", "p", "--protected-layers", "0,x"], "'0,x' is not a list of layers: write numbers with commas"),
        (["run", "m", "p", "--context", "0"], "0 is not in the range x>=1"),
        (["run", "m", "p", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
        (["run", "m", "p", "--top-p", "0"], "0.0 is not in the range 0<x<=1"),
        (["run", "m", "p", "--resident", "-1"], "-1 is not in the range x>=0"),
        (["run", "m", "p", "--prompt-file", "absent.txt"], "File 'absent.txt' does not exist"),
        (["run", "m", "p", "--prompt-file", __file__], "a prompt was given twice"),
        (["run", "m", "  "], "the prompt from the argument is empty"),
        (["run", "m"], "the prompt from standard input is empty"),
        (["memory-report"], "Missing argument 'MODEL'"),
        (["memory-report", "m", "--vram", "lots"], "'lots' is not a size"),
        *(
            (
                ["memory-report", "m", "--link-gbps", rate],
                f"'{rate}' is not the rate of a link: write GB/s from 0.01 to",
            )
            for rate in ("0", "0.009", "10001", "1e300", "inf", "nan", "fast")
        ),
        (["doctor", "--jsn"], "No such option '--jsn'. Did you mean '--json'?"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_to_type(arguments: list[str], expected: str) -> None:
    result = tq_stream(*arguments)
    assert result.exit_code == 2
    assert expected in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (
            ["run", "m", "p", "--vram", "8GiB"],
            {},
            "--vram is for a GPU, and this command would use the CPU: leave it out",
        ),
        (["run", "m", "p", "--vram", "8GiB"], {}, "; --ram limits host memory"),
        (["run", "m", "p", "--direct-io"], {}, "--direct-io is for a GPU"),
        (["run", "m", "p", "--no-direct-io"], {}, "--no-direct-io is for a GPU"),
        (["run", "m", "p"], {"TQ_STREAM_VRAM": "8GiB"}, "TQ_STREAM_VRAM is for a GPU"),
        (["run", "m", "p"], {"TQ_STREAM_DIRECT_IO": "0"}, "TQ_STREAM_DIRECT_IO is for a GPU"),
        (
            ["run", "m", "p", "--resident", "0"],
            {"TQ_STREAM_VRAM": "1GiB"},
            "TQ_STREAM_VRAM and --resident are for a GPU",
        ),
        (
            ["bench", "m", "--resident", "0"],
            {},
            "--resident is for a GPU, and this command would use the CPU: leave it",
        ),
        (
            ["memory-report", "m", "--vram", "8GiB", "--measure"],
            {},
            "--vram is for a GPU, and this command would use the CPU: leave it out, or leave out --measure for",
        ),
        (
            ["memory-report", "m", "--link-gbps", "25"],
            {},
            "--link-gbps is for a GPU, and this command would use the CPU",
        ),
        (
            ["memory-report", "m", "--direct-io"],
            {},
            "leave it out, or give --vram SIZE, without --device cpu, for a report",
        ),
    ],
)
@pytest.mark.parametrize("device", [[], ["--device", "cpu:0"]], ids=["no GPU", "cpu"])
def test_options_for_a_gpu_are_named_as_they_were_given(
    arguments: list[str], variables: dict[str, str], device: list[str], expected: str
) -> None:
    if "--measure" in expected and device:
        expected = "give --vram SIZE, without --device cpu, for a report on a GPU that is not here"
    result = tq_stream(*arguments, *device, env=variables)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_environment_gives_defaults_to_every_command() -> None:
    for command in (["run", "m", "p"], ["memory-report", "m"]):
        result = tq_stream(*command, env={"TQ_STREAM_BITS": "7"})
        assert (result.exit_code, "'7' is not one of" in result.stderr) == (2, True)


def test_prompt_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"abc\xff")
    result = tq_stream("run", "m", "--prompt-file", tmp_path / "p")
    assert result.exit_code == 2
    assert "is not UTF-8 text (byte 3): convert it first" in result.stderr


@pytest.mark.parametrize("command", ["run", "memory-report"])
def test_defaults_are_those_of_the_engine(command: str) -> None:
    arguments = inspect.signature(StreamingEngine).parameters
    shared = [option for option in main.commands[command].params if option.name in arguments and option.name != "model"]
    with main.commands[command].make_context(command, ["m"]) as context:
        found = context.params
    assert {option.name for option in shared} == set(arguments) - {"model", "on_note"}
    for option in shared:
        assert found[option.name] == arguments[option.name].default, option.name


# ------------------------------------------------------------------------------------------------------------- run


def test_run_streams_the_answer_to_stdout_and_ends_with_the_figures(tiny: Path) -> None:
    result = run_tiny(tiny, PROMPT)
    with StreamingEngine(tiny, device="cpu") as engine:
        expected = engine.generate(PROMPT, max_new_tokens=5, temperature=0)
    assert result.exit_code == 0
    assert result.stdout == expected + "\n"
    assert SUMMARY.fullmatch(result.stderr)


def test_run_of_one_token_has_no_rate_of_decoding(tiny: Path) -> None:
    result = run_tiny(tiny, PROMPT, "--max-new-tokens", "1")
    assert re.search(r"tok/s \| answer 1 token \| peak memory", result.stderr)
    assert len(result.stderr.splitlines()) == 1


SUMMARY_7B = RunSummary(
    prompt_tokens=512,
    new_tokens=64,
    prefill_s=0.25,
    decode_s=15.0,
    prefill_tokens_per_s=2048.0,
    decode_tokens_per_s=4.2,
    link_bytes=900 * 10**9,
    peak_device_bytes=5 << 29,
    peak_host_bytes=1 << 30,
    kv_cache_bytes=98 << 20,
    passes=64,
    decode_link_bytes=816 * 10**9,
    link_bytes_per_s=54.9e9,
    link_share=0.991,
    bound_by="link",
    next_lever="--vram 8GiB",
    next_lever_effect="keeps 12 of 28 layers on the GPU",
    next_lever_tokens_per_s=7.56,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "next: --vram 8GiB keeps 12 of 28 layers on the GPU: about 7.6 tok/s"),
        (
            {
                "bound_by": "reader",
                "reader_bytes_per_s": 23e9,
                "next_lever": "--ram 20GiB",
                "next_lever_effect": "keeps the streamed weights in memory",
                "next_lever_tokens_per_s": 4.2,
            },
            "bound by reading the files (23.0 GB/s): --ram 20GiB keeps the streamed weights in memory: about 4.2 tok/s",
        ),
        (
            {"bound_by": "launches", "layer_s": 0.7e-3, "next_lever": None, "next_lever_effect": "nothing streams"},
            "bound by launching kernels (0.7 ms a layer on the host): nothing streams",
        ),
        (
            {"next_lever": None, "next_lever_effect": "no single option gains 5 % or more"},
            "bound by the link: no single option gains 5 % or more",
        ),
        (
            {"bound_by": "computing", "next_lever": None, "next_lever_effect": "moving fewer bytes gains nothing"},
            "bound by computing: moving fewer bytes gains nothing",
        ),
    ],
    ids=["link", "reader", "launches", "no lever", "computing"],
)
def test_closing_line_on_a_gpu_says_how_close_it_came_and_what_gains_most(
    changes: dict[str, Any], expected: str
) -> None:
    first, second = replace(SUMMARY_7B, **changes).line().splitlines()
    assert first == (
        "prompt 512 tokens in 0.25 s, 2048.0 tok/s | answer 64 tokens, 4.20 tok/s | "
        "link 54.4 GB/s, 99 % of the 54.9 measured | peak GPU memory 2.5 GiB | KV cache 98.0 MiB"
    )
    assert second == expected


def test_closing_line_leaves_out_what_was_not_measured() -> None:
    unknown = {"link_bytes_per_s": None, "link_share": None, "bound_by": None}
    assert "| link 54.4 GB/s | peak" in replace(SUMMARY_7B, **unknown).line()
    assert len(replace(SUMMARY_7B, **unknown).line().splitlines()) == 1
    resident = replace(SUMMARY_7B, **unknown, decode_link_bytes=0)
    assert "link" not in resident.line()
    nothing = replace(resident, new_tokens=0, prefill_s=0.0, decode_s=0.0, decode_tokens_per_s=0.0)
    assert nothing.line() == "prompt 512 tokens | answer 0 tokens | peak GPU memory 2.5 GiB | KV cache 98.0 MiB"


class FakeGpu:
    """An engine whose last generation ran on a GPU: 2 passes of 1 GB in 4 s over a link of 0.6 GB/s."""

    link_bytes_per_s = 0.6e9

    def __init__(self, report: MemoryReport):
        self.stats = RunStats(num_layers=3)
        self.stats.start(30)
        self.stats.new_tokens, self.stats.prefill_s, self.stats.decode_s = 3, 0.5, 4.0
        self.stats.bytes_moved, self.stats.decode_bytes = 4 * 10**9, 2 * 10**9
        self._report = report

    def memory_report(self) -> MemoryReport:
        return self._report


def test_figures_of_a_run_come_from_the_decode_alone(tiny: Path) -> None:
    report = plan_report(tiny, vram="4GiB", ram="4GiB", resident=0, link_bytes_per_s=0.6e9)
    assert report.device_peak is not None
    report = replace(report, device_peak=replace(report.device_peak, measured_bytes=123), reader_bytes_per_s=0.1e9)
    lever = Lever("reader", "--ram 8GiB", "keeps the streamed weights in memory", 0.6)
    found = summarize(FakeGpu(replace(report, lever=lever)))  # type: ignore[arg-type]  # what summarize asks of one
    assert found.link_share == pytest.approx(2 / 4 / 0.6)
    assert (found.link_bytes, found.decode_link_bytes, found.peak_device_bytes) == (4 * 10**9, 2 * 10**9, 123)
    assert found.decode_tokens_per_s == pytest.approx(0.5)
    assert (found.bound_by, found.next_lever, found.next_lever_tokens_per_s) == ("reader", "--ram 8GiB", 0.6)
    assert found.line().splitlines()[1].startswith("bound by reading the files (0.1 GB/s): --ram 8GiB keeps")
    assert found.as_dict()["next_lever_effect"] == "keeps the streamed weights in memory"


def test_run_reads_the_prompt_from_a_file_or_standard_input(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(PROMPT.encode() + b"\r\n")
    expected = run_tiny(tiny, PROMPT).stdout
    assert run_tiny(tiny, "--prompt-file", tmp_path / "prompt.txt").stdout == expected
    assert run_tiny(tiny, input=PROMPT + "\n").stdout == expected


@pytest.mark.parametrize("given", ["argument", "file"])
def test_text_on_standard_input_goes_before_the_prompt(given: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = [PROMPT] if given == "argument" else ["--prompt-file", str(tmp_path / "prompt.txt")]
    both = run_tiny(tiny, *arguments, input="a line\nand another\n")
    assert both.stdout == run_tiny(tiny, f"a line\nand another\n\n{PROMPT}").stdout
    assert both.stdout != run_tiny(tiny, *arguments).stdout
    assert run_tiny(tiny, *arguments, input=" \n\n").stdout == run_tiny(tiny, PROMPT).stdout
    refused = run_tiny(tiny, *arguments, input=b"abc\xff")
    assert (refused.exit_code, "standard input is not UTF-8 text" in refused.stderr) == (2, True)


def test_run_json_is_one_object_with_the_figures_of_the_run(tiny: Path) -> None:
    result = run_tiny(tiny, PROMPT, "--json", "--context", "34", env={"TQ_STREAM_MAX_NEW_TOKENS": "100"})
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert set(found) == {
        *("model", "text", "interrupted", "notes", "prompt_tokens", "new_tokens", "passes", "prefill_s", "decode_s"),
        *("prefill_tokens_per_s", "decode_tokens_per_s", "link_bytes", "peak_device_bytes", "peak_host_bytes"),
        *("kv_cache_bytes", "decode_link_bytes", "link_bytes_per_s", "link_share", "reader_bytes_per_s", "layer_s"),
        *("bound_by", "next_lever", "next_lever_effect", "next_lever_tokens_per_s"),
    }
    assert (found["model"], found["prompt_tokens"], found["new_tokens"], found["passes"]) == (str(tiny), 30, 4, 4)
    assert found["text"] == run_tiny(tiny, PROMPT, "--context", "34").stdout.removesuffix("\n")
    assert found["interrupted"] is False
    assert found["notes"] == ["answer limited to 4 tokens: --context is 34"]
    assert found["prefill_tokens_per_s"] == pytest.approx(30 / found["prefill_s"])
    assert (found["link_bytes"], found["decode_link_bytes"], found["peak_device_bytes"]) == (0, 0, None)
    for name in ("link_bytes_per_s", "link_share", "reader_bytes_per_s", "layer_s", "bound_by", "next_lever"):
        assert found[name] is None, name  # of a GPU; on the CPU nothing streams
    # 3 layers, keys and values, 2 heads of 16 in float32: 768 bytes a token; at least the 33 tokens that were read,
    # at most the 4 sinks and 191 newest that a compressed cache keeps as they are, and small tables
    assert 33 * 768 <= found["kv_cache_bytes"] <= 197 * 768
    assert found["peak_host_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    assert result.stderr == "answer limited to 4 tokens: --context is 34\n" + result.stderr.splitlines()[-1] + "\n"


def test_environment_variable_sets_an_option_and_the_command_line_goes_before_it(tiny: Path) -> None:
    environment = {"TQ_STREAM_MAX_NEW_TOKENS": "3", "TQ_STREAM_DEVICE": "cpu"}
    answer = json.loads(tq_stream("run", tiny, "--json", PROMPT, env=environment).stdout)
    assert answer["new_tokens"] == 3
    answer = json.loads(tq_stream("run", tiny, "--json", PROMPT, "--max-new-tokens", "2", env=environment).stdout)
    assert answer["new_tokens"] == 2


def test_progress_of_the_prompt_goes_layer_by_layer(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(Screen, "advance", lambda self, what, share: shares.append(share))
    run_tiny(tiny, PROMPT, "--max-new-tokens", "1")
    assert {1 / 3, 2 / 3, 1.0} <= set(shares)
    assert shares == sorted(shares)


def test_seed_repeats_a_drawn_answer(tiny: Path) -> None:
    def draw(seed: str) -> str:
        return run_tiny(tiny, PROMPT, "--temperature", "1.5", "--max-new-tokens", "20", "--seed", seed).stdout

    assert draw("1") == draw("1") != draw("2")


def test_no_chat_template_gives_the_bare_prompt(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    answers = [
        json.loads(run_tiny(tmp_path / "chat", PROMPT, "--json", *more).stdout) for more in ([], ["--no-chat-template"])
    ]
    assert [answer["prompt_tokens"] for answer in answers] == [32, 30]


@pytest.mark.parametrize("bits", ["2", "16"])
def test_bits_reach_the_cache(tiny: Path, bits: str) -> None:
    prompt = "x" * 400  # the newest tokens stay uncompressed: the rest must be most of it
    sizes = [
        json.loads(run_tiny(tiny, prompt, "--json", *more).stdout)["kv_cache_bytes"] for more in ([], ["--bits", bits])
    ]
    assert (sizes[1] > sizes[0]) == (bits == "16")


def test_a_decaying_cache_holds_what_the_report_predicts(tiny: Path) -> None:
    """The prompt is coded at once and ages at once; then tokens come one by one."""

    def held(*more: str) -> tuple[int, int]:
        options = ("--device", "cpu", "--measure", "--context", "480", "--json")
        found = json.loads(tq_stream("memory-report", tiny, *options, *more).stdout)
        row = next(row for row in found["rows"] if row["name"] == "KV cache")
        return row["predicted_bytes"], row["measured_bytes"]

    assert held("--decay", "auto") == held(), "there is room"
    predicted, measured = held("--decay", "150:3,280:2", "--layer-bits", "1:3/2")
    assert predicted == measured < held("--layer-bits", "1:3/2")[1] < held()[1]


def test_a_run_that_would_not_fit_ages_and_says_so(tiny: Path) -> None:
    """A byte less than all bits need; the plan for more context than the call needs is no reason to age."""
    ids = list(range(1, 101)) * 4
    notes: list[str] = []
    needed = {}
    for planned in (480, 512):  # 512 is what the model was made for
        with StreamingEngine(tiny, device="cpu", dtype="float32", context=planned, on_note=notes.append) as engine:
            needed[planned] = sum(row.predicted_bytes for row in engine.memory_report().rows if row.where == "host")
    for ram, context in ((needed[480] - 1, 480), (needed[512] - 1, None), (needed[480], 480)):
        notes.clear()
        options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "decay": "auto", "ram": ram}
        with StreamingEngine(tiny, context=context, on_note=notes.append, **options) as engine:
            engine.generate_ids(ids, max_new_tokens=3)
            assert engine.plan is not None
            decay = engine.plan.request.cache.decay
            (kv,) = (row for row in engine.memory_report().rows if row.name == "KV cache")
        assert kv.measured_bytes == kv.predicted_bytes
        aged = [note for note in notes if "older tokens keep fewer" in note]
        if ram < needed[480]:
            assert aged == [f"the KV cache does not fit with all its bits: older tokens keep fewer (--decay {decay})"]
        else:
            assert (decay, aged) == ("off", [])


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (
            ["--ram", "1KiB"],
            1,
            r"Error: the run needs .* host memory, beside Python and its libraries, and 1.0 KiB may",
        ),
        (["--context", "10"], 1, r"Error: the prompt has 30 tokens and --context is 10: shorten it or raise --context"),
        (
            ["--context", "513"],
            1,
            r"Error: .* 513 tokens was asked for and the model was made for 512: give --context 512",
        ),
        (["--device", "tpu"], 2, r"Error: .*tpu.* (is not a device|cannot be used): write cuda, cuda:1 or cpu"),
        (["--device", "cuda"], 2, r"Error: device 'cuda' was asked for and 0 CUDA devices were found"),
        (["--top-k", "3"], 2, r"Error: top_p and top_k have no effect at temperature 0"),
        (["--protected-layers", "7"], 2, r"Error: protected layer 7 does not exist: the model has 3 layers"),
    ],
)
def test_what_cannot_be_honoured_is_one_message(tiny: Path, arguments: list[str], status: int, expected: str) -> None:
    result = run_tiny(tiny, PROMPT, *arguments)
    assert result.exit_code == status
    assert re.match(expected, result.stderr, re.DOTALL)
    assert result.stdout == ""


def test_prompt_longer_than_the_model_s_context(tiny: Path) -> None:
    result = run_tiny(tiny, "x" * 600)
    assert result.exit_code == 1
    assert result.stderr == "Error: the prompt has 600 tokens and its context is 512: shorten it\n"


def test_unwritable_cache_does_not_matter_to_a_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_tiny(tiny, PROMPT, env={"TQ_STREAM_CACHE": str(tmp_path / "file" / "cache")})
    assert (result.exit_code, result.stdout) == (0, run_tiny(tiny, PROMPT).stdout)


# ------------------------------------------------------------------------------------------------ faulty checkpoints


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def name_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors") | {
        "lm_head.weight": "b.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate_shard(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def lie_in_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].replace(b'"shape":[128,64]', b'"shape":[129,64]')
    (folder / "model.safetensors").write_bytes(content[:8] + header + content[8 + length :])


def endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def drop_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__(NAME))


def reshape_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(95, 64)}))


def retype_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(96, 64, dtype=torch.int8)}))


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_config, "config.json missing"),
        (damage_config, "config.json"),
        (empty_folder, "config.json, *.safetensors missing (it holds nothing)"),
        (name_missing_shard, "b.safetensors"),
        (truncate_shard, "has 100000 bytes, and tensor"),
        (lie_in_header, "of shape [129, 64] takes"),
        (endless_header, "model.safetensors"),
        (drop_tensor, NAME),
        (reshape_tensor, NAME),
        (retype_tensor, NAME),
        (drop_tokenizer, "has no tokenizer that can be used"),
    ],
)
def test_faulty_checkpoint_is_one_message_that_names_the_culprit(
    tiny: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    damage(tmp_path / "model")
    result = run_tiny(tmp_path / "model", PROMPT)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("/absent/folder", "Error: no folder /absent/folder: check the path"),
        ("absent-org/absent-model", "Error: model absent-org/absent-model not found.\n  Looked in: folder "),
        ("absent-model", "Error: model absent-model not found."),
    ],
)
def test_absent_model(model: str, expected: str) -> None:
    for command in (["run", model, PROMPT], ["memory-report", model, "--vram", "8GiB"]):
        result = tq_stream(*command, "--offline")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(expected)


def test_several_matches_are_listed_and_exit_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for organisation in ("one", "two"):
        repository = tmp_path / "hub" / f"models--{organisation}--tiny"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (snapshot / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    result = tq_stream("run", "tiny", PROMPT)
    assert result.exit_code == 2
    assert "Error: tiny fits 2 models in the Hugging Face cache: one/tiny, two/tiny." in result.stderr


# ------------------------------------------------------------------------------------- interruptions and other errors


def interrupted(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def generate_ids(self: StreamingEngine, ids: list[int], *, on_text: Callable[[str], None], **options: Any) -> str:
        self.stats.start(len(ids))
        for piece in ("The ", "tide"):
            self.stats.on_token()
            on_text(piece)
        raise error

    monkeypatch.setattr(StreamingEngine, "generate_ids", generate_ids)


def test_interrupted_answer_is_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, KeyboardInterrupt())
    result = run_tiny(tiny, PROMPT)
    assert (result.exit_code, result.stdout) == (130, "The tide\n")
    assert result.stderr == "Interrupted after 2 new tokens.\n"
    result = run_tiny(tiny, PROMPT, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["text"], found["interrupted"], found["new_tokens"]) == (130, "The tide", True, 2)


def test_error_in_an_answer_comes_on_a_line_of_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, OSError(28, "No space left on device", "/swap"))
    result = run_tiny(tiny, PROMPT)
    assert (result.exit_code, result.stdout) == (1, "The tide\n")
    assert result.stderr == "Error: /swap: No space left on device\n"


def test_closed_standard_output_ends_quietly(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, BrokenPipeError(32, "Broken pipe"))
    stdout = sys.stdout
    try:
        result = run_tiny(tiny, PROMPT)
    finally:
        sys.stdout = stdout
    assert (result.exit_code, result.stderr) == (1, "")


def test_gpu_out_of_memory_says_what_to_lower() -> None:
    known = as_click_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert known is not None
    assert known.exit_code == 1
    assert "(CUDA out of memory. Tried to allocate 2 GiB.)" in known.message
    assert "give a smaller --vram or --context" in known.message


def test_a_bug_keeps_its_traceback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = ZeroDivisionError("a bug")
    interrupted(monkeypatch, bug)
    result = run_tiny(tiny, PROMPT)
    assert (result.exit_code, result.exception) == (1, bug)


# -------------------------------------------------------------------------------------------------------- the screen


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Within this, standard error is a terminal; gives a function that returns what was written to it."""
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    os.set_blocking(reader, False)  # nothing written must fail the test, not stop it
    with (
        monkeypatch.context() as patch,
        os.fdopen(writer, "w") as stream,
        os.fdopen(reader, "rb", buffering=0) as source,
    ):
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr("sys.stderr", stream)

        def written() -> str:
            stream.flush()
            read = b""
            while select.select([source], [], [], 0.5)[0]:  # a terminal passes on what is written a little later
                read += source.read(1 << 16) or b""
            return read.decode()

        yield written


def test_the_bar_shows_on_a_terminal_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with Screen(shows_progress=True) as screen:
            screen.advance(READING_PROMPT, 0.5)
            screen.end_progress()
            screen.advance(READING_PROMPT, 1.0)  # what comes late must not bring it back
            screen.line("a note")
        text = written()
    assert "reading the prompt" in text
    assert "50 %" in text
    assert "100 %" not in text
    assert text.rindex("\x1b[2K") > text.rindex("reading the prompt")  # the line is erased
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert text.endswith("a note\r\n")


def test_each_kind_of_work_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with Screen(shows_progress=True) as screen:
            screen.advance("packing", 0.75)
            screen.advance("packing", 1.0)
            screen.line("packed")
            screen.advance("unpacking", 0.5)
            screen.advance(READING_PROMPT, 0.25)
        text = written()
    assert (
        text.index("75 %") < text.index("packed") < text.index("50 %") < text.index(READING_PROMPT) < text.index("25 %")
    )
    assert "packing" not in text[text.index("packed") : text.index("unpacking")]
    assert "packing" not in text[text.index(READING_PROMPT) :]


def test_no_bar_when_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with Screen(shows_progress=False) as screen:
            screen.advance(READING_PROMPT, 0.5)
            screen.line("[a] note")
        assert written() == "[a] note\r\n"


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(shows_progress=True) as screen:
        screen.advance(READING_PROMPT, 0.5)
        screen.line("a note " + "that is long " * 20)
    assert capsys.readouterr().err == "a note " + "that is long " * 20 + "\n"


# ----------------------------------------------------------------------------------------------------- memory-report


@pytest.fixture(scope="session")
def headers_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headers") / "llama-70b"
    write_checkpoint(SHAPES["llama-70b"], folder, headers_only=True)
    return folder


def test_report_of_70b_for_a_gpu_that_is_not_here_from_headers_in_seconds(
    headers_70b: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: object) -> None:
        raise AssertionError("the bytes of a tensor were read")

    tq_stream("memory-report", tiny, "--vram", "8GiB")  # transformers imports the classes of a family when first used
    monkeypatch.setattr(streamer.checkpoint.Checkpoint, "tensor", read)
    monkeypatch.setattr(streamer.checkpoint.Checkpoint, "read_part", read)
    start = time.process_time()
    result = tq_stream("memory-report", headers_70b, "--vram", "24GiB", "--ram", "64GiB", "--bits", "3", "--json")
    taken_s = time.process_time() - start
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert taken_s < 4
    on_device = [row["predicted_bytes"] for row in found["rows"] if row["where"] == "device"]
    assert sum(on_device) == found["device_peak"]["predicted_bytes"]
    assert parse_size("22GiB") < sum(on_device) <= parse_size("24GiB")
    assert found["num_layers"] == 80
    # bf16 weights but for the table and those that stay: what crosses the link is most of 141 GB
    assert 100e9 < found["streamed_bytes"] < 130e9
    assert found["peak_host_bytes"] is None
    assert "of streamed weights stay within the 64.0 GiB that may be used" in found["notes"][0]
    assert result.stderr.strip() == found["notes"][0]


def test_report_options_change_the_plan(headers_70b: Path) -> None:
    def report(*more: str) -> dict[str, Any]:
        result = tq_stream("memory-report", headers_70b, "--vram", "24GiB", "--json", *more)
        found: dict[str, Any] = json.loads(result.stdout)
        found["kv"] = next(row["predicted_bytes"] for row in found["rows"] if row["name"] == "KV cache")
        return found

    usual = report()
    changed = report("--key-bits", "2", "--value-bits", "3", "--resident", "0", "--prefill-chunk", "256")
    assert (usual["kv_bits"], changed["kv_bits"]) == ([4, 4], [2, 3])
    assert changed["kv"] < usual["kv"] < usual["uncompressed_kv_bytes"]
    assert (usual["kv_tokens"], usual["layers_resident"] > 0, changed["layers_resident"]) == (4096, True, 0)
    assert changed["prefill_chunk"] == 256
    between = report("--bits", "2.5", "--layer-bits", "0:4,-1:3")
    assert (between["kv_bits"], between["kv_layer_bits"], usual["kv_layer_bits"]) == ([3, 2], "0:4,-1:3", "")
    # 61 blocks: 78 layers without 3 of 6 planes of 128 coordinates in 8 heads, the first with all, the last without 2
    assert usual["kv"] - between["kv"] == 61 * (78 * 3 + 2) * 64 * 16 * 8
    decayed = report("--decay", "1024:3,2048:2")
    assert (usual["kv_decay"], decayed["kv_decay"]) == ("off", "1024:3,2048:2")
    # 4096 tokens: 14 blocks stay, 16 lose a plane of K and V of 128 in 8 heads and 80 layers, 31 lose two
    assert usual["kv"] - decayed["kv"] == (16 + 2 * 31) * 64 * 32 * 8 * 80


def test_report_table_fits_100_columns(headers_70b: Path) -> None:
    result = tq_stream("memory-report", headers_70b, "--vram", "24GiB", "--context", "8192")
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 100
    for part in ("ring of streamed weights", "KV cache for 8192 tokens", "of 80 layers stay on the GPU"):
        assert part in result.stdout


def test_report_predicts_from_a_given_link(headers_70b: Path) -> None:
    options = ("--vram", "24GiB", "--ram", "200GiB", "--link-gbps", "25")
    found = json.loads(tq_stream("memory-report", headers_70b, *options, "--json").stdout)
    assert found["link_bytes_per_s"] == 25e9
    assert found["first_token_s"] == pytest.approx(found["streamed_bytes"] / 25e9)
    assert found["forecast"]["tokens_per_s"] == pytest.approx(25e9 / found["streamed_bytes"])
    assert found["forecast"]["bound_by"] == "link"
    rows = {row["vram_bytes"] / 2**30: row for row in found["budgets"]}
    assert list(rows) == [6, 8, 12, 16, 24, 32, 48, 80]
    assert rows[24]["streamed_bytes"] == found["streamed_bytes"]
    for size in (8, 48):
        one = tq_stream("memory-report", headers_70b, *options, "--vram", f"{size}GiB", "--json")
        assert json.loads(one.stdout)["streamed_bytes"] == rows[size]["streamed_bytes"]
    table = tq_stream("memory-report", headers_70b, *options).stdout
    assert "over a link of 25.0 GB/s; a prompt's first token takes" in table
    shown = [line.split() for line in table.splitlines() if re.match(r" *\d+GiB ", line)]
    assert [float(words[-1]) for words in shown] == pytest.approx(
        [row["tokens_per_s"] for row in found["budgets"]], rel=0.06
    )
    assert max(len(line) for line in table.splitlines()) <= 100


def test_report_without_a_link_says_how_to_get_a_prediction(headers_70b: Path) -> None:
    table = tq_stream("memory-report", headers_70b, "--vram", "24GiB", "--ram", "200GiB").stdout
    assert "--link-gbps 25 predicts tok/s: PCIe 4.0 x16 reaches about 25, PCIe 5.0 x16 about 55" in table
    assert "tok/s at most" not in table
    found = json.loads(tq_stream("memory-report", headers_70b, "--vram", "24GiB", "--json").stdout)
    assert (found["link_bytes_per_s"], found["first_token_s"], found["budgets"]) == (None, None, [])
    assert found["forecast"]["tokens_per_s"] is None


def test_report_says_what_the_files_may_cost(headers_70b: Path) -> None:
    options = ("--vram", "80GiB", "--ram", "32GiB", "--link-gbps", "25", "--context", "1024")
    table = tq_stream("memory-report", headers_70b, *options).stdout
    found = json.loads(tq_stream("memory-report", headers_70b, *options, "--json").stdout)
    needed = found["staged_bytes"] * found["forecast"]["tokens_per_s"] / 1e9
    said = re.search(r"[\d.]+ GiB are read from the files in every pass: slower than ([\d.]+) GB/s, they", table)
    assert said is not None
    assert float(said[1]) == pytest.approx(needed, abs=0.06)
    assert "from the files per" in table  # the column
    rows = [line for line in table.splitlines() if re.match(r" *\d+GiB ", line)]
    assert len(rows) == len(found["budgets"]) > 3
    for line, row in zip(rows, found["budgets"], strict=True):
        assert ("if the files keep up" in line) == (row["staged_bytes"] > 0)
    assert max(len(line) for line in table.splitlines()) <= 100
    assert found["staged_bytes"] == found["budgets"][-1]["staged_bytes"] > 20e9
    assert found["forecast"]["tokens_per_s"] == pytest.approx(25e9 / found["streamed_bytes"])


def test_report_of_a_model_that_fits_needs_no_link(tiny: Path) -> None:
    for more in ([], ["--link-gbps", "25"]):
        table = tq_stream("memory-report", tiny, "--vram", "8GiB", *more).stdout
        assert "nothing streams: the link does not bound the speed" in table
        assert ("not bound by the link" in table) == bool(more)


@pytest.mark.parametrize("options", [("--vram", "8GiB"), ("--vram", "32GiB"), ("--vram", "8GiB", "--device", "cuda:1")])
def test_report_measures_the_link_of_the_gpu_that_it_is_for(
    options: tuple[str, ...], headers_70b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def link_rate(device: torch.device) -> float:
        asked.append(device)
        return 12e9

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 << 30, 24 << 30))
    monkeypatch.setattr("streamer.rates.link_rate", link_rate)
    found = json.loads(tq_stream("memory-report", headers_70b, *options, "--json").stdout)
    is_here = options == ("--vram", "8GiB")  # the others are larger than this machine's, or not there
    assert found["link_bytes_per_s"] == (12e9 if is_here else None)
    assert asked == ([torch.device("cuda")] if is_here else [])
    given = json.loads(tq_stream("memory-report", headers_70b, *options, "--link-gbps", "3", "--json").stdout)
    assert given["link_bytes_per_s"] == 3e9
    assert len(asked) == is_here


def test_report_goes_on_when_the_link_cannot_be_measured(headers_70b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link_rate(device: torch.device) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 << 30, 24 << 30))
    monkeypatch.setattr("streamer.rates.link_rate", link_rate)
    result = tq_stream("memory-report", headers_70b, "--vram", "8GiB")
    assert (result.exit_code, "--link-gbps 25 predicts" in result.stdout) == (0, True)


def test_the_budgets_of_the_readme(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    shown = next(block for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if "tok/s at most" in block)
    write_checkpoint(SHAPES["qwen2.5-14b"], tmp_path / "14b", headers_only=True)
    options = ("--vram", "24GiB", "--context", "32768", "--bits", "3", "--ram", "64GiB", "--link-gbps", "25")
    made = [line.strip() for line in tq_stream("memory-report", tmp_path / "14b", *options).stdout.splitlines()]
    wanted = [line.strip() for line in shown.splitlines() if line.strip()]
    assert len(wanted) >= 9
    assert [line for line in made if line in wanted] == wanted


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (
            ["--vram", "600MB"],
            1,
            r"Error: the run needs [\d.]+ GiB of GPU memory and 572.2 MiB may be used\.\n.*  Try ",
        ),
        (
            ["--vram", "5GiB", "--context", "8192", "--bits", "16"],
            1,
            r"Error: the run needs .* Try --bits 4 \(needs .* or --context \d+ \(needs",
        ),
        (
            ["--vram", "24GiB", "--context", "9000"],
            1,
            r"Error: a context of 9000 tokens was asked for and the model was made for 8192: give --context 8192 or",
        ),
        (["--vram", "24GiB", "--resident", "81"], 2, r"Error: --resident 81 was asked for and the model has 80 layers"),
        (["--vram", "24GiB", "--protected-layers", "80"], 2, r"Error: protected layer 80 does not exist"),
        (["--vram", "24GiB", "--layer-bits", "80:3"], 2, r"Error: layer 80 does not exist: the model has 80 layers"),
        (["--vram", "24GiB", "--layer-bits", "3"], 2, r"Error: '3' does not say bits of layers: write LAYER:BITS"),
        (["--vram", "24GiB", "--decay", "8k"], 2, r"Error: '8k' is not a decay: write AGE:BITS"),
        (
            ["--vram", "24GiB", "--bits", "2", "--decay", "512:2"],
            2,
            r"Error: a decay to 2 bits takes nothing from this",
        ),
        (["--device", "cpu", "--ram", "1MiB"], 1, r"Error: the run needs .* host memory, .*, and 1.0 MiB may be used"),
        (["--device", "cpu", "--measure", "--context", "1"], 2, r"Usage: .*--measure needs room for a prompt"),
    ],
)
def test_report_that_cannot_be_made(headers_70b: Path, arguments: list[str], status: int, expected: str) -> None:
    result = tq_stream("memory-report", headers_70b, *arguments)
    assert result.exit_code == status
    assert re.match(expected, result.stderr, re.DOTALL)
    assert result.stdout == ""


def test_report_for_the_processor(tiny: Path) -> None:
    result = tq_stream("memory-report", tiny, "--device", "cpu", "--context", "100")
    assert result.exit_code == 0
    assert "weights read from the files' maps" in result.stdout
    assert "KV cache for 100 tokens" in result.stdout
    assert "GPU" not in result.stdout
    assert "link" not in result.stdout


def test_measured_stands_beside_predicted(tiny: Path) -> None:
    result = tq_stream("memory-report", tiny, "--device", "cpu", "--measure", "--json")
    found = json.loads(result.stdout)
    kv = next(row for row in found["rows"] if row["name"] == "KV cache")
    assert found["kv_tokens"] == 512
    assert kv["measured_bytes"] == pytest.approx(kv["predicted_bytes"], rel=0.02)
    assert found["peak_host_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    decayed = tq_stream("memory-report", tiny, "--device", "cpu", "--measure", "--decay", "200:2")
    assert "at 4-bit keys and 4-bit values, 2 bits beyond 200 tokens; " in decayed.stdout
    layers = tq_stream("memory-report", tiny, "--device", "cpu", "--bits", "3.5", "--layer-bits", "-1:2")
    assert "at 4-bit keys and 3-bit values, layers -1:2; " in layers.stdout
    result = tq_stream("memory-report", tiny, "--device", "cpu", "--measure", "--context", "64")
    assert "KV cache for 64 tokens" in result.stdout
    assert "measured peak of the process in host memory, mapped files included: " in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"vram": "8 apples"}, "'8 apples' is not a size"),
        ({"vram": 2**33, "context": 0}, "context must be at least 1 token; got 0"),
        ({"vram": 2**33, "resident": -1}, "resident must be 0 or more layers; got -1"),
        ({"vram": 2**33, "dtype": "int8"}, "'int8' is not a dtype"),
    ],
)
def test_plan_report_refuses_what_the_engine_refuses(tiny: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=re.escape(expected)):
        plan_report(tiny, **options)


# ------------------------------------------------------------------------------------------------------------ doctor


def test_doctor_names_versions_memory_and_folders(tmp_path: Path) -> None:
    found = json.loads(tq_stream("doctor", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"python", "transformers", "accelerate", "safetensors", "triton"}
    assert found["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert found["cache"]["path"] == str(tmp_path / "tq-stream-cache")
    assert (found["cache"]["fault"], found["cache"]["free_bytes"] > 0) == (None, True)
    assert not (tmp_path / "tq-stream-cache").exists()  # it looks, it makes nothing
    result = tq_stream("doctor")
    assert result.exit_code == 0
    for part in (
        torch.__version__,
        "writable",
        "GPU streaming: ",
        "CPU runs: yes",
        "Triton kernels: not needed without a GPU",
    ):
        assert part in result.stdout


def test_doctor_without_a_gpu_says_why_and_what_works() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine shows a GPU")
    result = tq_stream("doctor")
    assert re.search(r"GPU +none: (this torch is built without CUDA|torch .* sees no CUDA device)", result.stdout)
    assert "GPU streaming: no, there is no GPU; plans for one can be made: tq-stream memory-report" in result.stdout


def test_doctor_with_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = tq_stream("doctor", env={"TQ_STREAM_CACHE": str(tmp_path / "file" / "cache")})
    assert result.exit_code == 0
    assert f"cache, not writable ({tmp_path / 'file'} is a file)" in result.stdout
    assert "cannot be written to; set TQ_STREAM_CACHE or HF_HOME" in result.stdout


def test_doctor_offline_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def contact(endpoint: str) -> None:
        raise AssertionError(f"{endpoint} was contacted")

    monkeypatch.setattr(sys.modules["streamer.cli.doctor"], "_contact", contact)
    result = tq_stream("doctor")
    assert "offline: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, nothing was sent" in result.stdout
    assert "Downloads: no, the network is forbidden" in result.stdout


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("answering", "answers"), ("silent", "cannot be reached (no answer in 0.3 s)"), ("closed", "cannot be reached (")],
)
def test_doctor_asks_the_hub(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing) if kind == "answering" else None
    listener = socket.create_server(("127.0.0.1", 0)) if server is None else server.socket
    port = listener.getsockname()[1]
    if server is not None:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    if kind == "closed":
        listener.close()
    module = sys.modules["streamer.cli.doctor"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(module, "_HUB_TIMEOUT_S", 0.3 if kind == "silent" else 5.0)
    environment = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "", "no_proxy": "*"}
    try:
        result = tq_stream("doctor", env=environment)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
        listener.close()
    assert result.exit_code == 0
    assert f"hub        http://127.0.0.1:{port} {expected}" in result.stdout
    assert ("Downloads: yes" in result.stdout) == (kind == "answering")


@pytest.mark.gpu
def test_doctor_measures_the_link() -> None:
    gpu = json.loads(tq_stream("doctor", "--json").stdout)["gpus"][0]
    assert gpu["link_fault"] is None
    assert gpu["total_bytes"] == torch.cuda.get_device_properties(0).total_memory
    assert 1 < gpu["pageable_gb_per_s"] < gpu["pinned_gb_per_s"] < 1000
    assert "from page-locked memory" in tq_stream("doctor").stdout


@pytest.mark.gpu
@pytest.mark.parametrize("staged", [False, True])
def test_a_streamed_run_on_a_gpu_says_what_it_reached(endless: Callable[..., Path], *, staged: bool) -> None:
    folder = endless("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12)
    options = ["--resident", "0", "--max-new-tokens", "24", "--temperature", "0", "--device", "cuda"]
    if staged:
        options += ["--ram", "1600MiB", "--direct-io"]
    result = tq_stream("run", folder, PROMPT, *options)
    assert result.exit_code == 0, result.stderr
    first, *_, last = result.stderr.splitlines()[-2:]
    print(result.stderr)
    found = re.search(
        r"answer 24 tokens, ([\d.]+) tok/s \| link ([\d.]+) GB/s, (\d+) % of the ([\d.]+) measured", first
    )
    assert found is not None, first
    assert float(found[2]) / float(found[4]) == pytest.approx(int(found[3]) / 100, abs=0.02)
    assert last.startswith(("next: ", "bound by ")), last
    figures = json.loads(tq_stream("run", folder, PROMPT, *options, "--json").stdout)
    assert 0 < figures["link_share"] < 1.1
    assert figures["layer_s"] > 0
    assert figures["bound_by"] in ("link", "reader", "launches", "computing")
    if staged:
        assert figures["reader_bytes_per_s"] > 0


@pytest.mark.gpu
def test_a_resident_run_on_a_gpu_says_that_nothing_streams(tiny: Path) -> None:
    options = ["--max-new-tokens", "24", "--temperature", "0", "--device", "cuda", "--json"]
    figures = json.loads(tq_stream("run", tiny, PROMPT, *options).stdout)
    assert figures["decode_link_bytes"] == 0
    assert figures["link_share"] is None
    assert figures["bound_by"] in ("launches", "computing")


@pytest.mark.gpu
def test_a_report_measures_the_link_of_this_gpu(tiny: Path) -> None:
    result = tq_stream("memory-report", tiny, "--vram", "4GiB", "--resident", "0")
    assert result.exit_code == 0, result.stderr
    assert "GB/s" in result.stdout
