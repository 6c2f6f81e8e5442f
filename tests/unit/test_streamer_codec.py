"""Which runs keep and move their weights coded, what their plans say, and what is refused."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from make_checkpoint import SHAPES, write_checkpoint
from streamer import StreamingEngine
from streamer.architecture import Architecture, decoded_bytes, read_architecture
from streamer.checkpoint import Checkpoint
from streamer.cli import main
from streamer.codec import LikelyWeights, make_plan_with_codec, open_packed, pack_for_run
from streamer.engine import plan_report
from streamer.errors import CheckpointError, DoesNotFitError, OptionError
from streamer.options import GIB, MIB, packed_dir
from streamer.packing import THREAD_BYTES, PackedFolder, pack
from streamer.plan import PROCESS_BYTES, Plan, Request, make_plan
from streamer.report import MemoryReport
from streamer.weights import PackedWeights

LAYERS = 8


@pytest.fixture
def folder(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint(
        "qwen2", num_hidden_layers=LAYERS, hidden_size=512, intermediate_size=2048, dtype="bfloat16"
    )


@pytest.fixture
def packed_model(folder: Path) -> Iterator[tuple[Architecture, PackedWeights]]:
    pack(folder, packed_dir(), threads=1)
    with Checkpoint.open(folder) as checkpoint:
        packed = open_packed(checkpoint, "auto", None, on_note=pytest.fail)
        assert isinstance(packed, PackedWeights)
        yield read_architecture(folder, checkpoint), packed
        packed.close()


def least_request(architecture: Architecture) -> Request:
    """A budget in which a ring fits and no layer stays, weights as they are."""
    plan = make_plan(architecture, Request(128, vram_bytes=8 * GIB, ram_bytes=8 * GIB, resident_layers=0))
    return Request(128, vram_bytes=plan.device_bytes, ram_bytes=8 * GIB)


def layers_bytes(plan: Plan) -> int:
    return sum(unit.stored_bytes for unit in plan.units if unit.rows is None)


def test_coded_layers_leave_room_for_more_of_them(packed_model: tuple[Architecture, PackedWeights]) -> None:
    architecture, packed = packed_model
    request = least_request(architecture)
    # half of the layers as they are
    request = replace(request, vram_bytes=(request.vram_bytes or 0) + architecture.layer_bytes // 2)
    raw, _ = plans = [make_plan_with_codec(architecture, packed, codec, request)[1] for codec in ("raw", "auto")]
    assert [plan.is_coded for plan in plans] == [False, True]
    coded = plans[1]
    assert coded.coded_share == layers_bytes(coded) / layers_bytes(raw) < 0.715
    assert raw.layers_resident < coded.layers_resident <= LAYERS
    assert coded.streamed_bytes < raw.streamed_bytes / 1.4
    assert coded.device_bytes <= (request.vram_bytes or 0)
    assert {term.name: term.nbytes for term in coded.terms}["one decoded layer"] == architecture.layer_bytes // LAYERS
    assert coded.notes[-1] == "weights of layers are kept and moved coded, without loss: 70.1 % of their bytes"


def test_host_memory_holds_coded_units(packed_model: tuple[Architecture, PackedWeights]) -> None:
    """In memory that is enough for all layers coded, and not as they are, no file is read again."""
    architecture, packed = packed_model
    request = replace(least_request(architecture), resident_layers=0)
    _, roomy = make_plan_with_codec(architecture, packed, "lossless", request)
    assert {term.name: term.nbytes for term in roomy.terms}["page-locked weights"] == roomy.streamed_bytes
    tight = replace(request, ram_bytes=PROCESS_BYTES + int(1.2 * roomy.streamed_bytes))
    assert make_plan_with_codec(architecture, packed, "lossless", tight)[1].staged_bytes == 0
    assert make_plan_with_codec(architecture, packed, "raw", tight)[1].staged_bytes > 0


def test_a_ring_of_coded_layers_holds_no_prompt(packed_model: tuple[Architecture, PackedWeights]) -> None:
    """A prompt's chunks read a decoded layer: the ring need not hold it beside the next one."""
    architecture, packed = packed_model
    request = replace(least_request(architecture), vram_bytes=8 * GIB, resident_layers=0)
    coded, plan = make_plan_with_codec(architecture, packed, "lossless", request)
    layer = max(sum(unit.stored_bytes for unit in layer) for layer in coded.layers)
    assert plan.ring_bytes <= 1.2 * layer + 256
    assert make_plan(architecture, request).ring_bytes > 1.8 * layer


