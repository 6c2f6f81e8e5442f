"""tq-stream eval through click's runner, on the CPU."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from streamer.cli import main


def tq_stream(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("left out; " + " ".join(f"{i * i % 97}" for i in range(400)), encoding="utf-8")
    return path


SMALL = ("--windows", "1", "--window-tokens", "300", "--prefill", "100", "--step", "50", "--device", "cpu")


def test_eval_prints_a_line_for_each_setting(tiny: Path, text: Path) -> None:
    result = tq_stream(
        "eval", tiny, "--text", text, *SMALL, "--setting", "2", "--setting", "key_bits=4,value_bits=3,window=16"
    )
    assert result.exit_code == 0, result.stderr
    number = r"[\d.]+"
    expected = rf"""199 positions, float32; uncompressed: perplexity {number}, \d+ bytes/token
setting +KL mean +KL p99 perplexity same top token bytes/token held in all
2 +{number} +{number} +{number} +{number} % +\d+ +\d+ %
key_bits=4,value_bits=3,window=16 +{number} +{number} +{number} +{number} % +\d+ +\d+ %
"""
    assert re.fullmatch(expected, result.stdout), result.stdout
    assert "reading 1 window of 300 tokens, 100 of each as a prompt" in result.stderr


def test_eval_json_says_how_it_was_measured(tiny: Path, text: Path) -> None:
    result = tq_stream("eval", tiny, "--text", text, *SMALL, "--skip-characters", "10", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["setting"] for row in found["settings"]] == ["4", "3", "2"]
    assert (found["windows"], found["window_tokens"], found["prefill"], found["step"]) == (1, 300, 100, 50)
    assert (found["model"], found["text"], found["dtype"]) == (str(tiny), str(text), "float32")
    kl = [row["kl_mean"] for row in found["settings"]]
    assert kl == sorted(kl)
    size = [row["bytes_per_token"] for row in found["settings"]]
    assert size == sorted(size, reverse=True)


def test_eval_looks_for_pass_keys(tiny: Path, text: Path) -> None:
    pieces = ("--passkey", "150,300", "--trials", "2", "--setting", "2", "--device", "cpu", "--windows", "0")
    result = tq_stream("eval", tiny, "--text", text, *pieces)
    assert result.exit_code == 0, result.stderr
    table = """tokens  setting       pass keys found, in all and behind   0 %  20 %  40 %  60 %  80 % of the text
   150  uncompressed  0 of 2                            0       0       0       0       0
   150  2             0 of 2                            0       0       0       0       0
   300  uncompressed  0 of 2                            0       0       0       0       0
   300  2             0 of 2                            0       0       0       0       0
"""
    assert result.stdout == table  # a random model says nothing
    assert "looking for pass keys in 2 texts of 150 tokens" in result.stderr
    both = tq_stream("eval", tiny, "--text", text, *SMALL, "--passkey", "200", "--trials", "2", "--json")
    found = json.loads(both.stdout)
    assert [row["setting"] for row in found["settings"]] == ["4", "3", "2"]
    assert [(row["setting"], row["tokens"], row["trials"]) for row in found["passkeys"]] == [
        (setting, 200, 2) for setting in ("uncompressed", "4", "3", "2")
    ]
    assert found["passkeys"][0]["found_by_depth"].keys() == {"0.0", "0.2", "0.4", "0.6", "0.8"}


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--setting", "colour=3"), "a cache has no option colour", 2),
        (("--setting", "bits=9"), "9", 2),
        (("--windows", "9"), "9 windows of 300 tokens were asked for and the text has", 2),
        (("--prefill", "299"), "prefill from 1 to 298", 2),
        (("--window-tokens", "5000"), "5000", 2),
        (("--context", "50"), "--context 50 has no room for 300 tokens, the longest piece that would be read", 2),
        (("--context", "400", "--passkey", "200,350"), "--context 400 has no room for 414 tokens", 2),
        (("--passkey", "long"), "'long' is not a list of lengths: write tokens with commas, as in 1024,2048", 2),
        (("--passkey", "0"), "'0' is not a list of lengths", 2),
        (("--passkey", "20"), "a text of 20 tokens has no room for a pass key: give 69 or more", 2),
        (("--trials", "3"), "--trials has no effect without --passkey: leave it out", 2),
        (("--windows", "0"), "--windows 0 leaves nothing to measure: add --passkey 1024", 2),
        (("--windows", "0", "--passkey", "100"), "--window-tokens has no effect with --windows 0: leave it out", 2),
        (("--text", "nowhere.txt"), "--text nowhere.txt is no file", 2),
        (("--vram", "8GiB"), "--vram is for a GPU, and this command would use the CPU", 2),
    ],
)
def test_bad_input_is_one_message(
    arguments: tuple[str, ...], message: str, status: int, tiny: Path, text: Path
) -> None:
    result = tq_stream("eval", tiny, "--text", text, *SMALL, *arguments)
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_text_that_is_not_utf8_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 500)
    result = tq_stream("eval", tiny, "--text", path, *SMALL)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not UTF-8 (byte 3): convert it" in result.stderr
