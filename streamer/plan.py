"""Plan: every byte of a run and where it lives, computed from headers and budgets before anything is allocated."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamer.architecture import Architecture, Unit, aligned, decoded_bytes, head_slices
from streamer.errors import DoesNotFitError, OptionError
from streamer.options import GIB, format_size
from streamer.schedule import ring_extent
from turboquant.hf import FLOAT32_SCORE_BYTES
from turboquant.layout import BLOCK_TOKENS
from turboquant.ops.devices import LEAST_DIM, MOST_DIM
from turboquant.policy import (
    AUTO_DECAY,
    NO_DECAY,
    UNCOMPRESSED_BITS,
    Precision,
    check_decay,
    layer_precisions,
    parse_decay,
)
from turboquant.store import StoreOptions, store_bytes

# Ring over the streamed units of the largest layer. 1.2 keep the link busy while tokens are decoded one at a time, in a
# simulation of the schedule and measured; the part above 1.0 covers jitter of the thread that computes. While a prompt
# goes through a layer in chunks the whole layer is held: only a second one hides the copy of the next under it.
_RING_LAYERS, _RING_LAYERS_FOR_PROMPTS = 1.2, 2.0

# CUDA context, loaded kernels and library handles: what the driver counts for the process beside torch's allocator.
# Measured on an H100 with CUDA 13: 765 to 807 MiB once cuBLAS, SDPA and copies have run.
CONTEXT_BYTES = 832 << 20

# Device memory left to others when no budget is given; a card's memory is a little less than its name says, too.
SPARE_VRAM_BYTES = 512 << 20

# cuBLAS takes 32 MiB a stream on Hopper, 8 MiB before; the allocator rounds blocks and keeps small pools.
_WORKSPACE_BYTES = 64 << 20

# Host memory of the process beside weights: Python, torch, transformers and the host's side of the CUDA context.
# Measured on an H100 machine: 0.6 GB once a context exists, 1.13 GB after generations (anonymous and shared pages).
PROCESS_BYTES = 1280 << 20

# Page-locked slots through which weights pass on their way from the files. 16 of 32 MiB carry 42 GB/s, 32 of 16 MiB a
# tenth less [H100].
SLOT_BYTES, _MOST_SLOTS, _FEWEST_SLOTS = 32 << 20, 16, 4
SMALLEST_SLOT_BYTES = 64 << 10
_USEFUL_SLOT_BYTES = 4 << 20

# Chunks of a prompt that the planner tries, largest first; the smaller ones only when nothing else fits.
PREFILL_CHUNKS = (8192, 4096, 2048, 1024, 512, 256, 128)
_EFFICIENT_CHUNK = 512

# On the CPU a longer chunk gains nothing.
_HOST_CHUNK = 2048

# What a smaller chunk must save of the bytes per pass to be taken.
_WORTHWHILE_SHARE = 0.05

# Units of one size that are tried in what whole layers leave of a budget.
_TRIES_PER_SIZE = 3

# A context that is named in place of one that does not fit is a multiple of this.
_CONTEXT_STEP = 64

# Pieces in which a store codes and decodes (4096 tokens), as float32 arrays held at once in the plain PyTorch path.
_CODING_TOKENS, _CODING_ARRAYS = 4096, 10


@dataclass(frozen=True)
class CacheSettings:
    """How the KV cache is kept; see turboquant.TurboQuantCache."""

    bits: float = 16
    key_bits: int | None = None
    value_bits: int | None = None
    layer_bits: str = ""
    protected_layers: tuple[int, ...] = ()
    window: int = 128
    sinks: int = 4
    decay: str = NO_DECAY

    @property
    def fewest_bits(self) -> int:
        """The least `bits` of which the decay can still take some."""
        steps = parse_decay(self.decay)
        return steps[-1].bits + 1 if steps else 2


@dataclass(frozen=True)
class Request:
    """What a run asks for.

    Attributes:
        context: tokens of a row, prompt and answer. batch: rows.
        vram_bytes: budget of the whole process on the device; None = no device (CPU).
        ram_bytes: budget of the process's host memory, pages of files apart; on the CPU Python and its libraries, too.
        free_ram_bytes: what the system could use to keep pages of files; None = ram_bytes.
        direct_io: read weights around the page cache; None = where it could not hold what is read in every pass.
        resident_layers: layers that stay on the device; None = as many as fit.
        prefill_chunk: tokens of a prompt chunk; None = chosen.
        cache: CacheSettings.
    """

    context: int
    batch: int = 1
    vram_bytes: int | None = None
    ram_bytes: int = 0
    free_ram_bytes: int | None = None
    direct_io: bool | None = None
    resident_layers: int | None = None
    prefill_chunk: int | None = None
    cache: CacheSettings = CacheSettings()


@dataclass(frozen=True)
class Term:
    """One line of the plan: what, where ("device", "host" or "file"), how many bytes."""

    name: str
    where: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Where every byte of a run lives.

    Attributes:
        request: what was asked. units: of a pass, in order, the head last. resident: indices of units that stay.
        ring_bytes: of the streamed ones. prefill_chunk: tokens.
        host: "map" (views on the files), "pinned" (all streamed units are kept in host memory) or "staged".
        kept: indices of streamed units that stay in page-locked host memory.
        staged_bytes: of streamed units that are read from the files in every pass.
        staging_bytes: page-locked slots for what is read. slot_bytes: one of them.
        direct_io: files are read around the page cache.
        terms: lines of the report; their sum by place is the prediction.
        kv_bytes: exact size of the cache's tensors when it holds `context` tokens (key biases included).
        layers_resident: decoder layers none of whose units streams.
        streamed_bytes: over the link per pass, as they are stored.
        notes: automatic choices.
    """

    request: Request
    units: tuple[Unit, ...]
    resident: frozenset[int]
    ring_bytes: int
    prefill_chunk: int
    host: str
    terms: tuple[Term, ...]
    kv_bytes: int
    layers_resident: int
    streamed_bytes: int
    notes: tuple[str, ...]
    kept: frozenset[int] = frozenset()
    staged_bytes: int = 0
    staging_bytes: int = 0
    slot_bytes: int = 0
    direct_io: bool = False

    def bytes_at(self, where: str) -> int:
        """Sum of the terms of one place."""
        return sum(term.nbytes for term in self.terms if term.where == where)

    @property
    def device_bytes(self) -> int:
        """Predicted peak of the process on the device."""
        return self.bytes_at("device")

    @property
    def is_coded(self) -> bool:
        """Whether weights of layers are kept and moved coded."""
        return any(unit.code is not None for unit in self.units)

    @property
    def coded_share(self) -> float:
        """Bytes of the layers' weights as they are kept and moved over those that are used; 1 without a code."""
        layers = [unit for unit in self.units if unit.rows is None]
        return sum(unit.stored_bytes for unit in layers) / sum(unit.nbytes for unit in layers)

    @property
    def is_share_likely(self) -> bool:
        """Whether that is an estimate: the weights have not been packed."""
        return any(unit.code is not None and not unit.code.parts for unit in self.units)


