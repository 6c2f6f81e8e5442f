"""Plan: every byte of a run and where it lives, computed from headers and budgets before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer

from streamer.architecture import Architecture, Unit, aligned, head_slices
from streamer.errors import DoesNotFitError
from streamer.options import format_size
from turboquant.hf import FLOAT32_SCORE_BYTES, attention_of, layer_shape, plain_cache_layers
from turboquant.policy import Precision, layer_precisions
from turboquant.store import StoreOptions, store_bytes

# Ring over the streamed units of the largest layer: 1.0 runs at full link rate in a simulation of the schedule, the
# rest covers jitter of the thread that issues the copies.
_RING_LAYERS = 1.2

# CUDA context, loaded kernels and library handles: what the driver counts for the process beside torch's allocator.
# Measured on an H100 with CUDA 13: 777 MiB once cuBLAS, SDPA and copies have run.
CONTEXT_BYTES = 800 << 20

# cuBLAS takes 32 MiB a stream on Hopper, 8 MiB before; the allocator rounds blocks and keeps small pools.
_WORKSPACE_BYTES = 64 << 20

# Page-locked slots through which residents and files pass (four of 64 MiB).
STAGING_BYTES = 256 << 20

# Chunks of a prompt that the planner tries, largest first.
PREFILL_CHUNKS = (2048, 1024, 512, 256, 128)

# Pieces in which a store codes and decodes (4096 tokens), as float32 arrays held at once in the plain PyTorch path.
_CODING_TOKENS, _CODING_ARRAYS = 4096, 10


@dataclass(frozen=True)
class CacheSettings:
    """How the KV cache is kept; see turboquant.TurboQuantCache."""

    bits: int = 16
    key_bits: int | None = None
    value_bits: int | None = None
    protected_layers: tuple[int, ...] = ()
    window: int = 128
    sinks: int = 4


@dataclass(frozen=True)
class Request:
    """What a run asks for.

    Attributes:
        context: tokens of a row, prompt and answer. batch: rows.
        prompt: longest prompt, in tokens; None = context.
        vram_bytes: budget of the whole process on the device; None = no device (CPU).
        ram_bytes: budget of host memory for weights.
        resident_layers: layers that stay on the device; None = as many as fit.
        prefill_chunk: tokens of a prompt chunk; None = chosen.
        cache: CacheSettings.
    """

    context: int
    batch: int = 1
    prompt: int | None = None
    vram_bytes: int | None = None
    ram_bytes: int = 0
    resident_layers: int | None = None
    prefill_chunk: int | None = None
    cache: CacheSettings = CacheSettings()

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that the plan makes room for."""
        return self.prompt if self.prompt is not None else self.context


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
        host: "map" (views on the files), "pinned" or "staged".
        terms: lines of the report; their sum by place is the prediction.
        kv_bytes: exact size of the cache's tensors when it holds `context` tokens (key biases included).
        layers_resident: decoder layers none of whose units streams.
        streamed_bytes: over the link per pass.
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

    def bytes_at(self, where: str) -> int:
        """Sum of the terms of one place."""
        return sum(term.nbytes for term in self.terms if term.where == where)

    @property
    def device_bytes(self) -> int:
        """Predicted peak of the process on the device."""
        return self.bytes_at("device")


def cache_bytes(architecture: Architecture, request: Request) -> int:
    """Bytes of the cache's tensors with room for request.context tokens of request.batch rows, key biases apart."""
    config, cache, item = architecture.decoder_config, request.cache, architecture.dtype.itemsize
    plain = plain_cache_layers(config)
    precisions = layer_precisions(
        len(plain),
        bits=cache.bits,
        key_bits=cache.key_bits,
        value_bits=cache.value_bits,
        protected_layers=cache.protected_layers,
    )
    total = 0
    for i, (layer, precision) in enumerate(zip(plain, precisions, strict=True)):
        shape = layer_shape(config, i)
        width = shape.num_kv_heads * (shape.key_dim + shape.value_dim) * item
        if isinstance(layer, DynamicSlidingWindowLayer):
            total += request.batch * width * min(request.context, layer.sliding_window - 1)
        elif precision == Precision(16, 16):
            total += request.batch * width * request.context
        else:
            options = StoreOptions(precision, cache.window, cache.sinks, capacity_tokens=request.context)
            total += store_bytes(
                request.context, request.batch, shape.num_kv_heads, shape.key_dim, shape.value_dim, options, item
            )
    return total


