"""The pages agree with the code: links, commands, options, cited code and tests, Python blocks, automatic choices."""

import ast
import importlib
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from make_checkpoint import SHAPES, write_checkpoint
from streamer.cli import main as tq_stream

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("streamer", "turboquant")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_CITED = re.compile(r"\b((?:streamer|turboquant|tests|scripts|docs)/[\w./-]+\w)(?:::(\w+))?")

# Options of tools that are not ours.
_FOREIGN_OPTIONS = {"--help", "--version"}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, made as code hosts make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), f"{page_id(page)} links {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page_id(page)} links {target}"


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every tq-stream command in the shell blocks of a page."""
    for line in "".join(blocks(page, "sh")).splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        for word in [*lexer, "|"]:
            if word not in ("|", ";", "&&", ">", "<"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words and words[0] == "tq-stream":
                yield words[1:]
            words = []


COMMANDS = [(page, arguments) for page in PAGES for arguments in commands(page)]


def test_the_readme_shows_commands() -> None:
    shown = [arguments[0] for page, arguments in COMMANDS if page.name == "README.md"]
    assert {"run", "memory-report", "doctor"} <= set(shown)


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page_id(page)}: {' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_commands_parse(page: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for option, name in itertools.pairwise(arguments):
        if option == "--prompt-file":
            Path(name).touch()
    command = tq_stream.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:], parent=click.Context(tq_stream))  # raises a UsageError


def options_of(command: click.Command) -> set[str]:
    found = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    children = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*(options_of(child) for child in children))


def test_options_exist() -> None:
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").iterdir() if path.is_file())
    known = options_of(tq_stream) | set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", scripts)) | _FOREIGN_OPTIONS
    unknown = {
        (page_id(page), option)
        for page in PAGES
        for option in _OPTION.findall(page.read_text(encoding="utf-8"))
        if option not in known
    }
    assert not unknown


def names_in(path: Path) -> set[str]:
    """Functions and classes that a Python file defines, methods included."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, defined)}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_cited_files_and_names_exist(page: Path) -> None:
    for name, member in _CITED.findall(page.read_text(encoding="utf-8")):
        path = ROOT / name
        assert path.exists(), f"{page_id(page)} names {name}"
        assert not member or member in names_in(path), f"{page_id(page)} names {name}::{member}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile_and_their_imports_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(compile(block, page_id(page), "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def template_of(node: ast.expr) -> str | None:
    """A regular expression for what a literal or an f-string can say; None for an expression that is neither."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ".+".join(re.escape(part) for part in re.split(r"%[sdr]", node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in node.values)
    return None


def said_lines() -> dict[str, str]:
    """What the packages say of automatic choices: template -> where."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if not re.search(r"(^|\.)(note|on_note|on_line)$|notes\.append$|logger\.(info|warning|error)$", called):
                continue
            template = template_of(node.args[0])
            if template is not None:
                found[template] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_automatic_choice_has_a_row() -> None:
    lines = said_lines()
    assert len(lines) >= 17, "the search finds what the packages say"
    rows = re.findall(r"`([^`]+)`", (ROOT / "docs" / "fallbacks.md").read_text(encoding="utf-8"))
    missing = {
        where: template for template, where in lines.items() if not any(re.fullmatch(template, row) for row in rows)
    }
    assert not missing


def test_every_row_is_said_by_the_code() -> None:
    """The reverse: an example line of a table's last column that no code says any more."""
    lines = said_lines()
    page = (ROOT / "docs" / "fallbacks.md").read_text(encoding="utf-8").split("## Defaults")[0]
    shown = [cell for row in page.splitlines() if row.startswith("| ") for cell in [row.rstrip(" |").split(" | ")[-1]]]
    examples = [text for cell in shown for text in re.findall(r"`([^`]+)`", cell) if " " in text]
    assert len(examples) >= 17
    assert [text for text in examples if not any(re.fullmatch(line, text) for line in lines)] == []


@pytest.fixture(scope="module")
def shape_14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headers") / "qwen2.5-14b"
    write_checkpoint(SHAPES["qwen2.5-14b"], folder, headers_only=True)
    return folder


def report_of(folder: Path, *options: str) -> str:
    # the reports of the pages, with host memory that does not depend on this machine
    wanted = ["--vram", "24GiB", "--context", "32768", "--bits", "3", "--ram", "64GiB", *options]
    result = CliRunner().invoke(tq_stream, ["memory-report", str(folder), *wanted])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_report_of_the_readme(shape_14b: Path) -> None:
    shown = next(block for block in blocks(ROOT / "README.md", "text") if "peak of the process" in block)
    made = [line.strip() for line in report_of(shape_14b).splitlines() if line.strip()]
    assert [line.strip() for line in shown.splitlines() if line.strip()] == made


def test_the_bytes_of_the_worked_example(shape_14b: Path) -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    report = json.loads(report_of(shape_14b, "--json"))
    for row in [*report["rows"], report["device_peak"]]:
        assert f"{row['predicted_bytes']:,}" in page, row["name"]
    assert f"{report['uncompressed_kv_bytes']:,}" in page


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == version
