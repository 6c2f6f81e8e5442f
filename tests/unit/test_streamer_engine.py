"""StreamingEngine's promises that need no demo model: options, lengths, seeds, streams that end early, errors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamer import ContextLengthError, OptionError, StreamingEngine
from streamer.checkpoint import Checkpoint
from streamer.engine import free_ram
from streamer.errors import DoesNotFitError, MissingTensorError
from turboquant import OptionError as TurboQuantOptionError


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint("llama")


@pytest.fixture(scope="module")
def engine(folder: Path) -> StreamingEngine:
    return StreamingEngine(folder, bits=4, device="cpu")


def test_a_seed_repeats_an_answer_and_another_gives_another(engine: StreamingEngine) -> None:
    answers = [engine.generate("abc", max_new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_seed_leaves_the_callers_random_numbers_alone(engine: StreamingEngine) -> None:
    import torch

    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    engine.generate("abc", max_new_tokens=3, temperature=1.0, seed=7)
    assert torch.equal(torch.rand(3), wanted)


def test_stream_gives_what_generate_gives_and_may_be_left_early(engine: StreamingEngine) -> None:
    wanted = engine.generate("abcdef", max_new_tokens=20, temperature=0)
    assert "".join(engine.stream("abcdef", max_new_tokens=20, temperature=0)) == wanted
    pieces = engine.stream("abcdef", max_new_tokens=400, temperature=0)
    next(pieces)
    pieces.close()
    assert engine.stats.new_tokens < 400
    assert engine.generate("abcdef", max_new_tokens=20, temperature=0) == wanted


def test_an_error_while_streaming_reaches_the_caller(engine: StreamingEngine) -> None:
    with pytest.raises(OptionError, match="max_new_tokens"):
        list(engine.stream("abc", max_new_tokens=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": 0, "top_p": 0.9}, "no effect at temperature 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"seed": 2**70}, "seed must be from 0"),
    ],
)
def test_bad_generation_options_are_named(options: dict[str, float], message: str, engine: StreamingEngine) -> None:
    with pytest.raises(OptionError, match=message):
        engine.generate("abc", **options)


def test_an_unknown_option_is_refused(engine: StreamingEngine) -> None:
    with pytest.raises(TypeError, match="beams"):
        engine.generate("abc", beams=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram": "8GiB"}, "for a GPU"),
        ({"resident": 3}, "for a GPU"),
        ({"context": 0}, "context must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"device": "tpu"}, "not a device|cannot be used"),
        ({"device": "cuda"}, "0 CUDA devices were found"),
        ({"ram": "many"}, "not a size"),
        ({"dtype": "int8"}, "not a dtype"),
    ],
)
def test_bad_engine_options_are_named(options: dict[str, str | int], message: str, folder: Path) -> None:
    with pytest.raises(OptionError, match=message):
        StreamingEngine(folder, **({"device": "cpu"} | options))


def test_bits_that_no_code_has_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(TurboQuantOptionError, match="bits"):
        StreamingEngine(folder, bits=5, device="cpu")


def test_a_ram_budget_too_small_for_converted_weights_is_refused(folder: Path) -> None:
    with pytest.raises(DoesNotFitError, match="host memory"):
        StreamingEngine(folder, device="cpu", dtype="bfloat16", ram=1000)


def test_a_prompt_longer_than_the_models_context_is_refused(engine: StreamingEngine, folder: Path) -> None:
    with pytest.raises(ContextLengthError, match=r"600 tokens and its context is 512"):
        engine.generate("a" * 600)
    with (
        StreamingEngine(folder, device="cpu", context=64) as short,
        pytest.raises(ContextLengthError, match=r"100 tokens and --context is 64.*up to 512"),
    ):
        short.generate("a" * 100)


def test_an_answer_that_would_pass_the_context_is_cut_and_says_so(engine: StreamingEngine) -> None:
    engine.generate("a" * 500, max_new_tokens=100, temperature=0)
    assert engine.stats.new_tokens == 12
    assert "answer limited to 12 tokens: its context is 512" in engine.stats.notes


@pytest.mark.parametrize(("bits", "has_line"), [(3, True), (16, False)])
def test_a_run_whose_kernels_may_have_to_be_compiled_says_so(
    bits: int, has_line: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamer.engine.kernels_serve", lambda device: True)
    with StreamingEngine(folder, bits=bits, device="cpu") as engine:
        engine.generate("a", max_new_tokens=1)
        assert any("compiles them" in note for note in engine.stats.notes) == has_line


def test_the_report_predicts_the_caches_bytes_exactly(folder: Path) -> None:
    for bits in (16, 4, 3, 2):
        with StreamingEngine(folder, bits=bits, device="cpu") as engine:
            before = engine.memory_report()
            assert {row.measured_bytes for row in before.rows} == {None}
            engine.generate("a" * 300, max_new_tokens=40, temperature=0)
            row = next(row for row in engine.memory_report().rows if row.name == "KV cache")
            assert row.measured_bytes == row.predicted_bytes


def test_a_checkpoint_that_turns_the_cache_off_gets_one_all_the_same(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama", use_cache=False)
    with StreamingEngine(folder, bits=3, device="cpu", prefill_chunk=7) as engine:
        engine.generate("a" * 50, max_new_tokens=5, temperature=0)
        assert next(row for row in engine.memory_report().rows if row.name == "KV cache").measured_bytes


def test_an_error_in_the_models_own_generate_leaves_it_usable(folder: Path) -> None:
    import torch

    with StreamingEngine(folder, bits=16, device="cpu", prefill_chunk=4) as engine:
        ids = torch.tensor([list(range(1, 20))])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 127}
        wanted = engine.model.generate(ids, **options)

        def fail(what: str, share: float) -> None:
            raise RuntimeError("planted")

        engine.stats.on_progress = fail
        with pytest.raises(RuntimeError, match="planted"):
            engine.model.generate(ids, **options)
        engine.stats.on_progress = None
        assert torch.equal(engine.model.generate(ids, **options), wanted)


def test_an_incomplete_checkpoint_does_not_run_with_its_table_as_head(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "no-head"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"no lm_head.weight, and config.json says"):
        StreamingEngine(copy, device="cpu")


def test_a_longer_prompt_than_the_first_needs_no_new_layout(folder: Path) -> None:
    with StreamingEngine(folder, bits=4, device="cpu") as engine:
        engine.generate("a" * 10, max_new_tokens=2, temperature=0)
        assert engine.plan is not None
        assert engine.plan.request.context == 512
        engine.generate("a" * 300, max_new_tokens=2, temperature=0)
        report = engine.memory_report()
        row = next(row for row in report.rows if row.name == "KV cache")
        assert row.measured_bytes == row.predicted_bytes
        assert report.kv_tokens == 302


def test_an_empty_prompt_is_refused(engine: StreamingEngine) -> None:
    with pytest.raises(OptionError, match="prompt is empty"):
        engine.generate("")


def test_after_an_error_in_a_layer_the_engine_answers_again(engine: StreamingEngine) -> None:
    wanted = engine.generate("abc", max_new_tokens=5, temperature=0)

    def fail(what: str, share: float) -> None:
        raise RuntimeError("planted")

    engine.stats.on_progress = fail
    with pytest.raises(RuntimeError, match="planted"):
        engine.generate("abc", max_new_tokens=5, temperature=0)
    engine.stats.on_progress = None
    assert engine.generate("abc", max_new_tokens=5, temperature=0) == wanted


def test_free_memory_is_what_a_containers_limit_leaves(tmp_path: Path) -> None:
    everything = free_ram(tmp_path)
    assert everything > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nactive_file 100000\ninactive_file 150000\n")
    assert free_ram(tmp_path) == pytest.approx(everything, rel=0.1)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_ram(tmp_path) == 1000000 - 700000 + 250000


def test_a_prompts_rows_are_asked_for_before_they_are_read(
    random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cold run waited a second for rows of the embedding, one after the other."""
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(Checkpoint, "will_need_rows", lambda self, name, rows: asked.append(rows))
    with StreamingEngine(random_checkpoint("llama"), device="cpu", bits=16) as engine:
        engine.generate_ids([5, 3, 5, 9], max_new_tokens=3, temperature=0)
    assert [rows.tolist() for rows in asked] == [[[5, 3, 5, 9]]]
