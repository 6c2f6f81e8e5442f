"""docs/migrating.md: every line of ours runs, and gives what the page says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamer
from streamer.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"

# What users of the other packages call; each must stand in a line of theirs.
THEIRS = [
    *(
        "TurboQuantCache(bits",
        "key_bits=4, value_bits=2, protected_layers=",
        "mse_only=True",
        "CompressedDynamicCache(",
    ),
    *("TurboQuantMSE(", "tq.quantize(", "tq.dequantize(", "TurboQuantEstimator(", ".inner_product(", "wrap("),
    *("cache.append(", ".attention_scores(", ".get_values(", "cache.compress(", "cache.attention(", ".for_gqa("),
    *("TurboQuantDynamicCache.from_model(", "AdaptiveKVCache(", "gradient_allocation(", "TurboQuantIndex("),
    *("compress_model_kv(", "StreamingInferenceEngine(", ".load_model_streaming(", "engine.generate("),
    *("engine.memory_report(", "AdaptiveKVCache.from_model(", "TemporalDecayCache("),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran(random_checkpoint: Callable[..., Path]) -> dict[str, Any]:
    """The names that the page's lines leave, run one after the other as they stand."""
    folder = random_checkpoint("llama")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("x" * 300, return_tensors="pt")
    with torch.no_grad():
        past_key_values = model(**inputs, use_cache=True).past_key_values
    names: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "inputs": inputs,
        "past_key_values": past_key_values,
        "vectors": draw(2000, 128),
        "query": draw(3, 128),
        "keys": draw(2, 4, 400, 128),
        "values": draw(2, 4, 400, 128),
        "queries": draw(2, 8, 1, 128)[:, ::2],
    }
    names["caches"] = []

    class Engine(streamer.StreamingEngine):
        """The tiny model on the CPU in place of the one that is named."""

        def __init__(self, model: str, **options: Any):
            super().__init__(folder, device="cpu", **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamer, "StreamingEngine", Engine, raising=False)
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), names)
            names["caches"].append(names.get("cache"))
    return names


def test_what_users_call_stands_on_the_page() -> None:
    theirs = "".join(blocks("text"))
    assert [call for call in THEIRS if call not in theirs] == []


def test_caches_are_what_the_page_says(ran: dict[str, Any]) -> None:
    first, _, filled, keys_more, layers, decaying = ran["caches"][:6]
    bits = [(row.key_bits, row.value_bits) for row in first.report()]
    assert bits == [(16, 16)] * 3, "three layers: the protected ones are all of them"
    assert all(row.nbytes > 0 for row in first.report())
    for compressed, plain in zip(filled.layers, ran["past_key_values"].layers, strict=True):
        assert compressed.store.coded_tokens == 64 * 2
        for found, exact in zip(compressed.store.unpacked(), (plain.keys, plain.values), strict=True):
            torch.testing.assert_close(found[:, :, 4 + 128 :], exact[:, :, 4 + 128 :], atol=1e-5, rtol=1e-5)
            assert 0.05 < float((found - exact).norm() / exact.norm()) < 0.2
    assert [(row.key_bits, row.value_bits) for row in keys_more.report()] == [(4, 3)] * 3
    assert [(row.key_bits, row.value_bits) for row in layers.report()] == [(4, 4), (3, 3), (2, 2)]
    assert [(step.age_tokens, step.bits) for step in decaying.layers[0].store.options.decay] == [(512, 3), (4608, 2)]


def test_scores_and_answers_are_close_to_exact_ones(ran: dict[str, Any]) -> None:
    keys, values, queries = ran["keys"], ran["values"], ran["queries"]
    exact = queries @ keys.mT
    # 3 bits have a relative squared error of 0.036
    assert float((ran["scores"] - exact).square().mean() / exact.square().mean()) < 0.04
    wanted = (exact * 128**-0.5).softmax(-1) @ values
    assert float((ran["attended"] - wanted).norm() / wanted.norm()) < 0.25


def test_vectors_come_back_with_the_error_of_their_bits(ran: dict[str, Any]) -> None:
    vectors = ran["vectors"]
    # of N(0, 1) (docs/math.md); on a sphere of 128 dimensions it is up to 4 % less
    for found, error in ((ran["vectors_hat"], 0.0095), (ran["x_hat"], 0.0346 / (1 - 0.0346))):
        assert float((found - vectors).square().sum() / vectors.square().sum()) == pytest.approx(error, rel=0.04)


def test_estimates_are_unbiased(ran: dict[str, Any]) -> None:
    """The mean of 6,000 errors is zero within four standard errors."""
    exact = ran["query"] @ ran["vectors"].T
    assert ran["estimates"].shape == exact.shape
    wrong = (ran["estimates"] - exact).flatten()
    assert abs(float(wrong.mean())) < 4 * float(wrong.std()) / wrong.numel() ** 0.5
    assert float(wrong.std()) < 0.6 * float(exact.std())


def test_the_index_finds_what_is_near(ran: dict[str, Any]) -> None:
    exact = (ran["query"] @ ran["vectors"].T).topk(10).indices
    hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(exact, ran["found"], strict=True))
    assert ran["found_scores"].shape == (3, 10)
    assert hits >= 21  # of 30, at 3 bits on vectors that share nothing


def test_commands_run(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It is a truth universally acknowledged. " * 20, encoding="utf-8")
    (line,) = "".join(blocks("sh")).splitlines()
    told = line.replace("Qwen2.5-14B", str(random_checkpoint("llama"))).replace("book.txt", str(tmp_path / "book.txt"))
    result = CliRunner().invoke(main, [*told.split()[1:], "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch(r"--layer-bits [\d:,/-]+\n", result.stdout)
