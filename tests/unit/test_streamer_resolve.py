"""Folders, hub ids and short names; the hub itself is replaced by functions of the test."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from streamer.errors import ModelNotFoundError, OptionError, UnsupportedModelError
from streamer.resolve import ResolvedModel, resolve_model

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")
REVISION = "0" * 40


def write_files(folder: Path, names: tuple[str, ...] = COMPLETE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def write_index(folder: Path, shards: list[str]) -> None:
    weight_map = {f"tensor{number}": shard for number, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, with the working folder elsewhere."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return cache


def add_cached(cache: Path, repo_id: str, names: tuple[str, ...] = COMPLETE) -> Path:
    """Lays a repository into the cache as the hub client does; returns its snapshot folder."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs").mkdir()
    return write_files(repository / "snapshots" / REVISION, names)


def resolve(name: str, offline: bool = True, lines: list[str] | None = None) -> ResolvedModel:
    return resolve_model(name, offline=offline, on_line=(lines if lines is not None else []).append)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Lets resolve ask the hub, and answers with whatever `answer` is set to; returns the questions asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return []


def set_hub(monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]], answer: Path | Exception) -> None:
    cached = huggingface_hub.snapshot_download

    def snapshot_download(repo_id: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return str(cached(repo_id, **options))
        asked.append({"repo_id": repo_id, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


class Response:
    """The little of an HTTP response that the hub's errors look at."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.status_code = 403
        self.request = None


def hub_error(kind: type[Exception], message: str) -> Exception:
    return kind(message, response=Response())  # type: ignore[call-arg]


# A folder


def test_a_folder_comes_first(hub_cache: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "work" / "Qwen2.5-14B", ("config.json", "model.safetensors"))
    add_cached(hub_cache, "Qwen/Qwen2.5-14B")
    assert resolve("Qwen2.5-14B") == ResolvedModel(Path("Qwen2.5-14B"), "folder")
    assert resolve(str(folder)).folder == folder


def test_a_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path / "model")
    assert resolve("~/model").folder == tmp_path / "model"


def test_a_folder_without_config_names_what_is_missing_and_what_is_there(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m", ("model.safetensors",))
    with pytest.raises(ModelNotFoundError, match=r"config\.json missing \(it holds model\.safetensors\)"):
        resolve(str(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json, \*\.safetensors missing \(it holds nothing\)"):
        resolve(str(tmp_path))


def test_a_folder_that_lacks_a_shard_of_its_index(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m", ("config.json", "a.safetensors"))
    write_index(folder, ["a.safetensors", "b.safetensors"])
    with pytest.raises(ModelNotFoundError, match=r": b\.safetensors missing"):
        resolve(str(folder))


def test_a_folder_with_a_broken_index_is_left_to_the_checkpoint_reader(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m", ("config.json", "a.safetensors", "model.safetensors.index.json"))
    assert resolve(str(folder)).folder == folder


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "consolidated.00.pth", "model.Q4_1.gguf"])
def test_a_folder_with_weights_of_another_kind(tmp_path: Path, weights: str) -> None:
    folder = write_files(tmp_path / "m", ("config.json", weights))
    with pytest.raises(UnsupportedModelError, match=rf"holds {weights} and no \*\.safetensors") as caught:
        resolve(str(folder))
    assert "save_pretrained" in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m")
    with pytest.raises(OptionError, match="is a file: give the folder that holds it"):
        resolve(str(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "..\\x"])
def test_a_path_to_nothing_is_not_taken_for_a_hub_id(name: str, online: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder .*check the path, or give a hub id such as Qwen/"):
        resolve(name, offline=False)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name: str) -> None:
    with pytest.raises(OptionError, match="the model name is empty"):
        resolve(name)


@pytest.mark.parametrize("name", ["Qwen 2.5", "org/na me", "-x", "org/"])
def test_a_name_that_nothing_can_have(name: str) -> None:
    with pytest.raises(OptionError, match="no hub id or short name can be written so"):
        resolve(name)


# tq-stream's own models


def test_a_model_made_by_tq_stream_is_found_in_any_letter_case(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path / "own"))
    folder = write_files(tmp_path / "own" / "models" / "smollm2-135m")
    add_cached(hub_cache, "HuggingFaceTB/SmolLM2-135M")
    assert resolve("SmolLM2-135M") == ResolvedModel(folder, "made by tq-stream")


# The local Hugging Face cache


def test_a_cached_hub_id_needs_no_network(hub_cache: Path) -> None:
    snapshot = add_cached(hub_cache, "Qwen/Qwen2.5-14B")
    assert resolve("Qwen/Qwen2.5-14B") == ResolvedModel(snapshot, "Hugging Face cache, Qwen/Qwen2.5-14B")


@pytest.mark.parametrize("missing", COMPLETE)
def test_an_incomplete_cached_model_offline(hub_cache: Path, missing: str) -> None:
    add_cached(hub_cache, "Qwen/Qwen2.5-14B", tuple(name for name in COMPLETE if name != missing))
    expected = "*.safetensors" if missing == "model.safetensors" else missing
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("Qwen/Qwen2.5-14B")
    assert f"(Qwen/Qwen2.5-14B there lacks {expected})" in str(caught.value)
    assert "download Qwen/Qwen2.5-14B" in str(caught.value)


def test_a_short_name_finds_the_cached_model_in_any_letter_case(hub_cache: Path) -> None:
    snapshot = add_cached(hub_cache, "someone/My-Model")
    lines: list[str] = []
    assert resolve("my-model", lines=lines).folder == snapshot
    assert lines == []


def test_a_short_name_finds_the_instruct_model_and_says_so(hub_cache: Path) -> None:
    snapshot = add_cached(hub_cache, "Qwen/Qwen2.5-14B-Instruct")
    lines: list[str] = []
    assert resolve("Qwen2.5-14B", lines=lines).folder == snapshot
    assert lines == ["Qwen2.5-14B is read as Qwen/Qwen2.5-14B-Instruct, the one in the Hugging Face cache"]


def test_the_exact_name_goes_before_instruct(hub_cache: Path) -> None:
    add_cached(hub_cache, "Qwen/Qwen2.5-14B-Instruct")
    snapshot = add_cached(hub_cache, "Qwen/Qwen2.5-14B")
    assert resolve("Qwen2.5-14B").folder == snapshot


def test_an_incomplete_cached_model_does_not_count_as_a_match(hub_cache: Path) -> None:
    add_cached(hub_cache, "Qwen/Qwen2.5-14B", ("config.json",))
    snapshot = add_cached(hub_cache, "Qwen/Qwen2.5-14B-Instruct")
    assert resolve("Qwen2.5-14B").folder == snapshot


def test_instruct_is_not_taken_for_the_base_model(hub_cache: Path) -> None:
    add_cached(hub_cache, "Qwen/Qwen2.5-14B")
    with pytest.raises(ModelNotFoundError, match="model Qwen/Qwen2.5-14B-Instruct not found"):
        resolve("Qwen2.5-14B-Instruct")


def test_several_matches_are_listed(hub_cache: Path) -> None:
    add_cached(hub_cache, "one/My-Model")
    add_cached(hub_cache, "two/my-model")
    with pytest.raises(
        OptionError, match=r"fits 2 models in the Hugging Face cache: one/My-Model, two/my-model\.\n  Give one"
    ):
        resolve("My-Model")


def test_no_cache_folder_at_all(hub_cache: Path) -> None:
    hub_cache.rmdir()
    with pytest.raises(ModelNotFoundError, match="model Qwen/Qwen2.5-14B not found"):
        resolve("Qwen2.5-14B")


# Not there


def test_offline_names_every_place_and_what_to_type(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQ_STREAM_CACHE", str(tmp_path / "own"))
    add_cached(hub_cache, "Qwen/Qwen2.5-7B")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("Qwen2.5-14B")
    message = str(caught.value)
    assert message.startswith("model Qwen/Qwen2.5-14B not found.\n")
    for place in (tmp_path / "work" / "Qwen2.5-14B", tmp_path / "own" / "models" / "qwen2.5-14b", hub_cache):
        assert str(place) in message
    assert "Run once online, without --offline and HF_HUB_OFFLINE" in message
    assert "Here already: Qwen/Qwen2.5-7B." in message
    assert len(message.splitlines()) == 3


def test_the_environment_alone_keeps_it_offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    set_hub(monkeypatch, asked, AssertionError("asked the hub"))
    with pytest.raises(ModelNotFoundError, match="Run once online"):
        resolve("Qwen2.5-14B", offline=False)
    assert asked == []


def test_a_short_name_of_no_known_family(hub_cache: Path, online: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Give the hub id with its organisation \(org/name\), or a folder"):
        resolve("Foo-7B", offline=False)


# The hub


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("Qwen2.5-14B", "Qwen/Qwen2.5-14B"),
        ("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("gemma-2-9b-it", "google/gemma-2-9b-it"),
        ("Phi-4", "microsoft/Phi-4"),
        ("gpt-oss-20b", "openai/gpt-oss-20b"),
        ("gpt-neox-20b", "EleutherAI/gpt-neox-20b"),
        ("Yi-34B", "01-ai/Yi-34B"),
        ("TinyLlama-1.1B", "TinyLlama/TinyLlama-1.1B"),
        ("org/Any", "org/Any"),
    ],
)
def test_a_download_asks_for_the_right_repository(
    hub_cache: Path,
    tmp_path: Path,
    online: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    repo_id: str,
) -> None:
    folder = write_files(tmp_path / "downloaded")
    set_hub(monkeypatch, online, folder)
    lines: list[str] = []
    model = resolve(name, offline=False, lines=lines)
    assert model == ResolvedModel(folder, f"downloaded from the Hugging Face hub, {repo_id}")
    assert [question["repo_id"] for question in online] == [repo_id]
    assert lines == [f"downloading {repo_id} from the Hugging Face hub to {hub_cache}"]


def test_a_download_takes_no_second_copy_of_the_weights(
    hub_cache: Path, tmp_path: Path, online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hub(monkeypatch, online, write_files(tmp_path / "downloaded"))
    resolve("org/Any", offline=False)
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    files += ["chat_template.jinja", "merges.txt", "tokenizer.json"]
    unwanted = ["pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors", "original/model.safetensors"]
    unwanted += ["tokenizer.bin", "onnx/config.json", "README.md"]
    taken = huggingface_hub.utils.filter_repo_objects(
        files + unwanted,
        allow_patterns=online[0]["allow_patterns"],
        ignore_patterns=online[0]["ignore_patterns"],
    )
    assert list(taken) == files


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_an_incomplete_cached_model_is_completed_online(
    hub_cache: Path, online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    add_cached(hub_cache, "Qwen/Qwen2.5-14B", ("config.json",))
    set_hub(monkeypatch, online, write_files(tmp_path / "downloaded"))
    if offline:
        with pytest.raises(ModelNotFoundError, match="there lacks"):
            resolve("Qwen/Qwen2.5-14B", offline=True)
    else:
        assert resolve("Qwen/Qwen2.5-14B", offline=False).folder == tmp_path / "downloaded"
    assert len(online) == (0 if offline else 1)


def test_a_repository_without_safetensors(
    hub_cache: Path, tmp_path: Path, online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_hub(monkeypatch, online, write_files(tmp_path / "downloaded", ("config.json", "tokenizer.json")))
    with pytest.raises(ModelNotFoundError, match=r"\*\.safetensors missing"):
        resolve("org/Any", offline=False)


@pytest.mark.parametrize(
    ("error", "reason", "advice"),
    [
        (
            hub_error(
                hub_errors.GatedRepoError, "403 Client Error. (Request ID: x)\n\nCannot access gated repo for url y."
            ),
            r"\(403 Client Error\. \(Request ID: x\)\)",
            r"Accept its licence at https://huggingface\.co/org/Any, then type: hf auth login",
        ),
        (
            hub_error(hub_errors.RepositoryNotFoundError, "404 Client Error.\nRepository Not Found"),
            r"\(404 Client Error\)",
            "Check the spelling of the id; for a private model type: hf auth login",
        ),
        (
            hub_error(hub_errors.HfHubHTTPError, "503 Server Error\nmore"),
            r"\(503 Server Error\)",
            "Check the network",
        ),
        (hub_errors.LocalEntryNotFoundError("no connection"), r"\(no connection\)", "Check the network"),
        (OSError(28, "No space left on device"), r"\(\[Errno 28\] No space left on device\)", "the free space"),
        (hub_errors.HfHubHTTPError.__bases__[0]("connection reset"), r"\(connection reset\)", "Check the network"),
    ],
    ids=["gated", "not found", "server", "no network", "disk full", "transport"],
)
def test_what_the_hub_refuses_is_told_with_its_reason(
    hub_cache: Path,
    online: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
    advice: str,
) -> None:
    set_hub(monkeypatch, online, error)
    with pytest.raises(ModelNotFoundError, match=rf"(?s)Hugging Face hub org/Any {reason}\.\n.*{advice}") as caught:
        resolve("org/Any", offline=False)
    assert len(str(caught.value).splitlines()) == 3
    assert caught.value.__cause__ is error


def test_an_id_that_the_hub_client_refuses(
    hub_cache: Path, online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="cannot be a hub id"):
        resolve("org/a--b", offline=False)