def make_plan(architecture: Architecture, request: Request, *, key_bias_bytes: int = 0) -> Plan:
    """The plan of a run.

    Raises:
        DoesNotFitError: with every term, and the nearest setting that fits.
    """
    kv_bytes = cache_bytes(architecture, request) + key_bias_bytes
    if request.vram_bytes is None:
        return _host_plan(architecture, request, kv_bytes)
    chunks = [request.prefill_chunk] if request.prefill_chunk is not None else list(PREFILL_CHUNKS)
    # the largest chunk that costs no layer its place would need a search; the largest that fits a streamed run does
    for chunk in chunks:
        plan = _device_plan(architecture, request, kv_bytes, chunk)
        if plan.device_bytes <= request.vram_bytes:
            return plan
    raise _does_not_fit(architecture, request, key_bias_bytes, plan)


def _host_plan(architecture: Architecture, request: Request, kv_bytes: int) -> Plan:
    units = (*(u for layer in architecture.layers for u in layer), *head_slices(architecture.head, 1 << 62))
    parameters = [*(p for unit in units for p in unit.parameters), *architecture.resident, architecture.embedding]
    if architecture.is_tied:
        parameters.remove(architecture.head)
    as_stored = sum(p.nbytes for p in parameters if p.is_stored_as_run)
    made = sum(p.nbytes for p in parameters if not p.is_stored_as_run)
    chunk = request.prefill_chunk or PREFILL_CHUNKS[0]
    notes = []
    if made:
        notes.append(
            f"{format_size(made)} of weights are not stored as they run (dtype or layout): converted once, in memory"
        )
    terms = (
        Term("weights read from the files' maps", "file", as_stored),
        Term("weights converted in memory", "host", made),
        Term("KV cache", "host", kv_bytes),
        Term("activations", "host", _activation_bytes(architecture, request, chunk)),
    )
    plan = Plan(
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
    if plan.bytes_at("host") > request.ram_bytes:
        raise DoesNotFitError(
            f"the run needs {format_size(plan.bytes_at('host'))} of host memory and {format_size(request.ram_bytes)} "
            f"may be used.\n  {_listed(plan, 'host')}\n"
            f"  Try a smaller --context, fewer --bits, --dtype auto, or a larger --ram."
        )
    return plan


def _device_plan(architecture: Architecture, request: Request, kv_bytes: int, chunk: int) -> Plan:
    budget = request.vram_bytes or 0
    layer_units = [unit for layer in architecture.layers for unit in layer]
    owner = [i for i, layer in enumerate(architecture.layers) for _ in layer]
    small = sum(aligned(p.nbytes) for p in architecture.resident)
    ring_full = _ring_bytes(architecture)
    fixed = [
        Term("CUDA context and kernels", "device", CONTEXT_BYTES),
        Term("norms and other small weights", "device", small),
        Term("KV cache", "device", kv_bytes),
        Term("activations", "device", _activation_bytes(architecture, request, chunk)),
        Term("workspaces and rounding", "device", _WORKSPACE_BYTES),
    ]
    left = budget - sum(term.nbytes for term in fixed)
    head_whole = head_slices(architecture.head, 1 << 62)
    head_bytes = head_whole[0].nbytes
    everything = sum(unit.nbytes for unit in layer_units) + head_bytes
    forced = request.resident_layers
    notes: list[str] = []
    if everything <= left and (forced is None or forced >= architecture.num_layers):
        units = (*layer_units, *head_whole)
        resident = frozenset(range(len(units)))
        ring = 0
    else:
        head_resident = head_bytes <= left - ring_full
        # slices no larger than the largest unit of a layer: the ring has room for them already
        largest = max(unit.nbytes for unit in layer_units)
        head_units = head_whole if head_resident else head_slices(architecture.head, largest)
        if not head_resident:
            notes.append(f"the output matrix ({format_size(head_bytes)}) streams in {len(head_units)} slices")
        units = (*layer_units, *head_units)
        head_indices = range(len(layer_units), len(units))
        spare = left - ring_full - (head_bytes if head_resident else 0)
        chosen = _choose_resident(architecture, layer_units, owner, spare, forced)
        resident = frozenset(chosen | (set(head_indices) if head_resident else set()))
        streamed = [unit.nbytes for i, unit in enumerate(units) if i not in resident]
        ring = min(ring_full, sum(streamed))
    resident_bytes = sum(unit.nbytes for i, unit in enumerate(units) if i in resident)
    streamed_bytes = sum(unit.nbytes for i, unit in enumerate(units) if i not in resident)
    streaming_layers = {owner[i] for i in range(len(layer_units)) if i not in resident}
    pinned = streamed_bytes
    host = "pinned" if pinned <= request.ram_bytes else "staged"
    staged_bytes = STAGING_BYTES
    if host == "staged":
        notes.append(
            f"host memory: {format_size(pinned)} of streamed weights do not fit the {format_size(request.ram_bytes)} "
            "that may be used; they are read from the files in every pass"
        )
    terms = (
        *fixed[:2],
        Term("resident layers and head", "device", resident_bytes),
        Term("ring of streamed weights", "device", ring),
        *fixed[2:],
        Term("page-locked weights", "host", pinned if host == "pinned" else 0),
        Term("page-locked staging slots", "host", staged_bytes if host == "staged" or resident else 0),
        Term("embedding table (read from the files' maps)", "file", architecture.embedding.nbytes),
    )
    return Plan(
        request=request,
        units=units,
        resident=resident,
        ring_bytes=ring,
        prefill_chunk=chunk,
        host=host,
        terms=terms,
        kv_bytes=kv_bytes,
        layers_resident=architecture.num_layers - len(streaming_layers),
        streamed_bytes=streamed_bytes,
        notes=tuple(notes),
    )


def _ring_bytes(architecture: Architecture) -> int:
    layers = [sum(unit.nbytes for unit in layer) for layer in architecture.layers]
    largest_unit = max(unit.nbytes for layer in architecture.layers for unit in layer)
    return aligned(max(int(_RING_LAYERS * max(layers)), max(layers) + largest_unit // 4))


def _choose_resident(
    architecture: Architecture, units: Sequence[Unit], owner: Sequence[int], spare: int, forced: int | None
) -> set[int]:
    """Units that stay, spread evenly over the layers: then a pass takes max(copy, compute), whatever their ratio."""
    count = architecture.num_layers
    layer_bytes = [sum(unit.nbytes for unit in layer) for layer in architecture.layers]
    streaming = count if forced is None else count - min(forced, count)
    streams = _spread(streaming, count)
    if forced is None:
        # fewest streamed layers whose complement fits: sizes are nearly equal, so walk down from all streamed
        while streaming and sum(b for i, b in enumerate(layer_bytes) if not _spread(streaming - 1, count)[i]) <= spare:
            streaming -= 1
        streams = _spread(streaming, count)
    chosen = {i for i in range(len(units)) if not streams[owner[i]]}
    if forced is None:
        spare -= sum(units[i].nbytes for i in chosen)
        for i in sorted(range(len(units)), key=lambda i: -units[i].nbytes):
            if i not in chosen and units[i].nbytes <= spare:
                chosen.add(i)
                spare -= units[i].nbytes
    return chosen


def _spread(streaming: int, count: int) -> list[bool]:
    """Which of `count` layers stream when `streaming` of them do, evenly spread."""
    return [(i + 1) * streaming // count > i * streaming // count for i in range(count)]


def _activation_bytes(architecture: Architecture, request: Request, chunk: int) -> int:
    """Largest sum of temporary tensors of a run: a prompt chunk inside a layer, or coding and decoding the cache."""
    config: Any = architecture.decoder_config  # each family has its own attributes
    item = architecture.dtype.itemsize
    prompt, batch = request.longest_prompt, request.batch
    tokens = batch * min(chunk if architecture.uses_own_attention else prompt, prompt)
    hidden = int(config.hidden_size)
    shapes = [layer_shape(config, i) for i in range(architecture.num_layers)]
    kv_width = max(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    q_width = int(config.num_attention_heads) * max(shape.key_dim for shape in shapes)
    inner = _inner_width(architecture)
    in_norm = tokens * hidden * (2 * item + 8)
    in_attention = tokens * (2 * hidden + 5 * q_width + 3 * kv_width) * item
    in_mlp = tokens * (2 * hidden + 4 * inner) * item
    of_prompt = 2 * batch * prompt * hidden * item + prompt * 6 * max(shape.key_dim for shape in shapes) * item
    # a layer's exact keys and values: a buffer for all chunks of the prompt, beside those of the chunk
    exact = batch * prompt * kv_width * item if prompt > chunk else 0
    coding = min(_CODING_TOKENS, request.context) * max(1, kv_width // 2) * 4 * _CODING_ARRAYS
    widths = (request.cache.bits, request.cache.key_bits or 16, request.cache.value_bits or 16)
    is_compressed = min(widths) < 16
    # transformers' sliding layers keep a view of the whole last chunk until the next call
    sliding = sum(
        batch * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * item * min(chunk, prompt)
        for shape, layer in zip(shapes, plain_cache_layers(config), strict=True)
        if isinstance(layer, DynamicSlidingWindowLayer)
    )
    # attention with softcap or learned sinks: float32 keys and values of a row, and a few arrays of scores
    in_float32 = 0
    if has_float32_attention(architecture):
        in_float32 = 2 * request.context * kv_width * 4 + 4 * FLOAT32_SCORE_BYTES
    logits = batch * architecture.head.shape[0] * (item + 12)
    peak_of_layer = max(in_norm, in_attention + in_float32, in_mlp)
    return of_prompt + exact + sliding + max(peak_of_layer, (coding if is_compressed else 0)) + logits


def has_float32_attention(architecture: Architecture) -> bool:
    """Whether attention scores are soft-capped or take learned sinks, which no fused kernel of torch does."""
    config: Any = architecture.decoder_config
    attention = attention_of(architecture.layer_modules[0])
    return getattr(config, "attn_logit_softcapping", None) is not None or hasattr(attention, "sinks")


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


def _listed(plan: Plan, where: str) -> str:
    return ", ".join(f"{t.name} {format_size(t.nbytes)}" for t in plan.terms if t.where == where and t.nbytes)


def _does_not_fit(architecture: Architecture, request: Request, key_bias_bytes: int, smallest: Plan) -> DoesNotFitError:
    budget = request.vram_bytes or 0
    return DoesNotFitError(
        f"the run needs {format_size(smallest.device_bytes)} of GPU memory and {format_size(budget)} may be used.\n"
        f"  {_listed(smallest, 'device')}\n  Try {_nearest(architecture, request, key_bias_bytes, smallest)}"
    )


def _nearest(architecture: Architecture, request: Request, key_bias_bytes: int, smallest: Plan) -> str:
    """The nearest change of one setting that fits."""
    budget = request.vram_bytes or 0

    def needs(context: int, cache: CacheSettings) -> int:
        changed = Request(
            context=context,
            batch=request.batch,
            prompt=min(request.longest_prompt, context),
            vram_bytes=budget,
            ram_bytes=request.ram_bytes,
            resident_layers=0,
            cache=cache,
        )
        kv_bytes = cache_bytes(architecture, changed) + key_bias_bytes
        return _device_plan(architecture, changed, kv_bytes, PREFILL_CHUNKS[-1]).device_bytes

    if needs(request.context, request.cache) <= budget:
        return "--resident 0 without --prefill-chunk."
    low, high = 0, request.context // 64
    while low < high:
        middle = (low + high + 1) // 2
        if needs(64 * middle, request.cache) <= budget:
            low = middle
        else:
            high = middle - 1
    if low:
        return f"--context {64 * low} (needs {format_size(needs(64 * low, request.cache))})."
    if request.cache.bits > 4:
        fewer = CacheSettings(bits=4)
        if needs(request.context, fewer) <= budget:
            return f"--bits 4 (needs {format_size(needs(request.context, fewer))})."
    gib = 2**30
    return f"--vram {-(-smallest.device_bytes * 4 // gib) / 4:g}GiB."
