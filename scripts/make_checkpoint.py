#!/usr/bin/env python3
"""Writes a checkpoint of a real model's shape with random weights, to measure and plan with; it says nothing sensible.

scripts/make_checkpoint.py qwen2.5-14b /data/random-14b                 29.5 GB of random bf16 weights
scripts/make_checkpoint.py qwen2.5-14b /data/random-14b --layers 4      the same, with its first 4 layers only
scripts/make_checkpoint.py llama-70b /tmp/llama-70b --headers-only      valid headers over sparse files, no weights
"""

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from streamer.errors import OptionError, StreamerError
from streamer.options import format_size

BYTES_PER_WEIGHT = 2  # bf16
SHARD_BYTES = 4 * 10**9  # about the shard size of published checkpoints
WEIGHT_STD = 0.02  # initializer_range of both families
EOS_TOKEN_ID = 257  # behind the 256 bytes and <unk>


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model.

    Attributes:
        model_type: "qwen2" or "llama", which differ here by biases on the query, key and value projections.
        tie_word_embeddings: no lm_head of its own.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads


# From the published config.json of each model.
SHAPES = {
    "qwen2.5-0.5b": Shape("qwen2", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True),
    "qwen2.5-3b": Shape("qwen2", 2048, 36, 16, 2, 11008, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": Shape("qwen2", 3584, 28, 28, 4, 18944, 152064, tie_word_embeddings=False),
    "qwen2.5-14b": Shape("qwen2", 5120, 48, 40, 8, 13824, 152064, tie_word_embeddings=False),
    "llama-70b": Shape(
        "llama", 8192, 80, 64, 8, 28672, 128256, False, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=8192
    ),
}


@dataclass(frozen=True)
class Weight:
    """One tensor to write: its shape, and the value of all elements or the spread of random ones."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        """Its bytes in bf16."""
        count = BYTES_PER_WEIGHT
        for axis in self.shape:
            count *= axis
        return count


def weights_of(shape: Shape, key_bias_scale: float | None = None) -> Iterator[Weight]:
    """Every tensor of a model of this shape, in the order of the forward pass.

    Args:
        shape: of the model.
        key_bias_scale: standard deviation of the query, key and value biases; None is that of the weights.
    Returns:
        names as transformers' classes spell them.
    Raises:
        OptionError: a bias scale for a model without biases.
    Source: names and shapes of transformers' Qwen2ForCausalLM and LlamaForCausalLM.
    """
    has_bias = shape.model_type == "qwen2"
    if key_bias_scale is not None and not has_bias:
        raise OptionError(
            f"--key-bias-scale {key_bias_scale}: a {shape.model_type} model has no key biases; leave it out"
        )
    bias_std = WEIGHT_STD if key_bias_scale is None else key_bias_scale
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield Weight("model.embed_tokens.weight", (shape.vocab_size, hidden), WEIGHT_STD)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield Weight(f"{prefix}.input_layernorm.weight", (hidden,), 0.0, mean=1.0)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            yield Weight(f"{prefix}.self_attn.{name}_proj.weight", (width, hidden), WEIGHT_STD)
            if has_bias:
                yield Weight(f"{prefix}.self_attn.{name}_proj.bias", (width,), bias_std)
        yield Weight(f"{prefix}.self_attn.o_proj.weight", (hidden, queries), WEIGHT_STD)
        yield Weight(f"{prefix}.post_attention_layernorm.weight", (hidden,), 0.0, mean=1.0)
        yield Weight(f"{prefix}.mlp.gate_proj.weight", (inner, hidden), WEIGHT_STD)
        yield Weight(f"{prefix}.mlp.up_proj.weight", (inner, hidden), WEIGHT_STD)
        yield Weight(f"{prefix}.mlp.down_proj.weight", (hidden, inner), WEIGHT_STD)
    yield Weight("model.norm.weight", (hidden,), 0.0, mean=1.0)
    if not shape.tie_word_embeddings:
        yield Weight("lm_head.weight", (shape.vocab_size, hidden), WEIGHT_STD)


def split_into_shards(weights: Iterator[Weight], shard_bytes: int) -> list[list[Weight]]:
    """The weights in files of about one size, as published checkpoints are cut.

    Args:
        weights: in the order of the forward pass.
        shard_bytes: no file is longer, unless a single tensor is.
    Returns:
        one list per file, sorted by name, as the format's own writer sorts tensors of one dtype.
    Source: own.
    """
    shards: list[list[Weight]] = [[]]
    filled_bytes = 0
    for weight in weights:
        if shards[-1] and filled_bytes + weight.nbytes > shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(weight)
        filled_bytes += weight.nbytes
    return [sorted(shard, key=lambda weight: weight.name) for shard in shards]


def header_of(shard: Sequence[Weight]) -> bytes:
    """The first bytes of a safetensors file that holds these weights one behind the other.

    Args:
        shard: in the order of their bytes.
    Returns:
        the header's length and the header, padded with spaces to a multiple of 8 bytes.
    Source: own; format of https://github.com/huggingface/safetensors (README, "Format").
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in shard:
        end = offset + weight.nbytes
        table[weight.name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_random_weights(path: Path, shard: Sequence[Weight], seed: int) -> None:
    """Appends random bf16 weights to a file, made on the GPU if there is one.

    Args:
        path: the file, which holds its header already.
        shard: the weights, in the order of their bytes.
        seed: of the generator; the values also depend on the kind of device.
    Source: own.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    with path.open("ab") as file:
        for weight in shard:
            values = torch.full(weight.shape, weight.mean, dtype=torch.bfloat16, device=device)
            if weight.std > 0:
                values.normal_(weight.mean, weight.std, generator=generator)
            file.write(memoryview(values.cpu().view(torch.uint8).flatten().numpy()))


def config_of(shape: Shape) -> dict[str, object]:
    """The config.json of a model of this shape, with the field names of published configs."""
    sizes = asdict(shape)
    sizes["num_hidden_layers"] = sizes.pop("num_layers")
    sizes["num_attention_heads"] = sizes.pop("num_heads")
    sizes["num_key_value_heads"] = sizes.pop("num_kv_heads")
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[shape.model_type]
    return sizes | {
        "architectures": [architecture],
        "hidden_act": "silu",
        "initializer_range": WEIGHT_STD,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "use_cache": True,
    }


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer of single bytes: the id of a token is its byte, so a text of N bytes has N tokens.

    Args:
        folder: existing.
        vocab_size: of the model; below 258 the highest bytes have no token and are dropped from a text.
    Source: own; the letters that stand for bytes are those of GPT-2's byte-level encoding, because transformers loads
        qwen2 as a byte-level tokenizer whatever class the folder asks for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    num_bytes = min(256, vocab_size - 2)
    is_printable = [33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174 for byte in range(256)]
    # A byte that prints stands for itself; the others take the code points from 256 on, in order.
    letters = [chr(byte if is_printable[byte] else 256 + is_printable[:byte].count(False)) for byte in range(256)]
    vocab = {letter: byte for byte, letter in enumerate(letters[:num_bytes])}
    tokenizer = Tokenizer(models.BPE(vocab | {"<unk>": num_bytes, "<eos>": num_bytes + 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    settings = {"tokenizer_class": "TokenizersBackend"} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_checkpoint(
    shape: Shape,
    folder: Path,
    *,
    headers_only: bool = False,
    key_bias_scale: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
) -> int:
    """Writes a whole checkpoint folder: shards, index, config and tokenizer.

    Args:
        shape: of the model.
        folder: must not exist yet; appears under this name when complete.
        headers_only: the files have their full length and no content (sparse): every weight reads as 0.
        key_bias_scale: standard deviation of the query, key and value biases; None is that of the weights.
        shard_bytes: about the size of one file.
        seed: of the weights.
    Returns:
        bytes of all weights.
    Raises:
        OptionError: the folder exists, or the model has no biases to scale.
        StreamerError: too little space on the disk.
    Source: own.
    """
    if folder.exists():
        raise OptionError(f"{folder} exists already: remove it, or give another place")
    shards = split_into_shards(weights_of(shape, key_bias_scale), shard_bytes)
    total_bytes = sum(weight.nbytes for shard in shards for weight in shard)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder.parent).free
    if not headers_only and total_bytes > free_bytes:
        raise StreamerError(
            f"the weights take {format_size(total_bytes)} and {folder.parent} has {format_size(free_bytes)} free: "
            f"give another place, or fewer --layers"
        )
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = scratch / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = header_of(shard)
        path.write_bytes(header)
        if headers_only:
            os.truncate(path, len(header) + sum(weight.nbytes for weight in shard))
        else:
            write_random_weights(path, shard, seed + number)
        weight_map.update((weight.name, path.name) for weight in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (scratch / "config.json").write_text(json.dumps(config_of(shape), indent=2, sort_keys=True) + "\n")
    write_tokenizer(scratch, shape.vocab_size)
    scratch.rename(folder)
    return total_bytes


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES), metavar="SHAPE", help=", ".join(sorted(SHAPES)))
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--layers", type=int, metavar="N", help="write N layers instead of all")
    parser.add_argument("--headers-only", action="store_true", help="full-length sparse files without weights")
    parser.add_argument("--key-bias-scale", type=float, metavar="X", help="standard deviation of the q, k, v biases")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None and not 1 <= options.layers <= shape.num_layers:
        parser.error(f"--layers {options.layers}: {options.shape} has {shape.num_layers}, give 1 to {shape.num_layers}")
    if options.key_bias_scale is not None and not 0 <= options.key_bias_scale < float("inf"):
        parser.error(f"--key-bias-scale {options.key_bias_scale}: give a finite number of at least 0")
    try:
        total_bytes = write_checkpoint(
            replace(shape, num_layers=options.layers or shape.num_layers),
            options.out,
            headers_only=options.headers_only,
            key_bias_scale=options.key_bias_scale,
            seed=options.seed,
        )
    except (StreamerError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    kind = "of headers over empty files" if options.headers_only else "of random weights"
    print(f"{options.out}: {format_size(total_bytes)} {kind}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
