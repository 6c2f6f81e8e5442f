"""StreamingEngine: generate, stream, chat and report over a model that is larger than the device."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from streamer.architecture import Architecture, bytes_of, read_architecture, reason_of
from streamer.checkpoint import Checkpoint
from streamer.codec import LikelyWeights, as_if_packed, make_plan_with_codec, open_packed, pack_for_run
from streamer.devices import find_device
from streamer.errors import ContextLengthError, DoesNotFitError, OptionError, UnsupportedModelError
from streamer.forecast import Lever, Machine, machine_of_run, next_lever
from streamer.generation import StopWhen, TokenSink, generation_config, seeded
from streamer.options import AUTO_CODEC, LOSSLESS, parse_dtype, parse_size
from streamer.plan import (
    CONTEXT_BYTES,
    SPARE_VRAM_BYTES,
    CacheSettings,
    Plan,
    Request,
    cache_bytes,
    is_compressed,
)
from streamer.report import MemoryReport, build_report
from streamer.resolve import resolve_model
from streamer.runtime import Runtime, build_runtime, measured_context_bytes
from streamer.stats import RunStats
from streamer.text import TextPieces
from streamer.weights import PackedWeights, current_device
from turboquant.ops.devices import kernels_serve
from turboquant.policy import AUTO_DECAY, NO_DECAY

logger = logging.getLogger("streamer")

# Context that is planned for when neither the user nor a prompt says one.
DEFAULT_CONTEXT = 4096

# Share of the free host memory that page-locked weights may take when no budget is given.
_RAM_SHARE = 0.9


class StreamingEngine:
    """Runs a language model whose weights stay in host memory or on disk and visit the device layer by layer.

    Args:
        model: a folder, a hub id ("org/name") or a short name ("Qwen2.5-14B").
        bits: width of the KV cache: 2, 2.5 (3-bit keys, 2-bit values), 3, 3.5, 4, or 16 for uncompressed.
        key_bits, value_bits: override one side. layer_bits: other widths for some layers, as in "0-3:4,-1:4/3".
        protected_layers: layers whose cache stays uncompressed.
        decay: from which ages on tokens keep fewer bits of the cache, as in "4096:3,32768:2"; "off" = all keep theirs,
            "auto" = as few tokens as possible age, and only where the cache would not fit otherwise.
        vram: budget of the whole process on the device, e.g. "8GiB"; default: what is free.
        ram: budget of the process's host memory, e.g. "32GiB", pages of files apart (the system takes those back), and
            on the CPU what Python and its libraries take; default: 90 % of what is free, no limit on the CPU.
        device: "cuda", "cuda:1" or "cpu"; default: CUDA if there is one.
        dtype: "auto" (as the checkpoint is stored), "bfloat16", "float16" or "float32".
        context: tokens of prompt and answer to make room for; default: what a call needs.
        prefill_chunk: tokens of a prompt that go through a layer at a time; default: chosen by the plan.
        resident: layers that stay on the device; default: as many as fit; 0 = stream every layer.
        direct_io: read weights around the page cache; default: where it could not hold what is read in every pass.
        codec: "lossless" keeps and moves weights as `tq-stream pack` codes them, and decodes them on the device just
            before use; a checkpoint that has not been packed is, before the model is assembled. "raw" does not; "auto"
            does where it has been packed and some would stream otherwise.
        offline: never use the network.
        on_note: called with each automatic choice, one line; default: logged as a warning of logger "streamer".
    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, OptionError: as their names say.
        DoesNotFitError: the budgets are too small for one token, or, at a call, for what it needs.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        bits: float = 4,
        key_bits: int | None = None,
        value_bits: int | None = None,
        layer_bits: str = "",
        protected_layers: Sequence[int] = (),
        decay: str = NO_DECAY,
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        prefill_chunk: int | None = None,
        resident: int | None = None,
        direct_io: bool | None = None,
        codec: str = AUTO_CODEC,
        offline: bool = False,
        on_note: Callable[[str], None] | None = None,
    ):
        self.stats = RunStats(on_note=on_note or logger.warning)
        self._device = find_device(device)
        _check_layout(context, prefill_chunk, resident)
        for name, value in (("vram", vram), ("resident", resident), ("direct_io", direct_io)):
            if value is not None and self._device.type == "cpu":
                raise OptionError(f"{name} is for a GPU and this run is on the CPU: leave it out")
        if codec == LOSSLESS and self._device.type == "cpu":
            raise OptionError("--codec lossless is for a GPU and this run is on the CPU: leave it out")
        self._vram = parse_size(vram) if vram is not None else None
        self._ram = parse_size(ram) if ram is not None else None
        self._dtype = parse_dtype(str(dtype).removeprefix("torch."))
        self._context, self._prefill_chunk, self._resident = context, prefill_chunk, resident
        self._direct_io = direct_io
        self._cache_settings = CacheSettings(
            bits, key_bits, value_bits, layer_bits, tuple(protected_layers), decay=decay
        )
        resolved = resolve_model(str(model), offline=offline, on_line=self.stats.note)
        self.folder = resolved.folder
        self._checkpoint = Checkpoint.open(self.folder)
        self._name, self._codec = str(model), codec
        self._packed = open_packed(self._checkpoint, codec, self._device, on_note=self.stats.note)
        self._architecture: Architecture | None = self._read_architecture()
        self._config = self._architecture.decoder_config
        self.stats.num_layers = self._architecture.num_layers
        self._runtime: Runtime | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lock = threading.RLock()  # one generation at a time: its weights and gates are shared
        if context is not None and context > self.max_context:
            raise _context_error(context, self.max_context)
        self._fitted(self._architecture, self._request(1, 1))  # options that can never fit are refused here

    # ------------------------------------------------------------- properties
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except Exception as error:  # a damaged tokenizer file makes transformers raise anything
                raise UnsupportedModelError(
                    f"{self.folder} has no tokenizer that can be used: {reason_of(error)} "
                    "Download the tokenizer files of this checkpoint again."
                ) from error
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model: `engine.model.generate(...)` works as users know it, with a compressed cache."""
        if self._runtime is None:
            self._ensure(self._context or min(self.max_context, DEFAULT_CONTEXT), 1)
        assert self._runtime is not None  # noqa: S101  _ensure sets it or raises
        return self._runtime.model

    def assemble(self, context: int, batch: int = 1) -> PreTrainedModel:
        """The transformers model, assembled with room for `context` tokens of each of `batch` rows.

        Raises:
            ContextLengthError: the model was not made for that many tokens. DoesNotFitError: they do not fit.
        """
        if context > self.max_context:
            raise _context_error(context, self.max_context)
        with self._lock:
            return self._ensure(context, batch).model

    @property
    def plan(self) -> Plan | None:
        """The plan of the assembled model; None before the first call."""
        return self._runtime.plan if self._runtime is not None else None

    @property
    def device(self) -> torch.device:
        """Where the model is computed."""
        return self._device

    @property
    def link_bytes_per_s(self) -> float | None:
        """Rate of copies from page-locked memory to the device, measured at assembly; None before, or on the CPU."""
        return self._runtime.link_bytes_per_s if self._runtime is not None else None

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for."""
        return model_context(self._config)

    # ------------------------------------------------------------- generation
    def generate(self, prompt: str, *, chat_template: bool = True, **options: Any) -> str:
        """The answer to a prompt.

        Args:
            prompt: text; wrapped in the model's chat template when it has one.
            chat_template: False gives the model the bare text.
            options: max_new_tokens (256), temperature (the model's own default; 0 = greedy), top_p, top_k, seed.
        Raises:
            ContextLengthError: the prompt is longer than the model's context or `context`. OptionError: a bad option.
        """
        return self.generate_ids(self.encode(prompt, chat_template=chat_template), **options)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The answer to a conversation: [{"role": "user", "content": ...}, ...]; options as in generate."""
        return self.generate_ids(self.encode_messages(messages), **options)

    def stream(self, prompt: str, *, chat_template: bool = True, **options: Any) -> Iterator[str]:
        """The answer in pieces of text, each as soon as its characters are complete; options as in generate."""
        ids = self.encode(prompt, chat_template=chat_template)
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def work() -> None:
            try:
                self.generate_ids(ids, on_text=pieces.put, stop=stopped.is_set, **options)
                pieces.put(None)
            except BaseException as error:  # noqa: BLE001  handed to the caller's thread, which raises it
                pieces.put(error)

        worker = threading.Thread(target=work, name="tq-stream-generate", daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    try:
                        raise piece
                    finally:
                        del piece  # its traceback refers to this frame, and holds the cache
                yield piece
        finally:
            stopped.set()  # the caller may have left early
            worker.join()

    def encode(self, prompt: str, *, chat_template: bool = True) -> list[int]:
        """Token ids of a prompt, in the model's chat template when it has one and it is wanted."""
        if not isinstance(prompt, str):
            raise OptionError(f"a prompt is text; got {type(prompt).__name__}")
        if chat_template and self.tokenizer.chat_template:
            return self.encode_messages([{"role": "user", "content": prompt}])
        return list(cast(Any, self.tokenizer(prompt))["input_ids"])

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        if not self.tokenizer.chat_template:
            raise OptionError(f"{self.folder.name} has no chat template; use generate or run with a plain prompt")
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise OptionError('messages are a list such as [{"role": "user", "content": "..."}], not empty')
        try:
            encoded = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template is a program of the checkpoint's: it may raise anything
            raise OptionError(f"the chat template of {self.folder} refuses the messages: {reason_of(error)}") from error
        return list(cast(Any, encoded)["input_ids"])

    def generate_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> str:
        """The answer to token ids; on_text gets its pieces as they come, and stop() ends it early."""
        with self._lock:
            new_tokens = self._checked_lengths(len(ids), max_new_tokens)
            generation = generation_config(
                self._own_generation_config(),
                self.tokenizer,
                new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            runtime = self._ensure(len(ids) + new_tokens, 1)
            pieces = TextPieces(self.tokenizer)
            sink = TokenSink(self.stats, pieces, on_text, runtime.weights)
            tokens = torch.tensor([list(ids)])
            vocabulary = runtime.architecture.embedding.shape[0]
            if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
                raise OptionError(f"token ids go from 0 to {vocabulary - 1}; got {tokens.min()} to {tokens.max()}")
            criteria = StoppingCriteriaList([StopWhen(stop)]) if stop is not None else None
            moved = runtime.weights.bytes_moved
            runtime.caches.capacity_tokens = len(ids) + new_tokens  # in exact size, whatever the plan has room for
            self.stats.start(len(ids))
            try:
                with seeded(seed), current_device(self._device):
                    cast(Any, runtime.model).generate(
                        tokens.to(self._device),
                        attention_mask=torch.ones_like(tokens).to(self._device),
                        generation_config=generation,
                        streamer=sink,
                        stopping_criteria=criteria,
                    )
            finally:
                self.stats.bytes_moved = runtime.weights.bytes_moved - moved
                runtime.caches.capacity_tokens = runtime.caches.planned_tokens
                text = pieces.finish()
                if text and on_text is not None:
                    on_text(text)
            return pieces.text

    def _checked_lengths(self, prompt: int, new: int) -> int:
        if prompt == 0:
            raise OptionError("the prompt is empty: give at least one token of text")
        if new < 1:
            raise OptionError(f"max_new_tokens must be at least 1; got {new}")
        limit = min(self.max_context, self._context or self.max_context)
        name = "its context" if limit == self.max_context else "--context"
        if prompt >= limit:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and {name} is {limit}: shorten it"
                + ("" if limit == self.max_context else f" or raise --context (up to {self.max_context})"),
                largest_context=limit,
            )
        if prompt + new > limit:
            self.stats.note(f"answer limited to {limit - prompt} tokens: {name} is {limit}")
            return limit - prompt
        return new

    def _own_generation_config(self) -> GenerationConfig:
        model = self._runtime.model if self._runtime is not None else self._read_model()
        config = model.generation_config
        if config is None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot generate")
        return config

    def _read_model(self) -> PreTrainedModel:
        if self._architecture is None:
            self._architecture = self._read_architecture()
        return self._architecture.model

    # --------------------------------------------------------------- assembly
    def _read_architecture(self) -> Architecture:
        architecture = read_architecture(self.folder, self._checkpoint, dtype=self._dtype)
        for line in architecture.notes:
            self.stats.note(line)
        return architecture

    def _request(self, context: int, batch: int) -> Request:
        vram = None
        if self._device.type == "cuda":
            vram = self._vram if self._vram is not None else self._free_vram()
        free = free_ram()
        ram = self._ram
        if ram is None:
            # on the CPU without a budget, what is converted may use swap: the system decides, not a guess of ours
            ram = 1 << 62 if self._device.type == "cpu" else int(_RAM_SHARE * free) + _held_bytes()
        return Request(
            context=self._context or context,
            batch=batch,
            vram_bytes=vram,
            ram_bytes=ram,
            free_ram_bytes=free,
            direct_io=self._direct_io,
            resident_layers=self._resident,
            prefill_chunk=self._prefill_chunk,
            cache=self._cache_settings,
        )

    def _free_vram(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(free) + idle + CONTEXT_BYTES - SPARE_VRAM_BYTES

    def _ensure(self, context: int, batch: int) -> Runtime:
        """A runtime with room for `context` tokens of `batch` rows; the present one where it has."""
        if self._runtime is not None:
            planned = self._runtime.plan.request
            if self._device.type == "cpu" or (context <= planned.context and batch <= planned.batch):
                return self._runtime
            self.stats.note("a longer context than planned: the model is laid out anew")
            self._close_runtime()
        architecture = self._architecture or self._read_architecture()
        biases = architecture.key_biases(self._checkpoint)
        held = bytes_of(biases, on_gpu=self._device.type == "cuda")
        own, plan = self._plan(architecture, context, batch, held)
        if isinstance(self._packed, LikelyWeights) and plan.is_coded:  # what cannot fit has been refused by now
            self._packed = self._pack()
            own, plan = self._plan(architecture, context, batch, held)
        architecture = own
        for line in plan.notes:
            self.stats.note(line)
        if is_compressed(architecture, plan.request.cache) and kernels_serve(self._device):
            self.stats.note(
                "kernels read the compressed cache: the first run on a machine compiles them, up to a minute in all"
            )
        self._architecture = None  # its model is about to be changed in place
        has_cap = self._vram is not None
        with current_device(self._device):  # page-locking, too, makes a context where none is
            self._runtime = build_runtime(
                architecture,
                plan,
                biases,
                self._checkpoint,
                self._device,
                self.stats,
                has_cap=has_cap,
                packed=self._packed if isinstance(self._packed, PackedWeights) else None,
            )
        return self._runtime

    def pack(self) -> None:
        """Packs the checkpoint now if the first assembly would (see `codec`): for callers that time assemblies."""
        if isinstance(self._packed, LikelyWeights) and as_if_packed(self._architecture or self._read_architecture()):
            self._packed = self._pack()

    def _pack(self) -> PackedWeights:
        report = self.stats.on_progress
        return pack_for_run(
            self._checkpoint,
            self._device,
            ram_bytes=self._request(1, 1).ram_bytes,
            on_note=self.stats.note,
            on_progress=None if report is None else partial(report, "packing"),
        )

    def _fitted(
        self, architecture: Architecture, request: Request, key_bias_bytes: int = 0
    ) -> tuple[Architecture, Plan]:
        """A plan, and the architecture with units coded or not as the plan has them."""
        return make_plan_with_codec(architecture, self._packed, self._codec, request, key_bias_bytes=key_bias_bytes)

    def _plan(
        self, architecture: Architecture, context: int, batch: int, key_bias_bytes: int
    ) -> tuple[Architecture, Plan]:
        """A plan with room to spare for the next, longer prompt, or for just this one if no more fits."""
        roomy = max(context, min(self.max_context, DEFAULT_CONTEXT))
        request = self._request(roomy, batch)
        if request.cache.decay == AUTO_DECAY and request.context > context and self._context is None:
            request = replace(request, cache=replace(request.cache, decay=NO_DECAY))  # nothing ages for room to spare
        try:
            return self._fitted(architecture, request, key_bias_bytes)
        except DoesNotFitError:
            if roomy == context or self._context is not None:
                raise
        return self._fitted(architecture, self._request(context, batch), key_bias_bytes)

    # ----------------------------------------------------------------- report
    def memory_report(self, *, link_bytes_per_s: float | None = None) -> MemoryReport:
        """Predicted and, after a generation, measured bytes of every part; and what is known of the speed.

        Args:
            link_bytes_per_s: rate of the link to predict from, and to say what other GPU budgets would buy; without
                it, the rate measured when the model was assembled, and no budgets.
        """
        link = link_bytes_per_s if link_bytes_per_s is not None else self.link_bytes_per_s
        has_budgets = link_bytes_per_s is not None
        if self._runtime is None:
            architecture = self._architecture or self._read_architecture()
            context = self._context or min(self.max_context, DEFAULT_CONTEXT)
            biases = architecture.key_biases(None)
            held = bytes_of(biases, on_gpu=self._device.type == "cuda")
            architecture, plan = self._fitted(architecture, self._request(context, 1), held)
            planned = self._planned(architecture, plan) if has_budgets else None
            return build_report(architecture, plan, None, None, machine=Machine(link), planned=planned)
        runtime, caches = self._runtime, self._runtime.caches
        peak, lever, machine = None, None, machine_of_run(runtime.plan, self.stats, link)
        if self._device.type == "cuda":
            beside = measured_context_bytes(self._device)
            peak = torch.cuda.max_memory_reserved(self._device) + beside
            if self.stats.decode_tokens_per_s:
                lever = self._lever(runtime, machine, beside)
        return build_report(
            runtime.architecture,
            runtime.plan,
            peak,
            caches.last,
            caches.last_capacity,
            machine=machine,
            planned=self._planned(runtime.architecture, runtime.plan) if has_budgets else None,
            lever=lever,
        )

    def _planned(self, architecture: Architecture, plan: Plan) -> Callable[[Request], Plan]:
        """How this engine would plan other requests than that of a plan."""
        held = plan.kv_bytes - cache_bytes(architecture, plan.request)
        return lambda request: self._fitted(architecture, request, held)[1]

    def _lever(self, runtime: Runtime, machine: Machine, context_bytes: int) -> Lever:
        """What would have made the last generation faster, within what this process could have."""
        plan = runtime.plan
        free, _ = torch.cuda.mem_get_info(self._device)
        return next_lever(
            runtime.architecture,
            plan.request,
            plan,
            machine,
            measured_tokens_per_s=self.stats.decode_tokens_per_s,
            device_bytes=int(free) + torch.cuda.memory_reserved(self._device) + context_bytes,
            host_bytes=free_ram() + _held_bytes(),
            needed_tokens=runtime.caches.last_capacity,
            key_bias_bytes=plan.kv_bytes - cache_bytes(runtime.architecture, plan.request),
            packing=self._packing(runtime.architecture),
        )

    def _packing(self, architecture: Architecture) -> tuple[str, Architecture] | None:
        """What packing the weights would change, for the forecast."""
        if self._codec != AUTO_CODEC or self._packed is not None:
            return None
        packed = as_if_packed(architecture)
        return None if packed is None else (f"tq-stream pack {self._name}", packed)

    def close(self) -> None:
        """Give back device and host memory; the engine can be used again, a model taken from it before cannot."""
        with self._lock:
            self._close_runtime()

    def _close_runtime(self) -> None:
        if self._runtime is None:
            return
        self._runtime.close()
        self._runtime = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> "StreamingEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plan_report(
    model: str | Path,
    *,
    vram: str | int,
    bits: float = 4,
    key_bits: int | None = None,
    value_bits: int | None = None,
    layer_bits: str = "",
    protected_layers: Sequence[int] = (),
    decay: str = NO_DECAY,
    ram: str | int | None = None,
    dtype: str = "auto",
    context: int | None = None,
    prefill_chunk: int | None = None,
    resident: int | None = None,
    direct_io: bool | None = None,
    codec: str = AUTO_CODEC,
    offline: bool = False,
    on_note: Callable[[str], None] = logger.warning,
    link_bytes_per_s: float | None = None,
) -> MemoryReport:
    """What a run on a GPU would take, from the checkpoint's headers; this machine needs no GPU, and none is used.

    Args:
        model, bits and so on: as in StreamingEngine. vram: memory of that GPU that the process may take.
        link_bytes_per_s: rate of its link, to predict tokens per second from; None = no prediction.
    Returns:
        a report without measurements.
    Raises:
        as StreamingEngine does, and DoesNotFitError when the plan needs more than `vram`.
    Source: own.
    """
    vram_bytes, run_dtype = parse_size(vram), parse_dtype(dtype)
    free = free_ram() if ram is None else None
    ram_bytes = parse_size(ram) if ram is not None else int(_RAM_SHARE * (free or 0))
    _check_layout(context, prefill_chunk, resident)
    folder = resolve_model(str(model), offline=offline, on_line=on_note).folder
    with Checkpoint.open(folder) as checkpoint:
        architecture = read_architecture(folder, checkpoint, dtype=run_dtype)
        packed = open_packed(checkpoint, codec, None, on_note=on_note)
    limit = model_context(architecture.decoder_config)
    request = Request(
        context=context or min(limit, DEFAULT_CONTEXT),
        vram_bytes=vram_bytes,
        ram_bytes=ram_bytes,
        free_ram_bytes=free,
        direct_io=direct_io,
        resident_layers=resident,
        prefill_chunk=prefill_chunk,
        cache=CacheSettings(bits, key_bits, value_bits, layer_bits, tuple(protected_layers), decay=decay),
    )
    if request.context > limit:
        raise _context_error(request.context, limit)
    held = bytes_of(architecture.key_biases(None), on_gpu=True)

    def planned(wanted: Request) -> tuple[Architecture, Plan]:
        return make_plan_with_codec(architecture, packed, codec, wanted, key_bias_bytes=held)

    own, plan = planned(request)
    for line in (*own.notes, *plan.notes):
        on_note(line)
    machine = Machine(link_bytes_per_s)
    return build_report(own, plan, None, None, machine=machine, planned=lambda wanted: planned(wanted)[1])


def free_ram(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can still be taken, in bytes: what the system has, or a container's limit leaves.

    Args:
        cgroup: where the control group of the process shows its limits (version 2).
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        # pages of files count as used, and the system takes them back
        files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
        return free if limit == "max" else min(free, max(0, int(limit) - used + files))
    except (OSError, ValueError):  # no such limits here
        return free


def _held_bytes() -> int:
    """Host memory that this process holds by now, pages of files apart."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _context_error(context: int, limit: int) -> ContextLengthError:
    """The error of a context beyond what the model was made for."""
    return ContextLengthError(
        f"a context of {context} tokens was asked for and the model was made for {limit}: give --context {limit} or "
        "less",
        largest_context=limit,
    )


def _check_layout(context: int | None, prefill_chunk: int | None, resident: int | None) -> None:
    for name, value in (("context", context), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1 token; got {value}")
    if resident is not None and resident < 0:
        raise OptionError(f"resident must be 0 or more layers; got {resident}")


def model_context(config: PreTrainedConfig) -> int:
    """Tokens that a model was made for: what its config says, stretched by YaRN where it says that."""
    limit = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings") and rope.get("factor"):
        return max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit
