"""StreamingEngine: generate, stream, chat and report over a model that is larger than the device."""

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from streamer.architecture import Architecture, read_architecture, read_parameter
from streamer.checkpoint import Checkpoint
from streamer.errors import ContextLengthError, OptionError, UnsupportedModelError
from streamer.model import CacheMaker, Gate, RunSettings, assemble
from streamer.options import parse_dtype, parse_size
from streamer.plan import CONTEXT_BYTES, CacheSettings, Plan, Request, make_plan
from streamer.report import MemoryReport, build_report
from streamer.resolve import resolve_model
from streamer.stats import RunStats
from streamer.text import TextPieces
from streamer.weights import DeviceWeights, MappedWeights, PinnedSource, StagedSource, UnitReader
from turboquant import KeyBias
from turboquant.hf import TurboQuantCache, attention_of, key_bias_of, rotary_of

logger = logging.getLogger("streamer")

# Context that is planned for when neither the user nor a prompt says one.
DEFAULT_CONTEXT = 4096

# Device memory left to others when no budget is given.
_SPARE_VRAM_BYTES = 512 << 20

# Share of the free host memory that page-locked weights may take when no budget is given.
_RAM_SHARE = 0.9


@dataclass
class _Runtime:
    """A model assembled for one plan."""

    plan: Plan
    architecture: Architecture
    model: PreTrainedModel
    weights: DeviceWeights | MappedWeights
    settings: RunSettings
    key_biases: list[KeyBias | None]

    def abort(self) -> None:
        """After an error in mid-pass: every unit is where a new pass expects it."""
        self.weights.abort()
        for layer in self.model.get_submodule(self.architecture.layer_path):  # type: ignore[union-attr]
            for gate in layer._gates:
                _close_gate(gate)


def _close_gate(gate: Gate) -> None:
    gate.is_open, gate.is_last_use = False, True


