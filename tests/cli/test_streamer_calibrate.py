"""tq-stream calibrate through click's runner, on the CPU."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from streamer.cli import main
from turboquant.policy import layer_precisions


def tq_stream(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{i * i % 97}" for i in range(400)), encoding="utf-8")
    return path


SMALL = ("--window-tokens", "250", "--device", "cpu", "--dtype", "float32")


def test_what_is_printed_is_an_option_that_the_other_commands_take(tiny: Path, text: Path) -> None:
    result = tq_stream("calibrate", tiny, "--text", text, *SMALL, "--target-avg-bits", "3")
    assert result.exit_code == 0, result.stderr
    option, layer_bits = result.stdout.split()
    precisions = layer_precisions(3, bits=16, layer_bits=layer_bits)
    assert sum(own.key_bits + own.value_bits for own in precisions) == 3 * 3 * 2
    report = tq_stream("memory-report", tiny, "--device", "cpu", option, layer_bits)
    assert f"layers {layer_bits}" in report.stdout


def test_json_has_what_was_measured(tiny: Path, text: Path) -> None:
    result = tq_stream("calibrate", tiny, "--text", text, *SMALL, "--target-avg-bits", "2.5", "--json")
    found = json.loads(result.stdout)
    rows = found["sensitivities"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    sides = [(row[side], row["layer"], side) for row in rows for side in ("keys", "values")]
    assert min(sides)[0] > 0
    precisions = layer_precisions(3, bits=16, layer_bits=found["layer_bits"])
    _, layer, side = max(sides)
    best = precisions[layer].key_bits if side == "keys" else precisions[layer].value_bits
    assert best == max(bits for own in precisions for bits in (own.key_bits, own.value_bits)) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-avg-bits", "5"), "5.0 is not in the range 2<=x<=4"),
        ((), "Missing option '--target-avg-bits'"),
        (("--target-avg-bits", "3", "--windows", "90"), "90 windows of 250 tokens were asked for and the text has"),
        (("--target-avg-bits", "3", "--context", "100"), "--context 100 has no room for windows of 250 tokens"),
    ],
)
def test_what_cannot_be_measured(tiny: Path, text: Path, arguments: tuple[str, ...], message: str) -> None:
    result = tq_stream("calibrate", tiny, "--text", text, *SMALL, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