def test_what_fits_as_it_is_stays_so_unless_asked(packed_model: tuple[Architecture, PackedWeights]) -> None:
    architecture, packed = packed_model
    request = Request(128, vram_bytes=8 * GIB, ram_bytes=8 * GIB)
    assert not make_plan_with_codec(architecture, packed, "auto", request)[1].is_coded
    plan = make_plan_with_codec(architecture, packed, "lossless", request)[1]
    assert plan.is_coded
    assert not plan.streamed_bytes


def test_auto_takes_whichever_fits(packed_model: tuple[Architecture, PackedWeights]) -> None:
    """As they are, two layers must fit the ring; coded, one decoded layer and 1.2 coded ones."""
    architecture, packed = packed_model
    request = replace(least_request(architecture), prefill_chunk=64)
    for change in (0, -4 * MIB, -8 * MIB, -12 * MIB, -GIB):
        changed = replace(request, vram_bytes=(request.vram_bytes or 0) + change)
        found = []
        for codec in ("raw", "lossless", "auto"):
            try:
                found.append(make_plan_with_codec(architecture, packed, codec, changed)[1])
            except DoesNotFitError:
                found.append(None)
        raw, coded, auto = found
        assert (auto is None) == (raw is None and coded is None)
        if auto is not None:
            assert auto.streamed_bytes == min(plan.streamed_bytes for plan in (raw, coded) if plan is not None)


def test_the_cpu_reads_weights_as_they_are(packed_model: tuple[Architecture, PackedWeights], folder: Path) -> None:
    architecture, packed = packed_model
    assert not make_plan_with_codec(architecture, packed, "lossless", Request(16, ram_bytes=8 * GIB))[1].is_coded
    with pytest.raises(OptionError, match="--codec lossless is for a GPU"):
        StreamingEngine(folder, device="cpu", codec="lossless")
    StreamingEngine(folder, device="cpu", codec="auto").close()


