"""The command as a process of its own: what it imports, its streams, signals and exit statuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "streamer")

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
