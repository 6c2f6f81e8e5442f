"""Whether a run keeps and moves its weights coded: what was asked, what has been packed, and what the plans say."""

from collections.abc import Callable
from dataclasses import replace

import torch

from streamer.architecture import Architecture, Unit, UnitCode, aligned, reason_of
from streamer.checkpoint import Checkpoint
from streamer.errors import CheckpointError, OptionError
from streamer.ops.lossless import has_kernel
from streamer.options import AUTO_CODEC, CODECS, LOSSLESS, RAW, cache_dir
from streamer.packing import find_packed, was_packed
from streamer.plan import Plan, Request, make_plan, plan_if_it_fits
from streamer.weights import PackedWeights

# Of the bytes of bfloat16 weights, coded: 70.4 % measured on a trained model, 69.9 to 70.1 % on random ones.
_LIKELY_SHARE = 0.704


def open_packed(
    checkpoint: Checkpoint, codec: str, device: torch.device | None, *, on_note: Callable[[str], None]
) -> PackedWeights | None:
    """The packed weights of a checkpoint that a run may use; None without any.

    Args:
        checkpoint: opened; stays open as long as the weights. codec: one of CODECS. on_note: told what is chosen.
        device: of the run; None = a GPU that is not here.
    Raises:
        OptionError: lossless was asked for, and the checkpoint has not been packed as it is now. CheckpointError and
            its children: lossless was asked for, and a packed file is damaged.
    Source: own.
    """
    if codec not in CODECS:
        raise OptionError(f"codec {codec!r} is not known: write {', '.join(CODECS[:-1])} or {CODECS[-1]}")
    if codec == RAW or (device is not None and device.type == "cpu"):
        return None
    cache = cache_dir() / "packed"
    try:
        folder = find_packed(checkpoint, cache)
    except CheckpointError as error:
        if codec == LOSSLESS:
            raise
        on_note(f"packed weights are left aside: {reason_of(error)}")
        return None
    if folder is None and codec == LOSSLESS:
        raise OptionError(
            f"--codec lossless needs packed weights, and {checkpoint.folder} has not been packed as it is now: run "
            f"tq-stream pack {checkpoint.folder} first"
        )
    if folder is None:
        if was_packed(checkpoint, cache):
            on_note("packed weights are left aside: they are of other files, or gone; tq-stream pack makes them anew")
        return None
    if codec == AUTO_CODEC and device is not None and not has_kernel(device):
        on_note("packed weights are left aside: no kernel decodes them on this GPU, and PyTorch would take long")
        return None
    return PackedWeights(folder, checkpoint)


def make_plan_with_codec(
    architecture: Architecture,
    packed: PackedWeights | None,
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
        share = f"{100 * plan.coded_share:.1f} %"
        notes.append(f"weights of layers are kept and moved coded, without loss: {share} of their bytes")
    else:
        notes.append("no weights get smaller coded: they are kept and moved as they are")
    return coded, replace(plan, notes=tuple(notes))


def as_if_packed(architecture: Architecture) -> Architecture | None:
    """The architecture with units as small as packing is likely to make them; None where none gets smaller.

    For forecasts: nothing can be read with it.
    """
    layers = tuple(tuple(_as_if_packed(unit) for unit in layer) for layer in architecture.layers)
    return replace(architecture, layers=layers) if layers != architecture.layers else None


def _uncoded(architecture: Architecture) -> Architecture:
    layers = tuple(tuple(replace(unit, code=None) for unit in layer) for layer in architecture.layers)
    return replace(architecture, layers=layers)


def _as_if_packed(unit: Unit) -> Unit:
    is_packed_whole = all(
        p.dtype == torch.bfloat16 and p.is_stored_as_run and p.conversion is None for p in unit.parameters
    )
    return replace(unit, code=UnitCode((), (), aligned(int(_LIKELY_SHARE * unit.nbytes)))) if is_packed_whole else unit