def cache_bytes(architecture: Architecture, request: Request) -> int:
    """Bytes of the cache's tensors with room for request.context tokens of request.batch rows, key biases apart."""
    cache, item = request.cache, architecture.dtype.itemsize
    precisions = _precisions(architecture, cache)
    steps = parse_decay(cache.decay)
    check_decay(steps, precisions)
    total = 0
    for (shape, window), precision in zip(architecture.cache_layers, precisions, strict=True):
        width = shape.num_kv_heads * (shape.key_dim + shape.value_dim) * item
        if window is not None:
            total += request.batch * width * min(request.context, window - 1)
        elif precision == Precision(16, 16):
            total += request.batch * width * request.context
        else:
            options = StoreOptions(precision, cache.window, cache.sinks, capacity_tokens=request.context, decay=steps)
            total += store_bytes(
                request.context,
                request.batch,
                shape.num_kv_heads,
                shape.key_dim,
                shape.value_dim,
                options,
                architecture.dtype,
                has_kernels=request.vram_bytes is not None
                and min(shape.key_dim, shape.value_dim) >= LEAST_DIM
                and max(shape.key_dim, shape.value_dim) <= MOST_DIM,
            )
    return total


def is_compressed(architecture: Architecture, cache: CacheSettings) -> bool:
    """Whether any layer's keys or values are coded."""
    return any(own != Precision(16, 16) for own in _precisions(architecture, cache))


