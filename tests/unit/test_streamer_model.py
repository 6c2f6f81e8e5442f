"""The streamed modules: what they refuse, how they split a prompt, and that the assembled model is a real one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from streamer import StreamingEngine, UnsupportedModelError
from streamer.model import Gate, RunSettings, StreamedEmbedding, StreamedLayer
from streamer.stats import RunStats
from streamer.weights import MappedWeights


@pytest.fixture(scope="module")
def engine(random_checkpoint: Callable[..., Path]) -> StreamingEngine:
    return StreamingEngine(random_checkpoint("llama"), bits=16, device="cpu", prefill_chunk=8)


def test_no_parameter_of_the_model_is_on_meta(engine: StreamingEngine) -> None:
    assert {p.device.type for p in engine.model.parameters()} == {"cpu"}
    assert {b.device.type for b in engine.model.buffers()} == {"cpu"}
    assert engine.model.device == torch.device("cpu")
    assert engine.model.dtype == torch.float32


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_layers_do_not_record_are_refused(name: str, engine: StreamingEngine) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        engine.model(input_ids=torch.tensor([[1, 2]]), **{name: True})


def test_all_logits_of_a_long_prompt_equal_the_references(
    engine: StreamingEngine, random_checkpoint: Callable[..., Path]
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(random_checkpoint("llama"), dtype=torch.float32).eval()
    ids = torch.randint(0, 120, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(engine.model(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_without_a_cache_a_prompt_goes_through_whole(
    engine: StreamingEngine, random_checkpoint: Callable[..., Path]
) -> None:
    """Chunks see each other through the cache only."""
    reference = AutoModelForCausalLM.from_pretrained(random_checkpoint("llama"), dtype=torch.float32).eval()
    ids = torch.randint(0, 120, (1, 45), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, wanted = (model(input_ids=ids, use_cache=False).logits for model in (engine.model, reference))
    torch.testing.assert_close(got, wanted)


def test_plain_generate_of_the_model_uses_the_engines_cache(random_checkpoint: Callable[..., Path]) -> None:
    engine = StreamingEngine(random_checkpoint("llama"), bits=3, device="cpu")
    out = engine.model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=3, return_dict_in_generate=True, pad_token_id=127
    )
    assert [row.key_bits for row in out.past_key_values.report()] == [3, 3, 3]


class _Layer(torch.nn.Module):
    """A layer that can be made to skip its part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Linear(4, 4, bias=False)
        self.skips = False

    def forward(
        self, hidden_states: torch.Tensor, past_key_values: Cache, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        return hidden_states * 2 if self.skips else self.part(hidden_states)


class _Recorded(MappedWeights):
    """Writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls = list[str]()

    def is_lent(self, unit: int) -> bool:
        return True

    def wait(self, unit: int) -> None:
        self.calls.append(f"wait {unit}")

    def release(self, unit: int) -> None:
        self.calls.append(f"release {unit}")


def _streamed(chunk: int) -> tuple[StreamedLayer, _Layer, _Recorded, RunStats]:
    layer, weights, stats = _Layer(), _Recorded(), RunStats()
    gate = Gate(layer.part, weights, 5)
    layer._modules["part"] = gate
    return StreamedLayer(layer, 0, [gate], RunSettings(chunk, True), stats), layer, weights, stats


def test_a_part_is_waited_for_once_and_released_after_the_last_chunk() -> None:
    streamed, _, weights, _ = _streamed(chunk=3)
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    whole = streamed._owned[0].part._owned[0](x)
    torch.testing.assert_close(streamed(hidden_states=x.clone(), past_key_values=DynamicCache()), whole)
    assert weights.calls == ["wait 5", "release 5"]


def test_a_part_that_is_never_called_is_an_error_not_a_wrong_answer() -> None:
    streamed, layer, _, _ = _streamed(chunk=3)
    layer.skips = True
    with pytest.raises(UnsupportedModelError, match="layer 0 did not call its part Linear"):
        streamed(hidden_states=torch.zeros(1, 2, 4), past_key_values=DynamicCache())


def test_a_part_that_is_called_twice_is_an_error_not_a_wrong_answer() -> None:
    _, layer, _, _ = _streamed(chunk=3)
    layer(torch.zeros(1, 2, 4), DynamicCache())
    with pytest.raises(UnsupportedModelError, match="calls its part Linear twice"):
        layer(torch.zeros(1, 2, 4), DynamicCache())


def test_an_argument_that_cannot_be_split_sends_the_prompt_through_whole() -> None:
    streamed, _, _, stats = _streamed(chunk=3)
    streamed(hidden_states=torch.zeros(1, 8, 4), past_key_values=DynamicCache(), extra=torch.zeros(8))
    assert stats.notes == ["layer argument extra cannot be split: prompts go through in one chunk"]


def test_a_first_layer_leaves_its_input_alone() -> None:
    """A model may use the embedding again after the first layer."""
    streamed, _, _, _ = _streamed(chunk=3)
    x = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    streamed(hidden_states=x, past_key_values=DynamicCache())
    assert torch.equal(x, before)


def test_scaled_embeddings_keep_their_scale(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("gemma3_text")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()
    table = reference.weight.detach().clone()
    ids = torch.randint(0, 120, (2, 19), generator=torch.Generator().manual_seed(0))
    wanted = reference(ids)
    for chunk in (4096, 5):
        embedding = StreamedEmbedding(reference, table, torch.device("cpu"), RunSettings(chunk, True))
        assert torch.equal(embedding(ids), wanted)
