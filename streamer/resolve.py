"""A folder, hub id or short name -> a checkpoint folder, or an error with the places looked in and what to type."""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from streamer.errors import ModelNotFoundError, OptionError, UnsupportedModelError
from streamer.options import cache_dir, offline_from_environment

# What a checkpoint folder is read from; weights in pickled form (*.bin, *.pth) are never fetched.
_ALLOWED_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "*.txt"]
# Some repositories hold a second copy of all weights: in a sub-folder (original/, metal/, onnx/) or as consolidated*.
_IGNORED_FILES = ["*/*", "consolidated*", "*.bin", "*.pth"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_OTHER_WEIGHT_SUFFIXES = (".bin", ".pth", ".pt", ".gguf")

# Whose models a short name means when it is not in a local cache; no prefix begins with another.
_ORGANISATIONS = {
    "codestral": "mistralai",
    "deepseek": "deepseek-ai",
    "falcon": "tiiuae",
    "gemma": "google",
    "glm": "zai-org",
    "gpt-j": "EleutherAI",
    "gpt-neo": "EleutherAI",
    "gpt-oss": "openai",
    "gpt2": "openai-community",
    "granite": "ibm-granite",
    "internlm": "internlm",
    "llama": "meta-llama",
    "meta-llama": "meta-llama",
    "ministral": "mistralai",
    "mistral": "mistralai",
    "mixtral": "mistralai",
    "olmo": "allenai",
    "opt-": "facebook",
    "phi": "microsoft",
    "pythia": "EleutherAI",
    "qwen": "Qwen",
    "qwq": "Qwen",
    "smollm": "HuggingFaceTB",
    "stablelm": "stabilityai",
    "starcoder": "bigcode",
    "tinyllama": "TinyLlama",
    "yi-": "01-ai",
}
_EXAMPLE = "Qwen/Qwen2.5-14B-Instruct"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model was found.

    Attributes:
        folder: holds config.json and safetensors files.
        source: how it was found, in words for the user, such as "Hugging Face cache, Qwen/Qwen2.5-14B".
    """

    folder: Path
    source: str


def resolve_model(name: str, *, offline: bool = False, on_line: Callable[[str], None]) -> ResolvedModel:
    """The checkpoint folder that a name stands for.

    Looked at in this order: a folder of that name; a model that tq-stream itself made; the local Hugging Face cache;
    the Hugging Face hub (a name without organisation is completed by a table of name prefixes).

    Args:
        name: a folder, a hub id ("Qwen/Qwen2.5-14B-Instruct") or a short name ("Qwen2.5-14B"). A short name also finds
            the cached model of that name with -Instruct behind it, when there is none without.
        offline: never use the network; HF_HUB_OFFLINE=1 has the same effect.
        on_line: called with each line to tell the user while this works (an automatic choice, a download).
    Returns:
        the folder and how it was found.
    Raises:
        OptionError: the name cannot be a model's, or fits several cached models (they are listed).
        ModelNotFoundError: found nowhere, incomplete, or the hub refused; names the places and what to type.
        UnsupportedModelError: found, but its weights are not safetensors.
    Source: own.
    """
    text = name.strip()
    if not text:
        raise OptionError("the model name is empty: give a folder, a hub id (Qwen/Qwen2.5-14B) or a short name")
    folder = Path(text).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return ResolvedModel(folder, "folder")
    if folder.is_file():
        raise OptionError(f"{folder} is a file: give the folder that holds it, with config.json beside it")
    if text.startswith(("/", "~", ".")) or text.count("/") > 1 or "\\" in text:
        raise ModelNotFoundError(f"no folder {folder.absolute()}: check the path, or give a hub id such as {_EXAMPLE}")
    if _HUB_NAME.fullmatch(text) is None:
        raise OptionError(f"{text!r} is no folder, and no hub id or short name can be written so: try {_EXAMPLE}")

    searched = [f"folder {folder.absolute()}"]
    offline = offline or offline_from_environment()
    if "/" in text:
        return _resolve_hub_id(text, searched, offline, on_line)

    made = cache_dir() / "models" / text.lower()
    if made.is_dir():
        _check_folder(made)
        return ResolvedModel(made, "made by tq-stream")
    searched.append(f"made by tq-stream {made}")
    match = _cached_match(text)
    if match is not None:
        if match.split("/")[1].lower() != text.lower():
            on_line(f"{text} is read as {match}, the one in the Hugging Face cache")
        return _resolve_hub_id(match, searched, offline, on_line)
    organisation = _organisation(text)
    if organisation is None:
        searched.append(f"Hugging Face cache {_hub_cache()}")
        advice = "give the hub id with its organisation (org/name), or a folder"
        raise ModelNotFoundError(_not_found(text, searched, advice))
    return _resolve_hub_id(f"{organisation}/{text}", searched, offline, on_line)


def _resolve_hub_id(repo_id: str, searched: list[str], offline: bool, on_line: Callable[[str], None]) -> ResolvedModel:
    snapshot = _cached_snapshot(repo_id)
    missing = _missing_files(snapshot, with_tokenizer=True) if snapshot is not None else []
    if snapshot is not None and not missing:
        return ResolvedModel(snapshot, f"Hugging Face cache, {repo_id}")
    found = f" ({repo_id} there lacks {', '.join(missing)})" if missing else ""
    searched = [*searched, f"Hugging Face cache {_hub_cache()}{found}"]
    if offline:
        advice = f"run once online, without --offline and HF_HUB_OFFLINE, to download {repo_id}; or give a folder"
        raise ModelNotFoundError(_not_found(repo_id, searched, advice))
    on_line(f"downloading {repo_id} from the Hugging Face hub to {_hub_cache()}")
    folder = _download(repo_id, searched)
    _check_folder(folder, with_tokenizer=True)
    return ResolvedModel(folder, f"downloaded from the Hugging Face hub, {repo_id}")


def _not_found(name: str, searched: list[str], advice: str) -> str:
    known = {entry.split("/")[-1].lower(): entry for entry in (*_cached_ids(), *_made_names())}
    close = difflib.get_close_matches(name.split("/")[-1].lower(), known, n=3)
    meant = f" Here already: {', '.join(known[entry] for entry in close)}." if close else ""
    return f"model {name} not found.\n  Looked in: {'; '.join(searched)}.\n  {advice[0].upper()}{advice[1:]}.{meant}"


def _made_names() -> list[str]:
    models = cache_dir() / "models"
    return (
        sorted(entry.name for entry in models.iterdir() if (entry / "config.json").is_file()) if models.is_dir() else []
    )


def _organisation(name: str) -> str | None:
    return next((entry for prefix, entry in _ORGANISATIONS.items() if name.lower().startswith(prefix)), None)


# huggingface_hub is imported inside functions: `tq-stream run FOLDER` should not wait for it.


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached_ids() -> list[str]:
    from huggingface_hub import scan_cache_dir

    if not _hub_cache().is_dir():
        return []
    return sorted(repo.repo_id for repo in scan_cache_dir(_hub_cache()).repos if repo.repo_type == "model")


def _cached_match(name: str) -> str | None:
    """The one complete cached model of this short name; names equal but for letter case go before NAME-Instruct."""
    cached = [repo_id for repo_id in _cached_ids() if "/" in repo_id]
    for wanted in (name.lower(), f"{name.lower()}-instruct"):
        named = [repo_id for repo_id in cached if repo_id.split("/")[1].lower() == wanted]
        matches = [repo_id for repo_id in named if _is_complete(_cached_snapshot(repo_id))]
        if len(matches) > 1:
            raise OptionError(
                f"{name} fits {len(matches)} models in the Hugging Face cache: {', '.join(matches)}.\n"
                f"  Give one of these ids."
            )
        if matches:
            return matches[0]
    return None


def _is_complete(snapshot: Path | None) -> bool:
    return snapshot is not None and not _missing_files(snapshot, with_tokenizer=True)


def _cached_snapshot(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            _as_text(
                snapshot_download(
                    repo_id,
                    cache_dir=_hub_cache(),
                    local_files_only=True,
                    allow_patterns=_ALLOWED_FILES,
                    ignore_patterns=_IGNORED_FILES,
                )
            )
        )
    except HFValidationError as error:
        raise OptionError(f"{repo_id!r} cannot be a hub id ({_reason(error)}): try {_EXAMPLE}") from error
    except LocalEntryNotFoundError as error:
        # Recent hub clients raise for a partial snapshot and say where it is; what we need of it may be complete.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial is not None else None


def _download(repo_id: str, searched: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    # The HTTP library below the hub client differs between its releases; its errors are this base of the hub's own.
    transport_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    searched = [*searched, f"Hugging Face hub {repo_id}"]
    try:
        return Path(
            _as_text(
                snapshot_download(
                    repo_id, cache_dir=_hub_cache(), allow_patterns=_ALLOWED_FILES, ignore_patterns=_IGNORED_FILES
                )
            )
        )
    except GatedRepoError as error:
        advice = f"accept its licence at https://huggingface.co/{repo_id}, then type: hf auth login"
        raise ModelNotFoundError(_refused(repo_id, error, searched, advice)) from error
    except RepositoryNotFoundError as error:
        advice = "check the spelling of the id; for a private model type: hf auth login"
        raise ModelNotFoundError(_refused(repo_id, error, searched, advice)) from error
    except (OSError, transport_error) as error:
        advice = "check the network and the free space, then run again (the download goes on where it stopped)"
        raise ModelNotFoundError(_refused(repo_id, error, searched, advice)) from error


def _as_text(snapshot: object) -> str:
    # snapshot_download is typed as able to return the listing of a dry run, which is never asked for here.
    return str(snapshot)


def _refused(repo_id: str, error: Exception, searched: list[str], advice: str) -> str:
    places = [*searched[:-1], f"{searched[-1]} ({_reason(error)})"]
    return _not_found(repo_id, places, advice)


def _reason(error: BaseException) -> str:
    """One line of what the hub, the network or the disk said; the cause says more than the hub client's advice."""
    said = getattr(error, "server_message", None) or str(error.__cause__ or error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _check_folder(folder: Path, *, with_tokenizer: bool = False) -> None:
    missing = _missing_files(folder, with_tokenizer=with_tokenizer)
    if not missing:
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _OTHER_WEIGHT_SUFFIXES)
    has_safetensors = any(folder.glob("*.safetensors"))
    if others and not has_safetensors:
        raise UnsupportedModelError(
            f"{folder} holds {others[0]} and no *.safetensors; only safetensors files can be streamed.\n"
            f"  Convert it once: load it with transformers' AutoModelForCausalLM.from_pretrained and write it with "
            f"save_pretrained(NEW_FOLDER), or take a repository that has safetensors."
        )
    has = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelNotFoundError(
        f"{folder} is not a complete checkpoint: {', '.join(missing)} missing (it holds {has}).\n"
        f"  Give the folder that holds config.json and the *.safetensors files, or download the model again."
    )


def _missing_files(folder: Path, *, with_tokenizer: bool) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and index.is_file():
        missing += [shard for shard in _indexed_shards(index) if not (folder / shard).is_file()]
    elif not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if with_tokenizer and not any((folder / entry).is_file() for entry in _TOKENIZER_FILES):
        missing.append("tokenizer.json")
    return missing


def _indexed_shards(index: Path) -> list[str]:
    """The files an index names; none for a broken index, whose faults checkpoint.py reports in full."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
