"""The command as a process of its own: what it imports, its streams, signals and exit statuses."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from streamer.cli.run import _read_prompt

COMMAND = (sys.executable, "-m", "streamer")


@pytest.fixture(autouse=True)
def children_can_be_interrupted() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


HELP_SCRIPT = """
import sys
from click.testing import CliRunner
from streamer.cli import main
for arguments in (["--help"], ["--version"], *([name, "--help"] for name in main.commands)):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
heavy = {"torch", "transformers", "accelerate", "huggingface_hub", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_prompt_at_a_terminal_is_a_usage_error() -> None:
    pty = pytest.importorskip("pty")
    reader, terminal = pty.openpty()
    done = subprocess.run([*COMMAND, "run", "m"], stdin=terminal, capture_output=True, text=True, check=False)
    os.close(terminal)
    os.close(reader)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no prompt: give PROMPT, --prompt-file FILE, or text on standard input" in done.stderr


def test_error_is_one_message_on_stderr(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "run", tmp_path, "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {tmp_path} is not a complete checkpoint: config.json, *.safetensors missing")
    assert "Traceback" not in done.stderr


STUB = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
except BaseException:
    pass
raise SystemExit("the signal had no effect")
"""


def signalled(command: Sequence[str], module: str, name: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """A run with a module that sends the process a signal when it is imported."""
    (folder / f"{module}.py").write_text(STUB.format(name=name))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, check=False)


@pytest.mark.parametrize(("module", "name"), [("click", "SIGINT"), ("torch", "SIGINT"), ("torch", "SIGTERM")])
def test_a_signal_while_libraries_are_imported_ends_the_process_without_a_traceback(
    module: str, name: str, tmp_path: Path
) -> None:
    """As an exception it was swallowed by a library, as this one does, or left a traceback."""
    done = signalled([*COMMAND, "run", "m", "p"], module, name, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.Signals[name], b"", b"")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """A shell starts what has an & behind it so."""
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *COMMAND, "run", "m", "p"]
    done = signalled(ignoring, "torch", "SIGINT", tmp_path)
    assert (done.returncode, done.stderr) == (1, b"the signal had no effect\n")


def test_text_from_a_pipe_goes_before_the_prompt(tiny: Path) -> None:
    def run(prompt: str, piped: bytes) -> bytes:
        options = ["--device", "cpu", "--max-new-tokens", "3", "--temperature", "0", "--quiet"]
        return subprocess.run([*COMMAND, "run", tiny, prompt, *options], input=piped, capture_output=True).stdout

    assert run("and a prompt", b"text from a pipe\n") == run("text from a pipe\n\nand a prompt", b"") != b""


def test_a_pipe_that_nobody_writes_to_does_not_hold_a_run(tiny: Path) -> None:
    command = [*COMMAND, "run", tiny, "a prompt", "--device", "cpu", "--max-new-tokens", "3", "--temperature", "0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.wait(timeout=60) == 0
    _, said = process.communicate()
    assert said.startswith(b"standard input is open and nothing came in 3 s: the prompt is taken without it\n")
    assert len(said.splitlines()) == 2


def empty_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


@pytest.mark.parametrize(
    "open_input",
    [lambda: None, lambda: os.open(os.devnull, os.O_RDONLY), lambda: os.open(os.devnull, os.O_WRONLY), empty_pipe],
    ids=["closed", "null", "unreadable, as of nohup", "empty pipe"],
)
def test_a_prompt_needs_no_standard_input(
    open_input: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    number, notes = open_input(), list[str]()
    with contextlib.nullcontext() if number is None else os.fdopen(number, "rb", buffering=0) as raw:
        stream = None if raw is None else io.TextIOWrapper(io.BufferedReader(raw))
        monkeypatch.setattr(sys, "stdin", stream)
        assert _read_prompt("a prompt", None, notes.append) == "a prompt"
        monkeypatch.undo()
    assert notes == []


@pytest.fixture
def talking(tiny_with_long_context: Path) -> subprocess.Popen[bytes]:
    """A run in the middle of an answer that would take many minutes; its first byte has been read."""
    process = subprocess.Popen(
        [*COMMAND, "run", tiny_with_long_context, "--max-new-tokens", "50000", "--device", "cpu", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"a prompt through a pipe\n")
    process.stdin.close()
    process.stdin = None  # communicate would flush it again
    assert len(process.stdout.read(1)) == 1
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_interrupt_keeps_the_answer_so_far(talking: subprocess.Popen[bytes], number: int, status: int) -> None:
    talking.send_signal(number)
    answer, said = talking.communicate(timeout=60)
    assert talking.returncode == status
    assert answer.endswith(b"\n")
    lines = said.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Interrupted after ")
    assert int(lines[0].split()[2]) >= 1


def test_reader_that_leaves_ends_the_run_quietly(talking: subprocess.Popen[bytes]) -> None:
    assert talking.stdout is not None
    talking.stdout.close()
    talking.stdout = None
    _, said = talking.communicate(timeout=60)
    assert (talking.returncode, said) == (1, b"")