def _precisions(architecture: Architecture, cache: CacheSettings) -> tuple[Precision, ...]:
    return layer_precisions(
        architecture.num_layers,
        bits=cache.bits,
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        layer_bits=cache.layer_bits,
        protected_layers=cache.protected_layers,
    )


def make_plan(architecture: Architecture, request: Request, *, key_bias_bytes: int = 0) -> Plan:
    """The plan of a run.

    Where the cache's decay is "auto", the plan's request has the one that was chosen: "off" if all fits with it.

    Raises:
        DoesNotFitError: with every term, and the nearest setting that fits.
        OptionError: more resident layers than the model has, or a cache that cannot be as its settings say.
    """
    if request.resident_layers is not None and request.resident_layers > architecture.num_layers:
        raise OptionError(
            f"--resident {request.resident_layers} was asked for and the model has {architecture.num_layers} layers: "
            "give that many or fewer, or leave --resident out to keep as many as fit"
        )
    if request.cache.decay == AUTO_DECAY:
        return _plan_that_ages(architecture, request, key_bias_bytes)
    kv_bytes = cache_bytes(architecture, request) + key_bias_bytes
    if request.vram_bytes is None:
        plan = _host_plan(architecture, request, kv_bytes)
        if plan.bytes_at("host") > request.ram_bytes:
            raise _does_not_fit(plan, "host", request.ram_bytes, _nearest_on_the_cpu(architecture, plan))
        return plan
    chunks = [request.prefill_chunk] if request.prefill_chunk is not None else _chunks(request.context)
    best: Plan | None = None
    for chunk in chunks:
        plan = _device_plan(architecture, request, kv_bytes, chunk)
        if plan.device_bytes > request.vram_bytes:
            continue
        # a smaller chunk leaves more room for residents and makes long prompts slower: it must be worth it
        if best is None or (
            chunk >= _EFFICIENT_CHUNK and plan.streamed_bytes < (1 - _WORTHWHILE_SHARE) * best.streamed_bytes
        ):
            best = plan
    if best is None:
        raise _does_not_fit(plan, "device", request.vram_bytes, _nearest_on_the_device(architecture, plan))
    best = _with_host_memory(architecture, best)
    if best.bytes_at("host") > request.ram_bytes:
        raise _does_not_fit(best, "host", request.ram_bytes, _Remedy(f"--ram {_rounded_up(best.bytes_at('host'))}"))
    return best


def plan_if_it_fits(architecture: Architecture, request: Request, *, key_bias_bytes: int = 0) -> Plan | None:
    """The plan of a run as `make_plan` gives it; None where it does not fit."""
    try:
        return make_plan(architecture, request, key_bias_bytes=key_bias_bytes)
    except DoesNotFitError:
        return None