class StreamingEngine:
    """Runs a language model whose weights stay in host memory or on disk and visit the device layer by layer.

    Args:
        model: a folder, a hub id ("org/name") or a short name ("Qwen2.5-14B").
        bits: width of the KV cache: 2, 3, 4, or 16 for uncompressed. key_bits, value_bits: override one side.
        protected_layers: layers whose cache stays uncompressed.
        vram: budget of the whole process on the device, e.g. "8GiB"; default: what is free.
        ram: budget of host memory for weights, e.g. "32GiB"; default: 90 % of what is free.
        device: "cuda", "cuda:1" or "cpu"; default: CUDA if there is one.
        dtype: "auto" (as the checkpoint is stored), "bfloat16", "float16" or "float32".
        context: tokens of prompt and answer to make room for; default: what a call needs.
        prefill_chunk: tokens of a prompt that go through a layer at a time; default: chosen by the plan.
        resident: layers that stay on the device; default: as many as fit; 0 = stream every layer.
        offline: never use the network.
        on_note: called with each automatic choice, one line; default: logged as a warning of logger "streamer".
    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, OptionError: as their names say.
        DoesNotFitError: at the first call that needs more than the budgets.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        bits: int = 4,
        key_bits: int | None = None,
        value_bits: int | None = None,
        protected_layers: Sequence[int] = (),
        vram: str | int | None = None,
        ram: str | int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        prefill_chunk: int | None = None,
        resident: int | None = None,
        offline: bool = False,
        on_note: Callable[[str], None] | None = None,
    ):
        self.stats = RunStats(on_note=on_note or logger.warning)
        self._device = _device(device)
        for name, value in (("context", context), ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1 token; got {value}")
        if resident is not None and resident < 0:
            raise OptionError(f"resident must be 0 or more layers; got {resident}")
        if self._device.type == "cpu" and (vram is not None or resident is not None):
            raise OptionError("vram and resident are for a GPU; this run is on the CPU (use ram to limit host memory)")
        self._vram = parse_size(vram) if vram is not None else None
        self._ram = parse_size(ram) if ram is not None else None
        self._dtype = parse_dtype(dtype)
        self._context, self._prefill_chunk, self._resident = context, prefill_chunk, resident
        self._cache_settings = CacheSettings(bits, key_bits, value_bits, tuple(protected_layers))
        resolved = resolve_model(str(model), offline=offline, on_line=self.stats.note)
        self.folder = resolved.folder
        self._checkpoint = Checkpoint.open(self.folder)
        self._architecture: Architecture | None = self._read_architecture()
        self._config = self._architecture.decoder_config
        self.stats.num_layers = self._architecture.num_layers
        self._runtime: _Runtime | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._last_cache: TurboQuantCache | None = None
        self._capacity: int | None = None
        make_plan(self._architecture, self._request(1, 1, 1))  # options that can never fit are refused here

    # ------------------------------------------------------------- properties
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedModelError(f"{self.folder} has no tokenizer that can be used: {reason}") from error
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model: `engine.model.generate(...)` works as users know it, with a compressed cache."""
        if self._runtime is None:
            self._ensure(self._context or min(self.max_context, DEFAULT_CONTEXT), 1, None)
        assert self._runtime is not None  # noqa: S101  _ensure sets it or raises
        return self._runtime.model

    @property
    def plan(self) -> Plan | None:
        """The plan of the assembled model; None before the first call."""
        return self._runtime.plan if self._runtime is not None else None

    @property
    def max_context(self) -> int:
        """Tokens that the model was made for."""
        return int(getattr(self._config, "max_position_embeddings", None) or 1 << 30)

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
                    raise piece
                yield piece
        finally:
            stopped.set()  # the caller may have left early
            worker.join()

    def encode(self, prompt: str, *, chat_template: bool = True) -> list[int]:
        """Token ids of a prompt, in the model's chat template when it has one and it is wanted."""
        if chat_template and self.tokenizer.chat_template:
            return self.encode_messages([{"role": "user", "content": prompt}])
        return list(self.tokenizer(prompt)["input_ids"])

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the model's answer."""
        if not self.tokenizer.chat_template:
            raise OptionError(f"{self.folder.name} has no chat template; use generate or run with a plain prompt")
        encoded = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

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
        new_tokens = self._checked_lengths(len(ids), max_new_tokens)
        generation = self._generation_config(new_tokens, temperature, top_p, top_k)
        runtime = self._ensure(len(ids) + new_tokens, 1, len(ids))
        pieces = TextPieces(self.tokenizer)
        sink = _Sink(self.stats, pieces, on_text)
        tokens = torch.tensor([list(ids)])
        criteria = StoppingCriteriaList([_Stop(stop)]) if stop is not None else None
        self._capacity = len(ids) + new_tokens
        moved = runtime.weights.bytes_moved
        self.stats.start(len(ids))
        try:
            with _seeded(seed, self._device):
                runtime.model.generate(
                    tokens.to(self._device),
                    attention_mask=torch.ones_like(tokens).to(self._device),
                    generation_config=generation,
                    streamer=sink,
                    stopping_criteria=criteria,
                )
        except BaseException:
            runtime.abort()
            raise
        finally:
            self.stats.bytes_moved = runtime.weights.bytes_moved - moved
            self._capacity = None
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
                + ("" if limit == self.max_context else f" or raise --context (up to {self.max_context})")
            )
        if prompt + new > limit:
            self.stats.note(f"answer limited to {limit - prompt} tokens: {name} is {limit}")
            return limit - prompt
        return new

    def _generation_config(
        self, new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None
    ) -> GenerationConfig:
        base = self._architecture_generation_config()
        config = GenerationConfig(**base.to_diff_dict())
        config.max_new_tokens, config.max_length = new_tokens, None
        if temperature is not None and temperature < 0:
            raise OptionError(f"temperature must be 0 (greedy) or more; got {temperature}")
        if temperature == 0:
            if top_p is not None or top_k is not None:
                raise OptionError("top_p and top_k have no effect at temperature 0; leave them off, or raise it")
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        else:
            if temperature is not None or top_p is not None or top_k is not None:
                config.do_sample = True
            for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
                if value is not None:
                    setattr(config, name, value)
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        ends = config.eos_token_id
        known = ends if isinstance(ends, list) else [] if ends is None else [ends]
        own_end = self.tokenizer.eos_token_id
        config.eos_token_id = sorted({*known, *([own_end] if own_end is not None else [])}) or None
        if config.pad_token_id is None:
            pad = self.tokenizer.pad_token_id
            config.pad_token_id = pad if pad is not None else (config.eos_token_id or [0])[0]
        return config

    def _architecture_generation_config(self) -> GenerationConfig:
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

    def _request(self, context: int, batch: int, prompt: int | None) -> Request:
        vram = None
        if self._device.type == "cuda":
            vram = self._vram if self._vram is not None else self._free_vram()
        ram = self._ram if self._ram is not None else int(_RAM_SHARE * psutil.virtual_memory().available)
        return Request(
            context=self._context or context,
            batch=batch,
            prompt=prompt if self._context is None else None,
            vram_bytes=vram,
            ram_bytes=ram,
            resident_layers=self._resident,
            prefill_chunk=self._prefill_chunk,
            cache=self._cache_settings,
        )

    def _free_vram(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + torch.cuda.memory_reserved(self._device) + CONTEXT_BYTES - _SPARE_VRAM_BYTES

    def _ensure(self, context: int, batch: int, prompt: int | None) -> _Runtime:
        """A runtime with room for the request; the present one where it has."""
        if self._runtime is not None:
            planned = self._runtime.plan.request
            if (
                self._device.type == "cpu"
                or (context <= planned.context and batch <= planned.batch and (prompt or context) <= planned.longest_prompt)
            ):
                return self._runtime
            self.stats.note("a longer context than planned: the model is laid out anew")
            self._close_runtime()
        architecture = self._architecture or self._read_architecture()
        biases = _key_biases(architecture, self._checkpoint)
        request = self._request(context, batch, prompt)
        if self._device.type == "cpu" and self._ram is None:
            # without a budget, what is converted may use swap: the system decides, not a guess of ours
            request = replace(request, ram_bytes=1 << 62)
        bias_bytes = sum(bias.nbytes for bias in biases if bias is not None)
        plan = make_plan(architecture, request, key_bias_bytes=bias_bytes)
        for line in plan.notes:
            self.stats.note(line)
        self._architecture = None  # its model is about to be changed in place
        self._runtime = self._assemble(architecture, plan, biases)
        return self._runtime

    def _assemble(self, architecture: Architecture, plan: Plan, biases: list[KeyBias | None]) -> _Runtime:
        checkpoint, device = self._checkpoint, self._device
        if device.type == "cuda" and self._vram is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (self._vram - CONTEXT_BYTES) / total)), device)
        table = read_parameter(architecture.embedding, checkpoint, architecture.model)
        weights: DeviceWeights | MappedWeights
        if device.type == "cpu":
            known = {architecture.head.name: table} if architecture.is_tied else {}
            weights = MappedWeights(checkpoint, architecture.model, plan.units, known)
        else:
            reader = UnitReader(checkpoint, architecture.model, plan.units)
            staged = StagedSource(reader)
            streamed = [i for i in range(len(plan.units)) if i not in plan.resident]
            source = PinnedSource(reader, streamed) if plan.host == "pinned" and streamed else staged
            weights = DeviceWeights(plan.units, plan.resident, plan.ring_bytes, source, staged, device)
        resident = {
            p.name: read_parameter(p, checkpoint, architecture.model).to(device) for p in architecture.resident
        }
        settings = RunSettings(plan.prefill_chunk, architecture.uses_own_attention)
        model = assemble(architecture, plan.units, weights, resident, table, device, settings, self.stats)
        model._prepare_cache_for_generation = CacheMaker(model, self._make_cache)  # type: ignore[assignment]
        return _Runtime(plan, architecture, model, weights, settings, biases)

    def _make_cache(self) -> TurboQuantCache:
        assert self._runtime is not None  # noqa: S101  called from the runtime's model
        cache = self._cache_settings
        self._last_cache = TurboQuantCache(
            self._runtime.architecture.config,
            cache.bits,
            key_bits=cache.key_bits,
            value_bits=cache.value_bits,
            protected_layers=cache.protected_layers,
            window=cache.window,
            sinks=cache.sinks,
            capacity_tokens=self._capacity,
            key_biases=self._runtime.key_biases,
        )
        return self._last_cache

    # ----------------------------------------------------------------- report
    def memory_report(self) -> MemoryReport:
        """Predicted and, after a generation, measured bytes of every part."""
        if self._runtime is None:
            architecture = self._architecture or self._read_architecture()
            context = self._context or min(self.max_context, DEFAULT_CONTEXT)
            plan = make_plan(architecture, self._request(context, 1, None))
            return build_report(architecture, plan, None, None)
        peak = None
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self._device) + measured_context_bytes(self._device)
        return build_report(self._runtime.architecture, self._runtime.plan, peak, self._last_cache)

    def close(self) -> None:
        """Give back device and host memory; the engine can be used again."""
        self._close_runtime()

    def _close_runtime(self) -> None:
        if self._runtime is None:
            return
        weights, self._runtime, self._last_cache = self._runtime.weights, None, None
        weights.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> "StreamingEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def measured_context_bytes(device: torch.device) -> int:
    """Device memory of this process beside torch's allocator (context, kernels), if it is alone on the device."""
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return int(beside) if beside < 2 << 30 else CONTEXT_BYTES


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"{name!r} is not a device: write cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise OptionError(f"device {name!r} cannot be used: write cuda, cuda:1 or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise OptionError(f"device {name!r} was asked for and {count} CUDA devices were found: write --device cpu")
    return device


