"""transformers' class for a checkpoint, on the meta device, and which checkpoint tensors make up each parameter.

Names in a checkpoint are not always names in the class (prefixes, renamed modules, experts that are merged on load):
transformers' own conversion mapping answers for all of them, here once, from names alone; no tensor byte is read.
"""

import copy
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from streamer.checkpoint import Checkpoint
from streamer.errors import MissingTensorError, TensorMismatchError, UnsupportedModelError
from streamer.ops.lossless.together import CodedPart
from turboquant import KeyBias
from turboquant.hf import (
    ATTENTION_NAME,
    LayerShape,
    TurboQuantCache,
    attention_of,
    decoder_layers,
    key_bias_of,
    layer_shape,
    plain_cache_layers,
    register_attention,
    rotary_of,
)

# Every parameter starts at a multiple of this on the device: cuBLAS takes its fast kernels, Triton its 16-byte loads.
ALIGNMENT_BYTES = 256

# Name under which an assembled model keeps what puts its weights back in order after an error in mid-pass.
ABORT_PASS = "_abort_pass"

# A child of a layer with at least this share of its bytes is a unit of streaming; smaller ones (norms) stay resident.
_UNIT_SHARE = 0.05


def reason_of(error: BaseException) -> str:
    """An error's message on one line, cut at 300 characters; its kind when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] if lines else type(error).__name__


def aligned(size_bytes: int) -> int:
    """size_bytes rounded up to ALIGNMENT_BYTES."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Conversion:
    """Checkpoint tensors that transformers merges, splits or permutes into one or more parameters.

    Attributes:
        converter: transformers' transform, never used itself (it keeps state): a copy is.
        first_target: name of the first parameter that it makes.
        patterns: for each source, the pattern of the transform that it matched.
    """

    converter: WeightConverter
    first_target: str
    patterns: tuple[str, ...]

    def run(self, sources: Sequence[torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Parameters by name, from the source tensors (on meta: their shapes)."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in zip(self.patterns, sources, strict=True):
            converter.add_tensor(self.first_target, self.first_target, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Parameter:
    """One parameter (or persistent buffer) of the class and where its value comes from.

    Attributes:
        name: in the class, e.g. "model.layers.0.mlp.gate_proj.weight".
        shape, dtype: as the running model holds it.
        sources: checkpoint tensors that it is made of.
        conversion: how, or None when the one source is the value.
        is_stored_as_run: the one source is the value, in this dtype: its bytes can be used as they lie.
        source_bytes: of the sources of a conversion, as they are stored; 0 without one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    conversion: Conversion | None = field(default=None, compare=False, repr=False)
    is_stored_as_run: bool = True
    source_bytes: int = field(default=0, compare=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the running model."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class UnitCode:
    """A unit's bytes as packed files have them.

    Attributes:
        records: name of each part among the packed records. parts: where it lies in the unit, coded and decoded. Both
            are empty in forecasts for weights that have not been packed.
        nbytes: of the unit coded, alignment included.
    """

    records: tuple[str, ...]
    parts: tuple[CodedPart, ...]
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """Parameters that cross the link in one copy: one large child of a layer, or a slice of the head.

    Attributes:
        name: path of the module, e.g. "model.layers.0.mlp".
        parameters: in the order in which they lie in the unit's bytes, each aligned.
        group: equal for units that are in use together: the layer's number; a slice of the head is alone.
        rows: for a slice of the head, the first row and the row after the last; None otherwise.
        code: how its bytes are coded on the way to the device and on it, until they are used; None = they are not.
    """

    name: str
    parameters: tuple[Parameter, ...]
    group: int
    rows: tuple[int, int] | None = None
    code: UnitCode | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of each parameter in the unit."""
        offsets, at = [], 0
        for parameter in self.parameters:
            offsets.append(at)
            at += aligned(self.part_bytes(parameter))
        return tuple(offsets)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the unit as it is used, alignment included."""
        return sum(aligned(self.part_bytes(parameter)) for parameter in self.parameters)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the unit as it is kept and moved: coded, or those that are used."""
        return self.nbytes if self.code is None else self.code.nbytes

    def part_bytes(self, parameter: Parameter) -> int:
        """Bytes of the part of `parameter` that this unit holds."""
        if self.rows is None:
            return parameter.nbytes
        return parameter.nbytes // parameter.shape[0] * (self.rows[1] - self.rows[0])

    def part_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Shape of that part."""
        if self.rows is None:
            return parameter.shape
        return (self.rows[1] - self.rows[0], *parameter.shape[1:])


def decoded_offsets(units: Sequence[Unit]) -> list[int]:
    """Where each unit of a pass is decoded: behind the coded units of its layer that come before it."""
    offsets: list[int] = []
    ends: Counter[int] = Counter()
    for unit in units:
        offsets.append(ends[unit.group])
        if unit.code is not None:
            ends[unit.group] += unit.nbytes
    return offsets


def decoded_bytes(units: Sequence[Unit]) -> int:
    """Bytes in which the coded units of any layer can be decoded side by side: a prompt in chunks needs all of them."""
    ends = (at + unit.nbytes for at, unit in zip(decoded_offsets(units), units, strict=True) if unit.code is not None)
    return max(ends, default=0)


@dataclass(frozen=True)
class Architecture:
    """A model that can be run from a checkpoint, none of whose weights is in memory.

    Attributes:
        config: of the whole model. decoder_config: of the decoder.
        model: transformers' class on meta (buffers that are not in the checkpoint are real); its layers are
            transformers' own until `streamer.model` replaces them.
        layer_path: name of the ModuleList of the decoder's layers.
        layers: for each layer, its units in the order in which its forward uses them.
        embedding: the table of token vectors. head: the output matrix (a Parameter of its own even when tied).
        is_tied: the head reads the table's tensor.
        resident: everything else (norms, learned positions, small parts of layers).
        dtype: of computation.
        attention: name of the attention implementation.
        notes: automatic choices, one line each.
    """

    config: PreTrainedConfig
    decoder_config: PreTrainedConfig
    model: PreTrainedModel
    layer_path: str
    layers: tuple[tuple[Unit, ...], ...]
    embedding: Parameter
    head: Parameter
    is_tied: bool
    resident: tuple[Parameter, ...]
    dtype: torch.dtype
    attention: str
    notes: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the units of all layers, as they are used."""
        return sum(unit.nbytes for units in self.layers for unit in units)

    @property
    def uses_own_attention(self) -> bool:
        """Whether the compressed cache is read in place (else each layer is unpacked for its call)."""
        return self.attention == ATTENTION_NAME

    @cached_property
    def cache_layers(self) -> tuple[tuple[LayerShape, int | None], ...]:
        """For each layer the shape of its keys and values, and its sliding window (None: it reads everything)."""
        plain = plain_cache_layers(self.decoder_config)
        return tuple(
            (
                layer_shape(self.decoder_config, i),
                layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None,
            )
            for i, layer in enumerate(plain)
        )

    @cached_property
    def has_float32_attention(self) -> bool:
        """Whether attention scores are soft-capped or take learned sinks, which no fused kernel of torch does.

        Asked before the model is assembled: a streamed layer hides its parts.
        """
        attention = attention_of(self.layer_modules[0])
        softcap = getattr(self.decoder_config, "attn_logit_softcapping", None)
        return softcap is not None or hasattr(attention, "sinks")

    @property
    def layer_modules(self) -> nn.ModuleList:
        """The decoder's layers in the model."""
        return cast(nn.ModuleList, self.model.get_submodule(self.layer_path))

    def key_biases(self, checkpoint: Checkpoint | None) -> list[KeyBias | None]:
        """The constant part of each layer's keys, from the biases alone, which are small: no layer is loaded for it.

        Without a checkpoint, biases of ones stand in: the right sizes, and no tensor is read.
        """
        rotary = rotary_of(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        parameters = (*self.resident, *(p for layer in self.layers for unit in layer for p in unit.parameters))
        biases = [p for p in parameters if p.name.endswith("bias")]
        attentions = [attention_of(layer) for layer in self.layer_modules]
        wanted: list[dict[str, Parameter]] = []  # of each layer, by their name in the attention module
        for attention in attentions:
            prefix = names[attention] + "." if attention is not None else "."
            wanted.append({p.name[len(prefix) :]: p for p in biases if p.name.startswith(prefix)})
        if checkpoint is not None:
            checkpoint.will_need(source for own in wanted for p in own.values() for source in p.sources)
        found: list[KeyBias | None] = []
        for i, (attention, own) in enumerate(zip(attentions, wanted, strict=True)):
            bias = None
            if attention is not None and own:
                values = {
                    name: torch.ones(p.shape) if checkpoint is None else read_parameter(p, checkpoint, self.model)
                    for name, p in own.items()
                }
                bias = key_bias_of(attention, rotary, self.decoder_config, i, values)
            found.append(bias)
        return found


def read_architecture(folder: Path, checkpoint: Checkpoint, *, dtype: str = "auto") -> Architecture:
    """The architecture of the checkpoint in `folder`.

    Args:
        folder: with config.json. checkpoint: opened on the same folder.
        dtype: "auto" (as stored), "bfloat16", "float16" or "float32".
    Raises:
        UnsupportedModelError: no decoder class for this config, quantized weights, or no list of layers.
        MissingTensorError, TensorMismatchError: the checkpoint does not fill the class.
    """
    config = _read_config(folder)
    run_dtype = _run_dtype(dtype, config, checkpoint)
    notes: list[str] = []
    model, attention = _build_on_meta(config, run_dtype, notes)
    model.generation_config = _generation_config(folder, model)
    decoder_config = config.get_text_config(decoder=True)
    layers = decoder_layers(model, decoder_config.num_hidden_layers)
    if layers is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of {decoder_config.num_hidden_layers} decoder layers to stream"
        )
    layer_path = next(name for name, module in model.named_modules() if module is layers)
    parameters = _map_parameters(model, checkpoint, run_dtype)
    embedding, head, is_tied = _ends(model, parameters, checkpoint)
    names = {p.name for p in (embedding, head)}
    units = []
    for i, layer in enumerate(layers):
        layer_units = _units_of(layer, i, f"{layer_path}.{i}", parameters)
        names |= {p.name for unit in layer_units for p in unit.parameters}
        units.append(layer_units)
    resident = tuple(p for name, p in parameters.items() if name not in names)
    return Architecture(
        config=config,
        decoder_config=decoder_config,
        model=model,
        layer_path=layer_path,
        layers=tuple(units),
        embedding=embedding,
        head=head,
        is_tied=is_tied,
        resident=resident,
        dtype=run_dtype,
        attention=attention,
        notes=tuple(notes),
    )


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a config that lies makes transformers raise anything
        raise UnsupportedModelError(f"{folder / 'config.json'} cannot be used: {reason_of(error)}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModelError(
            f"{folder} holds weights quantized with {method or 'an unknown method'}, which cannot be streamed yet; "
            "use the original 16-bit checkpoint"
        )
    return config


def _run_dtype(dtype: str, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]  # one of three names, checked by options
    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, stored)
    if stored is None:
        stored = next((e.dtype for e in checkpoint.tensors.values() if e.dtype.is_floating_point), torch.bfloat16)
    if stored not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedModelError(f"weights of dtype {stored} cannot be streamed; use a 16- or 32-bit checkpoint")
    return stored


def _streamed_class(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose forward refuses outputs that composed layers do not record, instead of leaving them empty.

    It also tells a compressed cache about padding where the attention in use cannot.
    """

    # generate reads the signature (does it take position_ids, logits_to_keep?): it must be the original's
    @functools.wraps(original.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise UnsupportedModelError(f"{name} is not available from a streamed model; leave it off")
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        is_foreign = self.config._attn_implementation != ATTENTION_NAME
        if is_foreign and isinstance(cache, TurboQuantCache) and mask is not None and mask.ndim == 2:
            cache.announce_padding(mask)
        try:
            return original.forward(self, *args, **kwargs)
        except BaseException:
            abort = self.__dict__.get(ABORT_PASS)
            if abort is not None:
                abort()  # units that were waited for and not released would stop every later pass
            raise

    # name and module of the original: transformers looks both up (conversion mapping, generation)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), {**names, "forward": forward})


def _build_on_meta(config: PreTrainedConfig, dtype: torch.dtype, notes: list[str]) -> tuple[PreTrainedModel, str]:
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no decoder class in this transformers; a text decoder is needed"
        )
    original = cast(type[PreTrainedModel], mapping[type(config)])
    streamed = _streamed_class(original)
    register_attention()
    attention = ATTENTION_NAME
    if not getattr(original, "_supports_attention_backend", False):
        attention = "sdpa" if getattr(original, "_supports_sdpa", False) else "eager"
        notes.append(
            f"{original.__name__} takes no attention function from outside: {attention} attention, prompts in one "
            "chunk, compressed layers unpacked for each call"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = streamed._from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # a config that lies makes the model's own code raise anything
        raise UnsupportedModelError(
            f"{original.__name__} cannot be built from its config.json: {reason_of(error)}"
        ) from error
    model.eval()
    return model, attention


def _generation_config(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{path} cannot be used: {reason_of(error)}. Mend it, or move it away."
            ) from error
    return GenerationConfig.from_model_config(model.config)


def _map_parameters(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Parameter]:
    """Every parameter and persistent buffer of the class, in its order, with its sources; tied ones may be absent."""
    wanted = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = key, None
        if target in wanted:
            sources.setdefault(target, []).append((key, pattern))
    found: dict[str, Parameter] = {}
    for name, keys in sources.items():
        if keys[0][1] is None:
            found[name] = _plain_parameter(name, keys[-1][0], wanted[name], checkpoint, _dtype_of(model, name, dtype))
            continue
        patterns = tuple(pattern for _, pattern in keys if pattern is not None)
        conversion = Conversion(by_pattern[patterns[0]], name, patterns)
        names = tuple(key for key, _ in keys)
        on_meta = [torch.empty(checkpoint.tensors[key].shape, device="meta") for key in names]
        for target, value in conversion.run(on_meta, model).items():
            if target not in wanted:
                continue
            if value.shape != wanted[target].shape:
                raise TensorMismatchError(
                    f"{len(names)} tensors from {names[0]} on merge into shape {list(value.shape)}; {target} needs "
                    f"{list(wanted[target].shape)}. Download the checkpoint again, or its own config.json.",
                    path=checkpoint.tensors[names[0]].shard,
                )
            found[target] = Parameter(
                target,
                tuple(value.shape),
                _dtype_of(model, target, dtype),
                names,
                conversion,
                is_stored_as_run=False,
                source_bytes=sum(checkpoint.tensors[key].nbytes for key in names),
            )
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name not in found and source in found and name in wanted:
            found[name] = replace(found[source], name=name)
    _check_complete(model, wanted, found, checkpoint)
    return {name: found[name] for name in wanted if name in found}


def _plain_parameter(name: str, key: str, meta: torch.Tensor, checkpoint: Checkpoint, dtype: torch.dtype) -> Parameter:
    entry = checkpoint.tensors[key]
    if tuple(entry.shape) != tuple(meta.shape):
        raise TensorMismatchError(
            f"tensor {key} in {entry.shard.name} has shape {list(entry.shape)}; the model described by config.json "
            f"needs {list(meta.shape)}. Download the checkpoint again, or the config.json that belongs to it.",
            path=entry.shard,
        )
    run_dtype = dtype if meta.dtype.is_floating_point else meta.dtype
    if entry.dtype.is_floating_point != meta.dtype.is_floating_point:
        raise TensorMismatchError(
            f"tensor {key} in {entry.shard.name} is {entry.dtype}; the model needs {run_dtype}.", path=entry.shard
        )
    return Parameter(name, tuple(meta.shape), run_dtype, (key,), None, entry.dtype == run_dtype)


def _dtype_of(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The run dtype, or float32 for modules that transformers keeps there."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    keep = getattr(model, "_keep_in_fp32_modules", None) or ()
    parts = name.split(".")
    if any(module in parts for module in strict) and dtype != torch.float32:
        return torch.float32
    if dtype == torch.float16 and any(module in parts for module in keep):
        return torch.float32
    return dtype


def _check_layers(model: PreTrainedModel, found: Mapping[str, Parameter], checkpoint: Checkpoint) -> None:
    """A checkpoint with more layers than its config would run without them, and say nothing sensible."""
    used = {source for parameter in found.values() for source in parameter.sources}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for name in checkpoint.tensors:
        number = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name)
        if name in used or number is None or int(number[1]) < count or any(p.search(name) for p in ignored):
            continue
        raise TensorMismatchError(
            f"config.json says {count} layers, and the checkpoint has tensor {name}. Download the config.json that "
            "belongs to this checkpoint.",
            path=checkpoint.tensors[name].shard,
        )


def _check_complete(
    model: PreTrainedModel, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Parameter], checkpoint: Checkpoint
) -> None:
    _check_layers(model, found, checkpoint)
    head = model.get_output_embeddings()
    head_names = {name for name, module in model.named_modules() if module is head}
    missing = [
        name
        for name in wanted
        if name not in found and not (name.rpartition(".")[0] in head_names and name.endswith("weight"))
    ]
    if missing:
        raise MissingTensorError(
            f"the checkpoint lacks {len(missing)} of the {len(wanted)} tensors that {type(model).__name__} needs, "
            f"first {missing[0]}. Download the checkpoint again, or the config.json that belongs to it.",
            path=checkpoint.folder,
        )


def _ends(
    model: PreTrainedModel, parameters: Mapping[str, Parameter], checkpoint: Checkpoint
) -> tuple[Parameter, Parameter, bool]:
    """The embedding table, the output matrix, and whether they are one tensor."""
    embedding_module, head_module = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    if head_module is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output matrix: a language model head is needed")
    embedding = parameters[f"{paths[id(embedding_module)]}.weight"]
    head_name = f"{paths[id(head_module)]}.weight"
    head = parameters.get(head_name)
    is_tied = head is None or head.sources == embedding.sources
    if head is None:
        meta = head_module.weight
        is_tied_by_config = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", True)
        if not is_tied_by_config:
            raise MissingTensorError(
                f"the checkpoint has no {head_name}, and config.json says that the embedding table does not stand in "
                "for it (tie_word_embeddings is false). Download the checkpoint again.",
                path=checkpoint.folder,
            )
        if tuple(meta.shape) != embedding.shape:
            raise MissingTensorError(
                f"the checkpoint has no {head_name}, and the embedding table of shape {list(embedding.shape)} cannot "
                f"stand in for it ({list(meta.shape)}). Download the checkpoint again.",
                path=checkpoint.folder,
            )
        head = Parameter(
            head_name, embedding.shape, embedding.dtype, embedding.sources, None, embedding.is_stored_as_run
        )
    return embedding, head, is_tied


def _units_of(layer: nn.Module, number: int, path: str, parameters: Mapping[str, Parameter]) -> tuple[Unit, ...]:
    """The large children of a layer, in order; what is left over stays resident."""
    own = {name: p for name, p in parameters.items() if name.startswith(path + ".")}
    total = sum(p.nbytes for p in own.values())
    units = []
    for child_name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            continue  # not called as a module, so nothing could wait for its bytes; it stays resident
        inside = tuple(p for name, p in own.items() if name.startswith(f"{path}.{child_name}."))
        if inside and sum(p.nbytes for p in inside) >= _UNIT_SHARE * total:
            units.append(Unit(f"{path}.{child_name}", inside, number))
    return tuple(units)


def head_slices(head: Parameter, max_bytes: int) -> tuple[Unit, ...]:
    """The head as units of at most max_bytes each (at least one row)."""
    rows = head.shape[0]
    row_bytes = head.nbytes // rows
    step = max(1, max_bytes // row_bytes)
    return tuple(
        Unit(head.name.rpartition(".")[0], (head,), -1 - start, (start, min(start + step, rows)))
        for start in range(0, rows, step)
    )


def read_parameter(parameter: Parameter, checkpoint: Checkpoint, model: PreTrainedModel) -> torch.Tensor:
    """The value of a parameter, by transformers' conversion where it needs one.

    Returns:
        shape and dtype of the parameter; a view on the map where the bytes are stored as they are run, else new.
    """
    tensors = [checkpoint.tensor(name) for name in parameter.sources]
    if parameter.conversion is None:
        return tensors[-1].to(parameter.dtype)
    return parameter.conversion.run(tensors, model)[parameter.name].to(parameter.dtype)


def bytes_of(key_biases: Sequence[KeyBias | None], *, on_gpu: bool) -> int:
    """Bytes of the key biases that a cache will hold, and of the tables that kernels read on a GPU."""
    return sum(bias.nbytes + on_gpu * bias.table_nbytes for bias in key_biases if bias is not None)