def _plan_that_ages(architecture: Architecture, request: Request, key_bias_bytes: int) -> Plan:
    """The plan with the mildest decay that fits: late ages first, then early ones, then the same with a bit less."""
    least = request.cache.window + BLOCK_TOKENS
    ages = range(max(least, request.context // BLOCK_TOKENS * BLOCK_TOKENS), least - 1, -BLOCK_TOKENS)
    precisions = _precisions(architecture, request.cache)
    check_decay(parse_decay(f"{least}:2"), precisions)
    most = max(bits for own in precisions for bits in (own.key_bits, own.value_bits) if bits != UNCOMPRESSED_BITS)
    first = f"{least}:3," if most == 4 else ""
    decays = [f"{age}:3" for age in ages if most == 4]
    decays += [f"{first}{age}:2" for age in ages if age > least] + [f"{least}:2"]

    def planned(decay: str) -> Plan:
        wanted = replace(request, cache=replace(request.cache, decay=decay))
        return make_plan(architecture, wanted, key_bias_bytes=key_bias_bytes)

    try:
        return planned(NO_DECAY)
    except DoesNotFitError:
        plan = planned(decays[-1])  # or an error with what would fit beside it
    low, high = 0, len(decays) - 1
    while low < high:
        middle = (low + high) // 2
        try:
            plan = planned(decays[middle])
            high = middle
        except DoesNotFitError:
            low = middle + 1
    notes = list(plan.notes)
    notes.append(f"the KV cache does not fit with all its bits: older tokens keep fewer (--decay {decays[high]})")
    return replace(plan, notes=tuple(notes))


def _chunks(context: int) -> list[int]:
    """Chunks to try, largest first: of those that read a prompt of the whole context in one piece the smallest."""
    whole = [chunk for chunk in PREFILL_CHUNKS if chunk >= context]
    return [*whole[-1:], *(chunk for chunk in PREFILL_CHUNKS if chunk < context)]


def _host_plan(architecture: Architecture, request: Request, kv_bytes: int) -> Plan:
    """The plan of a run on the CPU."""
    units = (*(u for layer in architecture.layers for u in layer), *head_slices(architecture.head, 1 << 62))
    parameters = [*(p for unit in units for p in unit.parameters), *architecture.resident, architecture.embedding]
    if architecture.is_tied:
        parameters.remove(architecture.head)
    as_stored = sum(p.nbytes for p in parameters if p.is_stored_as_run)
    made = sum(p.nbytes for p in parameters if not p.is_stored_as_run)
    chunk = request.prefill_chunk or _HOST_CHUNK
    notes = []
    if made:
        notes.append(
            f"{format_size(made)} of weights are not stored as they run (dtype or layout): converted once, in memory"
        )
    terms = (
        # Python and its libraries have no term: on a processor they take the more the larger the model's matrices are,
        # and how much more depends on the processor
        Term("weights read from the files' maps", "file", as_stored),
        Term("weights converted in memory", "host", made),
        Term("KV cache", "host", kv_bytes),
        Term("activations", "host", _activation_bytes(architecture, request, chunk)),
    )
    return Plan(
        request=request,
        units=units,
        resident=frozenset(range(len(units))),
        ring_bytes=0,
        prefill_chunk=chunk,
        host="map",
        terms=terms,
        kv_bytes=kv_bytes,
        layers_resident=architecture.num_layers,
        streamed_bytes=0,
        notes=tuple(notes),
    )


def _device_plan(architecture: Architecture, request: Request, kv_bytes: int, chunk: int) -> Plan:
    """The device's side of a plan; `_with_host_memory` adds the host's."""
    fixed = [
        Term("CUDA context and kernels", "device", CONTEXT_BYTES),
        Term("norms and other small weights", "device", sum(aligned(p.nbytes) for p in architecture.resident)),
        Term("KV cache", "device", kv_bytes),
        Term("activations", "device", _activation_bytes(architecture, request, chunk)),
        Term("workspaces and rounding", "device", _WORKSPACE_BYTES),
    ]
    decoded = decoded_bytes([unit for layer in architecture.layers for unit in layer])
    if decoded:
        fixed.append(Term("one decoded layer", "device", decoded))
    left = (request.vram_bytes or 0) - sum(term.nbytes for term in fixed)
    layout = _lay_out(architecture, left, request.resident_layers)
    units, resident = layout.units, layout.resident
    resident_bytes = sum(unit.stored_bytes for i, unit in enumerate(units) if i in resident)
    streaming_layers = {units[i].group for i in range(len(units)) if i not in resident and units[i].rows is None}
    return Plan(
        request=request,
        units=units,
        resident=resident,
        ring_bytes=layout.ring_bytes,
        prefill_chunk=chunk,
        host="pinned",
        terms=(
            *fixed[:2],
            Term("resident layers and head", "device", resident_bytes),
            Term("ring of streamed weights", "device", layout.ring_bytes),
            *fixed[2:],
        ),
        kv_bytes=kv_bytes,
        layers_resident=architecture.num_layers - len(streaming_layers),
        streamed_bytes=sum(unit.stored_bytes for i, unit in enumerate(units) if i not in resident),
        notes=layout.notes,
    )


def _with_host_memory(architecture: Architecture, plan: Plan) -> Plan:
    """A plan of the device with what host memory does for it."""
    table_bytes = architecture.embedding.nbytes
    is_mapped = architecture.embedding.is_stored_as_run
    host = _lay_out_host(plan.request, plan.units, plan.resident, 0 if is_mapped else table_bytes)
    terms = (
        Term("Python, torch and CUDA", "host", PROCESS_BYTES),
        Term("page-locked weights", "host", sum(plan.units[i].stored_bytes for i in host.kept)),
        Term("page-locked staging slots", "host", host.staging_bytes),
        Term("weights in conversion", "host", host.converting_bytes),
        Term("embedding table", "file" if is_mapped else "host", table_bytes),
    )
    return replace(
        plan,
        host="staged" if host.staged_bytes else "pinned",
        terms=(*plan.terms, *terms),
        notes=(*plan.notes, *host.notes),
        kept=host.kept,
        staged_bytes=host.staged_bytes,
        staging_bytes=host.staging_bytes,
        slot_bytes=host.slot_bytes,
        direct_io=host.direct_io,
    )


@dataclass(frozen=True)
class _Layout:
    """What stays on the device and what goes through the ring."""

    units: tuple[Unit, ...]
    resident: frozenset[int]
    ring_bytes: int
    notes: tuple[str, ...] = ()


def _lay_out(architecture: Architecture, left: int, forced: int | None) -> _Layout:
    """Fill `left` bytes with residents and a ring; `forced` is the number of resident layers, None = as many as fit."""
    layer_units = [unit for layer in architecture.layers for unit in layer]
    head = head_slices(architecture.head, 1 << 62)
    everything = sum(unit.stored_bytes for unit in (*layer_units, *head))
    if everything <= left and forced in (None, architecture.num_layers):
        return _Layout((*layer_units, *head), frozenset(range(len(layer_units) + 1)), 0)
    least = _ring_capacity(architecture, _RING_LAYERS)
    notes = []
    if head[0].nbytes <= left - least:
        units, held = (*layer_units, *head), {len(layer_units)}
    else:
        # slices no larger than the largest unit of a layer: the ring has room for them already
        slices = head_slices(architecture.head, max(unit.stored_bytes for unit in layer_units))
        units, held = (*layer_units, *slices), set()
        notes.append(f"the output matrix ({format_size(head[0].nbytes)}) streams in {len(slices)} slices")
    layout = None
    # a coded layer leaves the ring when it is decoded: a prompt's chunks hold nothing there
    holds_prompts = (
        least if all(u.code for u in layer_units) else _ring_capacity(architecture, _RING_LAYERS_FOR_PROMPTS)
    )
    for capacity in (holds_prompts, least):
        spare = left - capacity - sum(units[i].stored_bytes for i in held)
        chosen = _choose_layers(architecture, spare, forced)
        if capacity > least and (spare < 0 or 2 * len(chosen) > architecture.num_layers):
            continue  # where most layers stay, the copy of the next streamed one hides under theirs
        resident = held | {i for i, unit in enumerate(units) if unit.rows is None and unit.group in chosen}
        if forced is None:
            resident = _fill_up(units, resident, capacity, left)
        layout = _Layout(units, frozenset(resident), _ring_extent(units, resident, capacity), tuple(notes))
        if layout.ring_bytes <= left - sum(units[i].stored_bytes for i in resident):
            break
    assert layout is not None  # noqa: S101  the smaller ring is always tried
    return layout


def _ring_capacity(architecture: Architecture, layers: float) -> int:
    sizes = [sum(unit.stored_bytes for unit in layer) for layer in architecture.layers]
    largest_unit = max(unit.stored_bytes for layer in architecture.layers for unit in layer)
    return aligned(max(int(layers * max(sizes)), max(sizes) + largest_unit // 4))


def _ring_extent(units: Sequence[Unit], resident: Collection[int], capacity: int) -> int:
    """What the streamed units really take of a ring of that capacity: units do not go round its end."""
    streamed = [unit for i, unit in enumerate(units) if i not in resident]
    return ring_extent([unit.stored_bytes for unit in streamed], capacity, [unit.group for unit in streamed])


def _choose_layers(architecture: Architecture, spare: int, forced: int | None) -> set[int]:
    """Layers that stay, spread evenly: then a pass takes max(copy, compute), whatever their ratio."""
    count = architecture.num_layers
    layer_bytes = [sum(unit.stored_bytes for unit in layer) for layer in architecture.layers]
    streaming = count - (forced or 0)
    if forced is None:
        # fewest streamed layers whose complement fits: sizes are nearly equal, so walk down from all streamed
        while streaming:
            streams = _spread(streaming - 1, count)
            if sum(size for size, leaves in zip(layer_bytes, streams, strict=True) if not leaves) > spare:
                break
            streaming -= 1
    streams = _spread(streaming, count)
    return {i for i in range(count) if not streams[i]}


def _fill_up(units: Sequence[Unit], resident: set[int], capacity: int, left: int) -> set[int]:
    """Single units of streamed layers, largest first, into what whole layers have left."""
    resident = set(resident)
    held = sum(units[i].stored_bytes for i in resident)
    failed: Counter[int] = Counter()  # by size: units of one size differ in what the ring saves, but hardly
    for i in sorted(range(len(units)), key=lambda i: -units[i].stored_bytes):
        size = units[i].stored_bytes
        if i in resident or held + size > left or failed[size] == _TRIES_PER_SIZE:
            continue
        if held + size + _ring_extent(units, resident | {i}, capacity) <= left:
            resident.add(i)
            held += size
        else:
            failed[size] += 1
    return resident


def _spread(streaming: int, count: int) -> list[bool]:
    """Which of `count` layers stream when `streaming` of them do: evenly spread, the first and the last among them.

    Between the last and the first, sampling and Python already give the copy time to hide; resident layers there would
    leave the link idle.
    """
    if streaming < 2:
        return [streaming == 1 and i == count - 1 for i in range(count)]
    gaps = streaming - 1
    places = {(k * (count - 1) + gaps // 2) // gaps for k in range(streaming)}
    return [i in places for i in range(count)]


@dataclass(frozen=True)
class _HostLayout:
    """What stays in page-locked host memory, and the slots that the rest passes through."""

    kept: frozenset[int]
    staged_bytes: int
    staging_bytes: int
    slot_bytes: int
    converting_bytes: int
    direct_io: bool
    notes: tuple[str, ...]


def _lay_out_host(request: Request, units: Sequence[Unit], resident: Collection[int], table_bytes: int) -> _HostLayout:
    """table_bytes: of the embedding table, if it is held in memory."""
    streamed = [i for i in range(len(units)) if i not in resident]
    needed = sum(units[i].stored_bytes for i in streamed)
    # transformers' conversions make whole parameters, through copies in the stored dtype; pieces of one parameter may
    # still be wanted while the next is made. Measured: 1.5 to 2.5 times the larger of what is stored and what is made
    made = [max(p.nbytes, p.source_bytes) for unit in units for p in unit.parameters if p.conversion is not None]
    converting = 3 * max(made, default=0)
    left = request.ram_bytes - PROCESS_BYTES - converting - table_bytes
    slot, slots = _slots(units, left, needed)
    staging = slot * slots
    room = left - staging
    kept = frozenset(streamed) if needed <= room else _spread_kept(units, streamed, needed, room)
    staged = sum(units[i].stored_bytes for i in streamed if i not in kept)
    free = request.free_ram_bytes if request.free_ram_bytes is not None else request.ram_bytes
    cacheable = free - staging - (needed - staged)
    direct = request.direct_io if request.direct_io is not None else staged > cacheable
    notes = []
    if staged:
        notes.append(
            f"host memory: {format_size(needed - staged)} of {format_size(needed)} of streamed weights stay within the "
            f"{format_size(request.ram_bytes)} that may be used; {format_size(staged)} are read from the files in "
            "every pass" + (", around the page cache" if direct else "")
        )
    return _HostLayout(kept, staged, staging, slot, converting, direct, tuple(notes))


def _slots(units: Sequence[Unit], left: int, needed: int) -> tuple[int, int]:
    """Bytes of a slot and how many: as large as pieces can be, fewer and smaller where memory is scarce."""
    largest = max(unit.stored_bytes for unit in units)
    slot = SLOT_BYTES
    while slot > SMALLEST_SLOT_BYTES and slot // 2 >= largest + SMALLEST_SLOT_BYTES // 2:
        slot //= 2
    slots = max(_FEWEST_SLOTS, min(_MOST_SLOTS, -(-sum(unit.stored_bytes for unit in units) // slot)))
    # smaller slots where everything can be kept beside them; else they take a quarter of the room at most
    limit = left - needed if left - needed >= _FEWEST_SLOTS * min(slot, _USEFUL_SLOT_BYTES) else left // 4
    while slot * slots > limit and (slots > _FEWEST_SLOTS or slot > SMALLEST_SLOT_BYTES):
        if slots > _FEWEST_SLOTS:
            slots -= 1
        else:
            slot //= 2
    return slot, slots


def _spread_kept(units: Sequence[Unit], streamed: Sequence[int], needed: int, room: int) -> frozenset[int]:
    """Streamed units to keep, at most `room` bytes, evenly spread over a pass: reading then never falls behind."""
    kept = set()
    taken = passed = 0
    for i in streamed:
        passed += units[i].stored_bytes
        if taken + units[i].stored_bytes <= room * passed // needed:
            kept.add(i)
            taken += units[i].stored_bytes
    for i in sorted(streamed, key=lambda i: -units[i].stored_bytes):
        if i not in kept and taken + units[i].stored_bytes <= room:
            kept.add(i)
            taken += units[i].stored_bytes
    return frozenset(kept)


def _activation_bytes(architecture: Architecture, request: Request, chunk: int) -> int:
    """Largest sum of temporary tensors of a run: a prompt chunk inside a layer, or coding and decoding the cache."""
    config: Any = architecture.decoder_config  # each family has its own attributes
    item = architecture.dtype.itemsize
    prompt, batch = request.context, request.batch  # a prompt may fill the context
    tokens = batch * min(chunk if architecture.uses_own_attention else prompt, prompt)
    hidden = int(config.hidden_size)
    shapes = [shape for shape, _ in architecture.cache_layers]
    kv_width = max(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    q_width = int(config.num_attention_heads) * max(shape.key_dim for shape in shapes)
    inner = _inner_width(architecture)
    in_norm = tokens * hidden * (2 * item + 8)
    in_attention = tokens * (2 * hidden + 5 * q_width + 3 * kv_width) * item
    # keys and values for every query head, where FlashAttention does not serve (see hf/dense.py)
    heads = int(config.num_attention_heads)
    in_attention += max(
        batch * prompt * heads * (shape.key_dim + shape.value_dim) * item
        if shape.num_kv_heads < heads
        and request.vram_bytes is not None
        and not architecture.has_float32_attention
        and (item == 4 or shape.key_dim != shape.value_dim or shape.key_dim > MOST_DIM)
        else 0
        for shape in shapes
    )
    in_mlp = tokens * (2 * hidden + 4 * inner) * item
    of_prompt = 2 * batch * prompt * hidden * item + prompt * 6 * max(shape.key_dim for shape in shapes) * item
    # a layer's exact keys and values: a buffer for all chunks of the prompt, beside those of the chunk
    exact = batch * prompt * kv_width * item if prompt > chunk else 0
    coding = 0
    if is_compressed(architecture, request.cache):
        coding = min(_CODING_TOKENS, request.context) * max(1, kv_width // 2) * 4 * _CODING_ARRAYS
    # transformers' sliding layers keep a view of the whole last chunk until the next call
    sliding = sum(
        batch * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * item * min(chunk, prompt)
        for shape, window in architecture.cache_layers
        if window is not None
    )
    # attention with softcap or learned sinks: float32 keys and values of a row, and a few arrays of scores
    in_float32 = 0
    if architecture.has_float32_attention:
        in_float32 = 2 * request.context * kv_width * 4 + 4 * FLOAT32_SCORE_BYTES
    logits = batch * architecture.head.shape[0] * (item + 12)
    peak_of_layer = max(in_norm, in_attention + in_float32, in_mlp)
    return of_prompt + exact + sliding + max(peak_of_layer, coding) + logits


def _inner_width(architecture: Architecture) -> int:
    """Values per token between the two halves of an MLP, as wide as its widest matrix; experts count their top k."""
    config: Any = architecture.decoder_config
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return int(experts) * (int(inner) + int(config.hidden_size))
    names = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "ffn_dim_decoder")
    found = [getattr(config, name, None) for name in names]
    widths = [v for v in found if isinstance(v, int)]
    return max(widths) if widths else 4 * int(config.hidden_size)


def _rounded_up(size_bytes: int) -> str:
    """A size to type that is at least size_bytes, in quarters of a GiB."""
    return f"{-(-size_bytes * 4 // GIB) / 4:g}GiB"


@dataclass(frozen=True)
class _Remedy:
    """A change that fits: what to type, and the context, if a smaller one would do by itself."""

    options: str
    context: int | None = None


def _does_not_fit(plan: Plan, where: str, budget_bytes: int, remedy: _Remedy) -> DoesNotFitError:
    memory = "GPU memory" if where == "device" else "host memory"
    if plan.request.vram_bytes is None:
        memory += ", beside Python and its libraries,"  # which the plan of a run on the CPU leaves out
    terms = ", ".join(f"{t.name} {format_size(t.nbytes)}" for t in plan.terms if t.where == where and t.nbytes)
    return DoesNotFitError(
        f"the run needs {format_size(plan.bytes_at(where))} of {memory} and {format_size(budget_bytes)} may be used.\n"
        f"  {terms}\n  Try {remedy.options}.",
        largest_context=remedy.context,
    )


def _nearest_on_the_cpu(architecture: Architecture, plan: Plan) -> _Remedy:
    """The nearest change of one setting with which a run on the CPU fits."""
    key_bias_bytes = plan.kv_bytes - cache_bytes(architecture, plan.request)

    def needs(changed: Request) -> int:
        return _host_plan(architecture, changed, cache_bytes(architecture, changed) + key_bias_bytes).bytes_at("host")

    found = _smaller_cache(plan.request, plan.request.ram_bytes, needs)
    return found or _Remedy(f"--ram {_rounded_up(plan.bytes_at('host'))}")


def _nearest_on_the_device(architecture: Architecture, plan: Plan) -> _Remedy:
    """The nearest change of one setting with which the device has room for what a plan asks."""
    request = plan.request
    budget_bytes = request.vram_bytes or 0
    key_bias_bytes = plan.kv_bytes - cache_bytes(architecture, request)

    def needs(changed: Request) -> int:
        kv_bytes = cache_bytes(architecture, changed) + key_bias_bytes
        return _device_plan(architecture, changed, kv_bytes, PREFILL_CHUNKS[-1]).device_bytes

    least = replace(request, resident_layers=0)
    if needs(least) <= budget_bytes:
        if request.prefill_chunk is not None:
            return _Remedy("a smaller --prefill-chunk, or none")
        layers = range(request.resident_layers or 0, -1, -1)
        fits = next(n for n in layers if needs(replace(request, resident_layers=n)) <= budget_bytes)
        return _Remedy(f"--resident {fits}, or none: as many as fit stay then")
    found = _smaller_cache(least, budget_bytes, needs)
    if found is None:
        return _Remedy(f"--vram {_rounded_up(plan.device_bytes)}")
    forced = {"--resident": request.resident_layers, "--prefill-chunk": request.prefill_chunk}
    forced_names = " and ".join(name for name, value in forced.items() if value)
    return replace(found, options=found.options + (f", without {forced_names}" if forced_names else ""))


def _smaller_cache(request: Request, budget_bytes: int, needs: Callable[[Request], int]) -> _Remedy | None:
    """The most bits, and the longest context, with which alone a run fits; None if neither does.

    Args:
        needs: bytes of a request.
    """
    options = []
    for bits in range(min(math.ceil(request.cache.bits) - 1, 4), request.cache.fewest_bits - 1, -1):
        needed_bytes = needs(replace(request, cache=replace(request.cache, bits=bits)))
        if needed_bytes <= budget_bytes:
            options.append(f"--bits {bits} (needs {format_size(needed_bytes)})")
            break
    low, high = 0, request.context // _CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if needs(replace(request, context=_CONTEXT_STEP * middle)) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    context = _CONTEXT_STEP * low
    if context:
        options.append(f"--context {context} (needs {format_size(needs(replace(request, context=context)))})")
    return _Remedy(" or ".join(options), context or None) if options else None