def _key_biases(architecture: Architecture, checkpoint: Checkpoint) -> list[KeyBias | None]:
    """The constant part of each layer's keys, from the biases alone, which are small: no layer is loaded for it."""
    rotary = rotary_of(architecture.model)
    layers = architecture.model.get_submodule(architecture.layer_path)
    found: list[KeyBias | None] = []
    for i, layer in enumerate(layers):  # type: ignore[arg-type]  # a ModuleList
        attention = attention_of(layer)
        wanted = architecture.key_bias_parameters(i) if attention is not None else {}
        values = {name: read_parameter(p, checkpoint, architecture.model) for name, p in wanted.items()}
        bias = None
        if attention is not None and values:
            bias = key_bias_of(attention, rotary, architecture.decoder_config, i, values)
        found.append(bias)
    return found


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within this, random numbers follow the seed; the caller's own generators are left as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Sink(BaseStreamer):  # type: ignore[misc]  # untyped base
    """Receives token ids from transformers' generate: the prompt first, then one per step."""

    def __init__(self, stats: RunStats, pieces: TextPieces, on_text: Callable[[str], None] | None):
        self._stats, self._pieces, self._on_text = stats, pieces, on_text
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._stats.on_token()
        text = self._pieces.add(int(value.flatten()[0]))
        if text and self._on_text is not None:
            self._on_text(text)

    def end(self) -> None:
        """The answer is complete; what is left of it is fetched with finish."""


class _Stop(StoppingCriteria):  # type: ignore[misc]  # untyped base
    """Ends a generation when a function says so."""

    def __init__(self, is_stopped: Callable[[], bool]):
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_stopped(), device=input_ids.device, dtype=torch.bool)


