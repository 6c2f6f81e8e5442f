"""Types and groups of options that several commands share; named as the arguments of StreamingEngine that they set."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from streamer.cli.group import ENVIRONMENT_PREFIX
from streamer.errors import OptionError
from streamer.interrupts import ends_at_once
from streamer.options import AUTO_CODEC, CODECS, parse_dtype, parse_size

_Command = TypeVar("_Command", bound=Callable[..., Any])

_BITS = ("2", "3", "4", "16")
_BITS_AND_BETWEEN = ("2", "2.5", "3", "3.5", "4", "16")


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in the latest click only, and not when it runs
    """An option whose text a function of ours reads; what it refuses is a usage error while parsing.

    Args:
        name: shown in the help, in capitals.
        parse: text to value; raises OptionError.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value that a text stands for; a value that is no text is one already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers of a list such as "0,-1".

    Args:
        text: integers with commas between them; negative ones count from the last layer.
    Raises:
        OptionError: something that is no integer.
    Source: own.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"{text!r} is not a list of layers: write numbers with commas, as in 0,-1") from None


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths of texts in tokens from a list such as "1024,2048".

    Args:
        text: positive integers with commas between them.
    Raises:
        OptionError: something else.
    Source: own.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise OptionError(f"{text!r} is not a list of lengths: write tokens with commas, as in 1024,2048")
    return tuple(int(part) for part in parts)