def test_a_codec_must_be_known(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint, pytest.raises(OptionError, match="write auto, raw or lossless"):
        open_packed(checkpoint, "zip", None, on_note=pytest.fail)


def test_what_is_not_packed_is_when_a_run_wants_it_coded(folder: Path) -> None:
    """And the run reads what `pack` would have written."""
    lines: list[str] = []
    shares: list[float] = []
    with Checkpoint.open(folder) as checkpoint:
        assert open_packed(checkpoint, "auto", None, on_note=pytest.fail) is None
        likely = open_packed(checkpoint, "lossless", None, on_note=pytest.fail)
        assert isinstance(likely, LikelyWeights)
        made = pack_for_run(
            checkpoint, torch.device("cpu"), ram_bytes=GIB, on_note=lines.append, on_progress=shares.append
        )
        packed = open_packed(checkpoint, "lossless", None, on_note=pytest.fail)
        assert isinstance(packed, PackedWeights)
        assert made.checkpoint.folder == packed.checkpoint.folder
        architecture = read_architecture(folder, checkpoint)
        assert made.coded(architecture) == packed.coded(architecture) != architecture
        made.close()
        packed.close()
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert lines[0] == f"{folder} has not been packed as it is now: it is, once, to {packed_dir()}"
    assert re.fullmatch(r".* of safetensors are .* packed \(7\d\.\d %\)", lines[1])


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many each packing was given; whatever device was asked for, the CPU codes."""
    found: list[int] = []

    def pack_here(*arguments: Any, threads: int, device: torch.device, **options: Any) -> PackedFolder:
        found.append(threads)
        return pack(*arguments, threads=threads, **options)

    monkeypatch.setattr("streamer.codec.pack", pack_here)
    return found


@pytest.fixture
def engine(folder: Path) -> Iterator[StreamingEngine]:
    """As on a GPU until it is assembled, which fails here."""
    with StreamingEngine(folder, bits=16, device="cpu", on_note=[].append) as engine:
        engine._device, engine._codec, engine._vram = torch.device("cuda"), "lossless", 2 * GIB
        engine._packed = LikelyWeights()
        yield engine
        engine._device = torch.device("cpu")


def test_an_engine_packs_when_it_is_assembled(
    engine: StreamingEngine, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr("streamer.codec.usable_cores", lambda: 4)
    given_back: list[bool] = []
    monkeypatch.setattr("streamer.codec._give_back", lambda: given_back.append(True))
    engine.stats.on_progress = lambda what, share: seen.append((what, share))
    assert "likely 70.4 %" in engine.memory_report()._sentences()
    built: dict[str, Any] = {}

    def build(architecture: Architecture, plan: Plan, *arguments: Any, **options: Any) -> None:
        built.update(options, plan=plan)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr("streamer.engine.current_device", lambda device: nullcontext())
    monkeypatch.setattr("streamer.engine.build_runtime", build)
    with pytest.raises(RuntimeError, match="no GPU here"):
        engine.assemble(64)
    assert built["packed"] is engine._packed
    assert not built["plan"].is_share_likely
    assert threads == [4]
    assert given_back == [True]
    assert seen[-1] == ("packing", 1.0)
    assert isinstance(engine._packed, PackedWeights)
    assert any("has not been packed as it is now" in line for line in engine.stats.notes)
    assert "without loss: 70.1 %" in engine.memory_report()._sentences()
    engine.pack()
    assert threads == [4]


def test_what_does_not_fit_is_refused_before_anything_is_packed(engine: StreamingEngine) -> None:
    with pytest.raises(DoesNotFitError):
        engine.assemble(engine.max_context, 4000)
    assert not packed_dir().exists()


def test_packing_keeps_to_the_host_memory_of_the_run(
    folder: Path, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamer.codec.usable_cores", lambda: 16)
    for ram in (GIB, PROCESS_BYTES + 5 * THREAD_BYTES, 64 * GIB):
        with Checkpoint.open(folder) as checkpoint:
            pack_for_run(checkpoint, torch.device("cpu"), ram_bytes=ram, on_note=str).close()
    assert threads == [1, 3, 16]


def test_packing_that_is_interrupted_says_that_it_goes_on(folder: Path) -> None:
    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(KeyboardInterrupt, match="while packing; the same command goes on from here"),
    ):
        pack_for_run(checkpoint, torch.device("cpu"), ram_bytes=GIB, on_note=str, on_progress=interrupt)
    assert list(packed_dir().glob("*.part"))


def test_a_report_of_coded_weights_packs_nothing(folder: Path) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"vram": 8 * GIB, "context": 128, "resident": 0, "link_bytes_per_s": 10e9}
    report = plan_report(folder, codec="lossless", on_note=lines.append, **options)
    assert not packed_dir().exists()
    assert lines[-1].endswith("without loss: likely 70.4 % of their bytes, which packing will show")
    pack(folder, packed_dir(), threads=1)
    known = plan_report(folder, codec="lossless", **options)
    assert report.codec == known.codec == "lossless"
    assert (report.is_coded_share_likely, known.is_coded_share_likely) == (True, False)
    assert report.streamed_bytes == pytest.approx(known.streamed_bytes, rel=0.01)


def test_packed_weights_of_other_files_are_not_used(
    packed_model: tuple[Architecture, PackedWeights], folder: Path
) -> None:
    del packed_model
    shard = next(folder.glob("*.safetensors"))
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    lines: list[str] = []
    try:
        with Checkpoint.open(folder) as checkpoint:
            assert open_packed(checkpoint, "auto", None, on_note=lines.append) is None
        assert lines == [
            "packed weights are left aside: they are of other files, or gone; tq-stream pack makes them anew"
        ]
    finally:
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_packed_weights_stay_in_use_when_a_small_file_changes(
    packed_model: tuple[Architecture, PackedWeights], folder: Path
) -> None:
    """As when a chat template or the defaults of sampling are edited."""
    del packed_model
    small = folder / "generation_config.json"
    before = small.read_text()
    small.write_text(before + "\n")
    try:
        with Checkpoint.open(folder) as checkpoint:
            assert open_packed(checkpoint, "lossless", None, on_note=pytest.fail) is not None
    finally:
        small.write_text(before)


def test_a_device_that_does_not_decode_leaves_packed_weights_aside(
    packed_model: tuple[Architecture, PackedWeights], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del packed_model
    monkeypatch.setattr("streamer.codec.has_kernel", lambda device: False)
    lines: list[str] = []
    with Checkpoint.open(folder) as checkpoint:
        assert open_packed(checkpoint, "auto", torch.device("cpu"), on_note=pytest.fail) is None
        assert open_packed(checkpoint, "auto", torch.device("cuda"), on_note=lines.append) is None
        assert open_packed(checkpoint, "lossless", torch.device("cuda"), on_note=pytest.fail) is not None
        assert open_packed(checkpoint, "auto", None, on_note=pytest.fail) is not None
    assert len(lines) == 1
    assert "no kernel decodes them" in lines[0]


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_note_of_what_was_packed_counts_as_none(
    packed_model: tuple[Architecture, PackedWeights], folder: Path, content: str
) -> None:
    del packed_model
    (note,) = packed_dir().glob("*.json")
    note.write_text(content)
    with Checkpoint.open(folder) as checkpoint:
        assert open_packed(checkpoint, "auto", None, on_note=pytest.fail) is None
    pack(folder, packed_dir(), threads=1)
    with Checkpoint.open(folder) as checkpoint:
        assert open_packed(checkpoint, "auto", None, on_note=pytest.fail) is not None


def test_damaged_packed_weights_are_left_aside_or_refused(
    packed_model: tuple[Architecture, PackedWeights], folder: Path
) -> None:
    _, packed = packed_model
    file = next(iter(packed.checkpoint.tensors.values())).shard
    file.write_bytes(file.read_bytes()[:-1])
    with Checkpoint.open(folder) as checkpoint:
        lines: list[str] = []
        assert open_packed(checkpoint, "auto", None, on_note=lines.append) is None
        assert len(lines) == 1
        assert re.match(f"packed weights are left aside: .*{file.name}", lines[0])
        with pytest.raises(CheckpointError, match=file.name):
            open_packed(checkpoint, "lossless", None, on_note=pytest.fail)


def test_the_report_and_its_command_know_coded_sizes(
    packed_model: tuple[Architecture, PackedWeights], folder: Path
) -> None:
    architecture, packed = packed_model
    vram = (least_request(architecture).vram_bytes or 0) + 64 * MIB
    report = plan_report(folder, vram=vram, bits=16, context=128, codec="lossless", resident=0, link_bytes_per_s=10e9)
    assert report.codec == "lossless"
    layers = sum(unit.stored_bytes for layer in packed.coded(architecture).layers for unit in layer)
    assert report.streamed_bytes == layers
    assert report.first_token_s == layers / 10e9
    arguments = ["memory-report", str(folder), "--vram", f"{vram}B", "--bits", "16", "--context", "128"]
    arguments += ["--resident", "0", "--json", "--link-gbps", "10"]
    for codec, streamed in (("auto", layers), ("lossless", layers), ("raw", architecture.layer_bytes)):
        done = CliRunner().invoke(main, [*arguments, "--codec", codec])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["streamed_bytes"] == streamed
    assert decoded_bytes(packed.coded(architecture).layers[0]) == architecture.layer_bytes // LAYERS


@pytest.mark.parametrize("own", [6, 10, 24])
def test_rows_of_other_budgets_are_what_a_run_with_these_would_do(
    own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is the model fits 24 GiB, and coded it streams less than as it is in 6 and 10."""
    folder = tmp_path / "qwen2.5-7b"
    write_checkpoint(SHAPES["qwen2.5-7b"], folder, headers_only=True)
    monkeypatch.setattr("streamer.engine.open_packed", lambda *_, **__: LikelyWeights())

    def report(size: int) -> MemoryReport:
        return plan_report(folder, vram=size * GIB, ram="64GiB", context=4096, bits=16, link_bytes_per_s=50e9)

    rows = report(own).budgets
    assert {6 * GIB, 12 * GIB} < {row.vram_bytes for row in rows}
    for row in rows:
        wanted = report(row.vram_bytes // GIB)
        assert (row.streamed_bytes, row.layers_resident) == (wanted.streamed_bytes, wanted.layers_resident)
    assert [report(size).codec for size in (6, 10, 24)] == ["lossless", "lossless", "raw"]
