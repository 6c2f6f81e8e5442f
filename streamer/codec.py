"""Whether a run keeps and moves its weights coded: what was asked, what has been packed, and what the plans say."""

from collections.abc import Callable
from dataclasses import replace

import torch

from streamer.architecture import Architecture, Unit, UnitCode, aligned, reason_of
from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, OptionError
from streamer.ops.lossless import has_kernel
from streamer.options import AUTO_CODEC, CODECS, LOSSLESS, RAW, format_coded_share, packed_dir
from streamer.packing import THREAD_BYTES, find_packed, pack, was_packed
from streamer.plan import PROCESS_BYTES, Plan, Request, make_plan, plan_if_it_fits
from streamer.rates import usable_cores
from streamer.weights import PackedWeights

# Of the bytes of bfloat16 weights, coded: 70.4 % measured on a trained model, 69.9 to 70.1 % on random ones.
_LIKELY_SHARE = 0.704


class LikelyWeights:
    """In place of packed weights before there are any: sizes as packing is likely to make them.

    For plans and reports; nothing can be read from it.
    """

    def coded(self, architecture: Architecture) -> Architecture:
        """The same architecture with every unit coded that packing makes smaller."""
        layers = tuple(tuple(_as_if_packed(unit) for unit in layer) for layer in architecture.layers)
        return replace(architecture, layers=layers)


def open_packed(
    checkpoint: Checkpoint, codec: str, device: torch.device | None, *, on_note: Callable[[str], None]
) -> PackedWeights | LikelyWeights | None:
    """The packed weights of a checkpoint that a run may use; None without any.

    Args:
        checkpoint: opened; stays open as long as the weights. codec: one of CODECS. on_note: told what is chosen.
        device: of the run; None = a GPU that is not here.
    Returns:
        LikelyWeights where lossless was asked for and the checkpoint has not been packed as it is now.
    Raises:
        OptionError: no such codec. CheckpointError and its children: lossless was asked for, and a packed file is
            damaged.
    Source: own.
    """
    if codec not in CODECS:
        raise OptionError(f"codec {codec!r} is not known: write {', '.join(CODECS[:-1])} or {CODECS[-1]}")
    if codec == RAW or (device is not None and device.type == "cpu"):
        return None
    cache = packed_dir()
    try:
        folder = find_packed(checkpoint, cache)
    except CheckpointError as error:
        if codec == LOSSLESS:
            raise
        on_note(f"packed weights are left aside: {reason_of(error)}")
        return None
    if folder is None and codec == LOSSLESS:
        return LikelyWeights()
    if folder is None:
        if was_packed(checkpoint, cache):
            on_note("packed weights are left aside: they are of other files, or gone; tq-stream pack makes them anew")
        return None
    if codec == AUTO_CODEC and device is not None and not has_kernel(device):
        on_note("packed weights are left aside: no kernel decodes them on this GPU, and PyTorch would take long")
        return None
    return PackedWeights(folder, checkpoint)


def pack_for_run(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    ram_bytes: int,
    on_note: Callable[[str], None],
    on_progress: Callable[[float], None] | None = None,
) -> PackedWeights:
    """Packs a checkpoint for a run that was asked for coded weights, as `tq-stream pack` would.

    Args:
        checkpoint: as for `open_packed`. device: that codes. ram_bytes: budget of the process's host memory.
        on_note: told that it is done and where it goes. on_progress: called with the share that is done, 0 to 1.
    Raises:
        as `streamer.packing.pack`; KeyboardInterrupt with a message: the next run goes on where it was.
    """
    cache = packed_dir()
    on_note(f"{checkpoint.folder} has not been packed as it is now: it is, once, to {cache}")

    def report(done: int, of: int) -> None:
        if on_progress is not None:
            on_progress(done / of)

    threads = max(1, min(usable_cores(), (ram_bytes - PROCESS_BYTES) // THREAD_BYTES - 2))
    try:
        folder = pack(checkpoint.folder, cache, threads=threads, device=device, on_progress=report)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)("Interrupted while packing; the same command goes on from here.") from interrupt
    finally:
        if device.type == "cuda":
            _give_back()
    on_note(folder.line())
    return PackedWeights(folder, checkpoint)


def _give_back() -> None:
    """What torch keeps of the memory of a GPU, and of page-locked memory, which plans do not count."""
    torch.cuda.empty_cache()
    # public in newer versions of torch only
    public = getattr(getattr(torch.accelerator, "memory", None), "empty_host_cache", None)
    empty_host_cache = public or getattr(torch._C, "_host_emptyCache", None)
    if empty_host_cache is not None:
        empty_host_cache()


def make_plan_with_codec(
    architecture: Architecture,
    packed: PackedWeights | LikelyWeights | None,
    codec: str,
    request: Request,
    *,
    key_bias_bytes: int = 0,
) -> tuple[Architecture, Plan]:
    """The plan of a run with the weights as asked for, and the architecture with units as it has them.

    With "auto" weights are coded if they were packed and fewer bytes cross the link then. Where everything fits as it
    is, decoding would only take time.

    Args:
        architecture: with units coded or not: it makes no difference. packed: of `open_packed`.
        request, key_bias_bytes: as in make_plan.
    Raises:
        DoesNotFitError, OptionError: as make_plan.
    Source: own.
    """

    def planned(own: Architecture) -> Plan:
        return make_plan(own, request, key_bias_bytes=key_bias_bytes)

    architecture = _uncoded(architecture)
    if packed is None or codec == RAW or request.vram_bytes is None:
        return architecture, planned(architecture)
    coded = packed.coded(architecture)
    if codec == AUTO_CODEC:
        as_it_is, plan = (plan_if_it_fits(own, request, key_bias_bytes=key_bias_bytes) for own in (architecture, coded))
        if plan is None or (as_it_is is not None and as_it_is.streamed_bytes <= plan.streamed_bytes):
            return architecture, as_it_is or planned(architecture)
    else:
        plan = planned(coded)
    notes = list(plan.notes)
    if plan.is_coded:
        share = format_coded_share(plan.coded_share, is_likely=plan.is_share_likely)
        notes.append(f"weights of layers are kept and moved coded, without loss: {share}")
    else:
        notes.append("no weights get smaller coded: they are kept and moved as they are")
    return coded, replace(plan, notes=tuple(notes))


def as_if_packed(architecture: Architecture) -> Architecture | None:
    """The architecture with units as small as packing is likely to make them; None where none gets smaller.

    For forecasts: nothing can be read with it.
    """
    packed = LikelyWeights().coded(architecture)
    return packed if packed.layers != architecture.layers else None


def _uncoded(architecture: Architecture) -> Architecture:
    layers = tuple(tuple(replace(unit, code=None) for unit in layer) for layer in architecture.layers)
    return replace(architecture, layers=layers)


def _as_if_packed(unit: Unit) -> Unit:
    is_packed_whole = all(p.dtype == torch.bfloat16 and p.is_stored_as_run for p in unit.parameters)
    return replace(unit, code=UnitCode((), (), aligned(int(_LIKELY_SHARE * unit.nbytes)))) if is_packed_whole else unit