def parse_rate(text: str) -> float:
    """The rate of a link in GB/s that a text such as "25" stands for.

    Args:
        text: a number from 0.01 to 10000: no link of a GPU is slower or faster by far.
    Raises:
        OptionError: no number, or one out of this range.
    Source: own.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0.01 <= rate <= 10_000:  # not a number is in no range
        raise OptionError(f"{text!r} is not the rate of a link: write GB/s from 0.01 to 10000, as in 25")
    return rate


SIZE = Parsed("size", parse_size)
RATE = Parsed("rate", parse_rate)
DTYPE = Parsed("dtype", parse_dtype)
LAYERS = Parsed("layers", parse_layers)
LENGTHS = Parsed("lengths", parse_lengths)
TOKENS = click.IntRange(min=1)


def _as_number(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    return None if value is None else float(value) if "." in value else int(value)


def _bits_option(name: str, text: str, choices: Sequence[str] = _BITS) -> Callable[[_Command], _Command]:
    default = "4" if name == "--bits" else None
    return click.option(name, type=click.Choice(choices), callback=_as_number, default=default, help=text)


_CACHE_OPTIONS = (
    _bits_option(
        "--bits",
        "Bits of the KV cache; 2.5 and 3.5 give keys one bit more than values, 16 leaves it uncompressed.",
        _BITS_AND_BETWEEN,
    ),
    _bits_option("--key-bits", "Bits of the keys, if not those of --bits."),
    _bits_option("--value-bits", "Bits of the values, if not those of --bits."),
    click.option(
        "--layer-bits",
        default="",
        show_default=False,
        metavar="LAYERS:BITS,...",
        help="Other bits for some layers: 0-3:4,-1:4/3 gives the first four 4 bits, the last 4-bit keys and 3-bit "
        "values.",
    ),
    click.option(
        "--protected-layers",
        type=LAYERS,
        default=(),
        show_default=False,
        help='Layers whose cache stays uncompressed, e.g. "0,-1" (negative: from the last).',
    ),
    click.option(
        "--decay",
        default="off",
        metavar="AGE:BITS,...",
        help="Let older tokens of the KV cache keep fewer bits: 4096:3,32768:2 leaves 3 beyond 4096 tokens and 2 "
        "beyond 32768; off leaves all; auto lets no more tokens age than the budgets need.",
    ),
)

_MACHINE_OPTIONS = (
    click.option("--vram", type=SIZE, help="GPU memory of the whole process, e.g. 8GiB.  [default: what is free]"),
    click.option(
        "--ram",
        type=SIZE,
        help="Host memory of the process, pages of files apart, e.g. 32GiB; on the CPU, what Python and its libraries "
        "take apart as well.  [default: 90 % of what is free; no limit on the CPU]",
    ),
    click.option(
        "--context",
        type=TOKENS,
        help="Tokens of prompt and answer to make room for.  [default: what the prompt needs; a report: 4096]",
    ),
    click.option("--device", help="cuda, cuda:1 or cpu.  [default: cuda if there is one]"),
    click.option("--dtype", type=DTYPE, default="auto", help="auto (as stored), bfloat16, float16 or float32."),
    click.option("--prefill-chunk", type=TOKENS, help="Tokens of a prompt that pass through a layer at a time."),
    click.option(
        "--resident",
        type=click.IntRange(min=0),
        help="Layers that stay on the GPU; 0 streams every layer.  [default: as many as fit]",
    ),
    click.option(
        "--direct-io/--no-direct-io",
        default=None,
        help="Read weights around the page cache.  [default: where it could not hold what is read in every pass]",
    ),
    click.option(
        "--codec",
        type=click.Choice(CODECS),
        default=AUTO_CODEC,
        help="lossless moves weights as tq-stream pack codes them, in 70 % of the bytes, bit for bit the same, and "
        "packs what has not been; raw as they are; auto is lossless where they have been packed and some must stream.",
    ),
    click.option("--offline", is_flag=True, help="Never use the network; HF_HUB_OFFLINE=1 does the same."),
)


def engine_options(command: _Command) -> _Command:
    """The options that a command hands to StreamingEngine as they are, under the names of its arguments."""
    return _with_options(command, (*_CACHE_OPTIONS, *_MACHINE_OPTIONS))


def machine_options(command: _Command) -> _Command:
    """The same without those of the cache."""
    return _with_options(command, _MACHINE_OPTIONS)


def _with_options(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


# Those that mean nothing where the CPU computes.
_GPU_OPTIONS = ("vram", "resident", "direct_io", "link_gbps")


def refuse_gpu_options(otherwise: str = "") -> None:
    """Options for a GPU are wrong usage of a command that runs on the CPU.

    Args:
        otherwise: what could be typed to have them honoured.
    Raises:
        OptionError: with the options or variables as they were given.
    """
    context = click.get_current_context()
    given = [name for name in _GPU_OPTIONS if context.params.get(name) is not None]
    if not given or not _is_on_cpu(context.params["device"]):
        return
    names = " and ".join(as_given(context, name) for name in given)
    are, them = ("is", "it") if len(given) == 1 else ("are", "them")
    instead = "; --ram limits host memory" if "vram" in given else ""
    raise OptionError(
        f"{names} {are} for a GPU, and this command would use the CPU: leave {them} out{otherwise}{instead}"
    )


def _is_on_cpu(device: str | None) -> bool:
    if device is None:
        with ends_at_once():
            import torch

        return not torch.cuda.is_available()
    return device.partition(":")[0] == "cpu"


def is_given(context: click.Context, name: str) -> bool:
    """Whether the user set a parameter, by an option or a variable."""
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def as_given(context: click.Context, name: str) -> str:
    """How a parameter got its value: "--vram", "--no-direct-io" or "TQ_STREAM_VRAM"."""
    if context.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
        return f"{ENVIRONMENT_PREFIX}_{name.upper()}"
    option = next(parameter for parameter in context.command.params if parameter.name == name)
    return (option.secondary_opts if context.params[name] is False else option.opts)[0]


def import_engine() -> None:
    """Import what a run needs; it takes seconds, in which Ctrl-C and SIGTERM end the process at once."""
    with ends_at_once():
        import streamer.engine  # noqa: F401  for its effect: later imports of it do no work


@contextmanager
def quiet_libraries(*, hide_progress: bool) -> Iterator[None]:
    """Within this, transformers prints no hints of its own: what a user must know comes from us, one line each.

    Args:
        hide_progress: hide the hub's progress bars of downloads as well.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not marked as exported
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    if hide_progress:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if hide_progress:
            enable_progress_bars()


# What a command reads that measures a model on a text; `read_text` gives its content.
text_option = click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    help="A text in UTF-8, long enough for all windows.",
)


def read_text(path: Path) -> str:
    """The text of a file given by --text.

    Raises:
        OptionError: no file, or not UTF-8.
    """
    if not path.is_file():
        raise OptionError(f"--text {path} is no file: give the path of a text in UTF-8")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--text {path} is not UTF-8 (byte {error.start}): convert it, as with iconv") from error
