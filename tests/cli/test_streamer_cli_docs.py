"""docs/cli.md is what --help says, and every --help has an example."""

from pathlib import Path

import pytest

import generate_cli_docs
from streamer.cli import main

HELPS = dict(generate_cli_docs.helps(main, "tq-stream"))


def test_page_is_up_to_date() -> None:
    assert generate_cli_docs.PAGE.read_text(encoding="utf-8") == generate_cli_docs.page()


@pytest.mark.parametrize("command", sorted(HELPS))
def test_help_has_an_example(command: str) -> None:
    assert f"Examples:\n    {command}" in HELPS[command]
    assert max(len(line) for line in HELPS[command].splitlines()) <= 100


def test_all_commands_are_on_the_page() -> None:
    assert set(HELPS) == {"tq-stream", *(f"tq-stream {name}" for name in main.commands)}


def test_check_fails_when_the_page_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_cli_docs, "PAGE", tmp_path / "cli.md")
    monkeypatch.setattr("sys.argv", ["generate_cli_docs.py", "--check"])
    assert generate_cli_docs.main() == 1
    (tmp_path / "cli.md").write_text(generate_cli_docs.page(), encoding="utf-8")
    assert generate_cli_docs.main() == 0
    (tmp_path / "cli.md").write_text("stale", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["generate_cli_docs.py"])
    assert generate_cli_docs.main() == 0
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == generate_cli_docs.page()
