"""The ring without a GPU: on the CPU its copies are synchronous, so order, places and counts can be checked."""

import gc
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamer.architecture import read_architecture, read_parameter
from streamer.checkpoint import Checkpoint
from streamer.errors import StreamerError
from streamer.model import RunSettings, assemble
from streamer.plan import Plan, Request, make_plan
from streamer.stats import RunStats
from streamer.weights import DeviceWeights, PieceReader

CPU = torch.device("cpu")


SLOT_BYTES = 64 << 10


class ReadEachTime:
    """A source that reads a unit from the files when its place is free, and poisons the place first."""

    def __init__(self, reader: PieceReader, resident: Collection[int]):
        self.reader, self.resident, self.sent = reader, resident, list[int]()
        self.arrived = list[torch.cuda.Event]()
        self.is_settled, self.has_failed = True, False

    def start(self, places: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        self.places = places
        for unit in sorted(self.resident):
            self.grant(unit, 0)

    def grant(self, unit: int, cycle: int) -> None:
        place = self.places[unit]
        place.fill_(0xFF)  # NaN in every float dtype: a parameter that is not written again shows
        slot = torch.empty(SLOT_BYTES, dtype=torch.uint8)
        for piece in self.reader.pieces[unit]:
            for at, view in self.reader.read(piece, slot, None):
                place[at : at + view.numel()] = view
        self.sent.append(unit)

    def is_queued(self, unit: int, loads: int) -> bool:
        return True

    def wait(self, unit: int, loads: int) -> None:
        """Nothing is under way."""

    def restart(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


def streamed(folder: Path, **request: Any) -> tuple[PreTrainedModel, DeviceWeights, Plan, ReadEachTime]:
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(folder, checkpoint)
    wanted = {"context": 128, "vram_bytes": 1 << 34, "ram_bytes": 1 << 34, "resident_layers": 0, "prefill_chunk": 7}
    plan = make_plan(architecture, Request(**(wanted | request)))
    source = ReadEachTime(PieceReader(checkpoint, architecture.model, plan.units, SLOT_BYTES), plan.resident)
    weights = DeviceWeights(plan.units, plan.resident, plan.ring_bytes, source, CPU)
    weights.start()
    resident = {p.name: read_parameter(p, checkpoint, architecture.model) for p in architecture.resident}
    table = read_parameter(architecture.embedding, checkpoint, architecture.model)
    settings = RunSettings(plan.prefill_chunk, architecture.uses_own_attention)
    model = assemble(architecture, plan.units, weights, resident, table, CPU, settings, RunStats())
    return model, weights, plan, source


def answer(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=127)


@pytest.mark.parametrize("resident", [0, 1, 2, None])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen3_moe", "gemma2", "opt"])
def test_a_ring_on_the_cpu_gives_the_same_answer(
    model_type: str, resident: int | None, random_checkpoint: Callable[..., Path]
) -> None:
    folder = random_checkpoint(model_type)
    ids = torch.randint(0, 120, (1, 30), generator=torch.Generator().manual_seed(0))
    model, weights, plan, source = streamed(folder, resident_layers=resident)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(answer(model, ids), answer(reference, ids))
    in_ring = [i for i in range(len(plan.units)) if i not in plan.resident]
    if in_ring:
        cycle = [unit for unit in source.sent if unit in in_ring]
        assert all(unit == in_ring[i % len(in_ring)] for i, unit in enumerate(cycle)), "copies follow the pass"
        assert 12 * len(in_ring) <= len(cycle) <= 13 * len(in_ring), "one copy a pass, and what runs ahead"
    assert all(source.sent.count(unit) == 1 for unit in plan.resident), "resident units are copied once"
    assert weights.bytes_moved == sum(plan.units[unit].nbytes for unit in source.sent)


def test_the_ring_takes_no_more_than_planned_and_places_are_aligned(random_checkpoint: Callable[..., Path]) -> None:
    _, weights, plan, _ = streamed(random_checkpoint("llama"))
    assert weights.ring.nbytes == plan.ring_bytes
    assert weights.resident_bytes.nbytes == sum(plan.units[i].nbytes for i in plan.resident)
    for index, unit in enumerate(plan.units):
        for parameter in unit.parameters:
            assert (weights.parameter(index, parameter).data_ptr() - weights.ring.data_ptr()) % 256 == 0 or (
                index in plan.resident
            )


def test_the_next_pass_is_on_its_way_when_a_pass_ends(random_checkpoint: Callable[..., Path]) -> None:
    model, _, plan, source = streamed(random_checkpoint("llama"))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    in_ring = [i for i in range(len(plan.units)) if i not in plan.resident]
    ahead = [unit for unit in source.sent if unit in in_ring][len(in_ring) :]
    assert ahead == in_ring[: len(ahead)]
    assert ahead, "no unit of the next pass was sent"


def test_waiting_for_a_unit_whose_place_is_taken_is_an_error_not_a_wrong_answer(
    random_checkpoint: Callable[..., Path],
) -> None:
    _, weights, plan, _ = streamed(random_checkpoint("llama"))

    def wait_for_all() -> None:
        for unit in range(len(plan.units)):
            weights.wait(unit)  # never released

    with pytest.raises(RuntimeError, match="too small"):
        wait_for_all()


@pytest.mark.parametrize("spare", range(14))
def test_any_budget_reads_a_prompt_in_chunks(spare: int, random_checkpoint: Callable[..., Path]) -> None:
    """Budgets that keep one part of a layer and stream the other: a layer's units must have places of their own."""
    folder = random_checkpoint("llama", num_hidden_layers=6, intermediate_size=160)
    architecture = read_architecture(folder, Checkpoint.open(folder))
    least = make_plan(architecture, Request(128, vram_bytes=1 << 34, ram_bytes=1 << 34, resident_layers=0)).device_bytes
    part = architecture.layer_bytes // 14
    model, _, plan, _ = streamed(folder, vram_bytes=least + spare * part + part // 3, resident_layers=None)
    ids = torch.randint(0, 120, (1, 30), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(answer(model, ids), answer(reference, ids)), plan.resident


def test_closing_frees_the_model_at_once(random_checkpoint: Callable[..., Path]) -> None:
    """Not when the garbage collector comes by: a second layout would not fit beside the first."""
    model, weights, _, source = streamed(random_checkpoint("llama"))
    answer(model, torch.tensor([[1, 2, 3]]))
    freed = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        weights.close()
        del model, weights, source
        assert freed() is None
    finally:
        gc.enable()


def test_a_closed_models_weights_say_so(random_checkpoint: Callable[..., Path]) -> None:
    model, weights, _, _ = streamed(random_checkpoint("llama"))
    weights.close()
    with pytest.raises(StreamerError, match="has been closed"):
        model(input_ids=torch.tensor([[1]]))


def test_after_abort_a_pass_starts_anew(random_checkpoint: Callable[..., Path]) -> None:
    folder = random_checkpoint("llama")
    model, weights, _, _ = streamed(folder)
    ids = torch.tensor([[1, 2, 3, 4]])
    wanted = answer(model, ids)
    weights.wait(0)
    weights.abort()
    assert torch.equal(answer(model, ids), wanted)
