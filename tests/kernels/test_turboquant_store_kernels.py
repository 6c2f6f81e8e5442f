"""CompressedKV on kernels, in Triton's interpreter, against itself in plain PyTorch."""

import copy
import gc
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from turboquant import CompressedKV, KeyBias, Precision, StateError, StoreOptions
from turboquant.blocks import rotation_bytes
from turboquant.store import store_bytes

HEADS = 2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch, device: str) -> Any:
    """A function that makes the next store use kernels, or not, and gives the device."""

    def use(wanted: bool) -> str:
        monkeypatch.setattr("turboquant.store.kernels_serve", lambda device, *dims: wanted)
        return device

    return use


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Pair:
    """The same tokens in a store on kernels and in one in plain PyTorch."""

    def __init__(self, use: Any, options: StoreOptions, *, batch: int = 1, dim: int = 32, bias: bool = False):
        self.batch, self.dim, self.seed = batch, dim, 0
        self.dtype = torch.float32
        key_bias = None
        if bias:
            key_bias = KeyBias(3 * draw(HEADS, dim, seed=99, dtype=torch.float32), 10_000.0 ** -torch.linspace(0, 1, 8))
        self.stores = []
        for wanted in (True, False):
            self.device = use(wanted)
            self.stores.append(CompressedKV(options, key_bias=key_bias))
        self.use = use

    def append(self, tokens: int, pads: Iterable[int] | None = None) -> None:
        self.seed += 2
        shape = self.batch, HEADS, tokens, self.dim
        keys, values = (draw(*shape, seed=self.seed + i, dtype=self.dtype).to(self.device) for i in (0, 1))
        for wanted, store in zip((True, False), self.stores, strict=True):
            self.use(wanted)
            store.append(keys, values, None if pads is None else list(pads))

    def check(self, queries: int = 1, *, scale_steps: int = 1) -> None:
        """Same tokens, same blocks, answers within float16's rounding of centroids, weights and queries.

        scale_steps: by how many steps of float16, at most 2^-10 each, a vector's scale may differ.
        """
        ours, plain = self.stores
        assert ours.lengths == plain.lengths
        assert [len(row.blocks) for row in ours._rows] == [len(row.blocks) for row in plain._rows]
        q = draw(self.batch, 2 * HEADS, queries, self.dim, seed=1000, dtype=self.dtype).to(self.device)
        out = ours.attend(q, scale=self.dim**-0.5)
        on_device, ours._device_tokens = ours._device_tokens, None
        reference = ours.attend(q, scale=self.dim**-0.5)  # plain PyTorch over the same codes
        ours._device_tokens = on_device
        error = (out - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-9)
        assert error.max() < 2e-3
        for left, right in zip(ours.unpacked(), plain.unpacked(), strict=True):
            # a code on a threshold may fall to either side: few vectors, and one cell wide
            difference = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-9)
            assert (difference > scale_steps * 2**-10).float().mean() < 0.01
            assert difference.max() < 0.2


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_decoding_token_by_token(on_kernels: Any, bits: int, bias: bool) -> None:
    """Through sinks, the filling of the window, and two blocks that leave it."""
    pair = Pair(on_kernels, StoreOptions(Precision(bits, bits), window=16, sinks=2), bias=bias)
    pair.append(1)
    pair.check()
    for tokens in (70, 5):
        pair.append(tokens)
        pair.check(min(tokens, 3))
    for _ in range(75):
        pair.append(1)
    pair.check()
    assert len(pair.stores[0]._rows[0].blocks) == 2


def test_a_batch_with_padding(on_kernels: Any) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(3, 4), window=16), batch=3, bias=True)
    pair.append(90, pads=[0, 7, 85])
    pair.check(3)
    for _ in range(6):
        pair.append(1)
    pair.check()
    assert pair.stores[0].lengths == (96, 89, 11)


def test_a_batch_that_is_still_padding(on_kernels: Any) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(3, 3), window=16), batch=2)
    pair.append(1, pads=[0, 2])
    pair.append(1)
    pair.append(1)
    pair.check()
    assert pair.stores[0].lengths == (3, 1)


@pytest.mark.parametrize("cut", [3, 30, 100])
def test_crop(on_kernels: Any, cut: int) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(4, 4), window=16, sinks=2), bias=True)
    pair.append(200)
    for store in pair.stores:
        store.crop(cut)
    pair.check()
    for _ in range(3):
        pair.append(1)
    pair.check()


def test_recorded_past(on_kernels: Any) -> None:
    """Drafts of speculative decoding: taken back, then committed."""
    pair = Pair(on_kernels, StoreOptions(Precision(4, 4), window=16, sinks=2))
    pair.append(60)
    for store in pair.stores:
        store.record_past()
    for _ in range(40):
        pair.append(5)
        for store in pair.stores:
            store.crop(2)
    pair.check(5)
    pair.append(1)
    pair.check()


def test_rows_selected(on_kernels: Any) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(3, 3), window=16), batch=2)
    pair.append(150, pads=[0, 10])
    for store in pair.stores:
        store.select_rows([1, 1])
    pair.append(1)
    pair.check()


@pytest.mark.parametrize("widths", [(16, 3), (3, 16)])
def test_one_side_uncompressed(on_kernels: Any, widths: tuple[int, int]) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(*widths), window=16), bias=True)
    pair.append(150)
    pair.append(1)
    pair.check()


@pytest.mark.parametrize("dim", [24, 72])
def test_codes_do_not_depend_on_the_chunking(on_kernels: Any, dim: int) -> None:
    device = on_kernels(True)
    keys, values = (draw(1, HEADS, 300, dim, seed=seed, dtype=torch.bfloat16).to(device) for seed in (1, 2))
    bias = KeyBias(draw(HEADS, dim, seed=3, dtype=torch.float32), 10_000.0 ** -torch.linspace(0, 1, 8))
    held = []
    for chunks in ([300], [1] * 10 + [110, 100, 13] + [1] * 67, [130, 170]):
        store = CompressedKV(StoreOptions(Precision(3, 3), window=16), key_bias=bias)
        start = 0
        for size in chunks:
            store.append(keys[:, :, start : start + size], values[:, :, start : start + size])
            start += size
        records = torch.cat([part for _, part, _ in store._records().runs(store._rows[0].blocks)])
        held.append((records, *store.unpacked()))
    for other in held[1:]:
        assert all(torch.equal(a, b) for a, b in zip(held[0], other, strict=True))


def test_growth_and_bytes(on_kernels: Any) -> None:
    """No tensor is made in a step within a slab, and what is predicted is what is held."""
    device = on_kernels(True)
    options = StoreOptions(Precision(3, 3), window=16, sinks=2, capacity_tokens=400)
    bias = KeyBias(draw(HEADS, 32, seed=3, dtype=torch.float32), 10_000.0 ** -torch.linspace(0, 1, 8))
    store = CompressedKV(options, key_bias=bias)
    keys = draw(1, HEADS, 400, 32, seed=1, dtype=torch.bfloat16).to(device)
    predicted = store_bytes(400, 1, HEADS, 32, 32, options, torch.bfloat16, has_kernels=True)
    if device == "cpu":  # where the signs stay that matrices are made from
        predicted += 2 * rotation_bytes("hadamard", 32)
    for token in range(0, 400, 50):
        store.append(keys[:, :, token : token + 49], keys[:, :, token : token + 49])
        before = [tensor.data_ptr() for tensor in store.tensors]
        store.append(keys[:, :, token + 49 : token + 50], keys[:, :, token + 49 : token + 50])
        assert [tensor.data_ptr() for tensor in store.tensors] == before
        assert store.nbytes == predicted + bias.nbytes + bias.table_nbytes
        assert sum(store.bytes_by_part().values()) == store.nbytes


@pytest.mark.parametrize("widths", [(4, 4), (4, 16), (3, 4)])
def test_aged_blocks(on_kernels: Any, widths: tuple[int, int]) -> None:
    """Some blocks have fewer planes than others, in one row."""
    pair = Pair(on_kernels, StoreOptions(Precision(*widths), window=16, sinks=2), batch=2, bias=True)
    pair.append(400, pads=[0, 130])
    for store in pair.stores:
        store.age(0, 3, key_bits=3, value_bits=2)
        store.age(0, 1, key_bits=2)
    pair.check(3, scale_steps=3)
    pair.append(100)
    pair.append(1)
    pair.check(scale_steps=3)
    assert pair.stores[0]._records().is_mixed
    for ours, plain in zip(*(store._rows for store in pair.stores), strict=True):
        layouts = [
            [store._records().layout_of(block) for block in row.blocks]
            for store, row in zip(pair.stores, (ours, plain), strict=True)
        ]
        assert layouts[0] == layouts[1]


def test_steps_of_a_graph(on_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph holds changes nothing on the host, and gives what separate steps give, over two filled blocks."""
    options = StoreOptions(Precision(3, 3), window=16, sinks=2)
    pair = Pair(on_kernels, options, batch=2, bias=True)
    pair.append(90, pads=[0, 7])
    ours, plain = pair.stores
    ours.reserve(130)
    lengths, nbytes = ours.lengths, ours.nbytes
    for step in range(130):
        keys, values = (
            draw(2, HEADS, 1, 32, seed=3000 + 2 * step + i, dtype=torch.float32).to(pair.device) for i in (0, 1)
        )
        q = draw(2, 2 * HEADS, 1, 32, seed=9000 + step, dtype=torch.float32).to(pair.device)
        on_kernels(False)
        plain.append(keys, values)
        monkeypatch.setattr("turboquant.store.is_capturing", lambda: True)
        ours.append(keys, values)
        out = ours.attend(q, scale=32**-0.5) if step % 43 == 0 else None
        monkeypatch.setattr("turboquant.store.is_capturing", lambda: False)
        assert ours.lengths == lengths
        assert ours.nbytes == nbytes
        if out is not None:
            reference = plain.attend(q, scale=32**-0.5)
            # other codes where a coordinate lies on a threshold
            assert ((out - reference).norm() / reference.norm()).item() < 0.02
    ours.advance(130)
    pair.check()
    for _ in range(3):
        pair.append(1)
    pair.check()
    named = [block for row in ours._rows for block in (*row.blocks, *row.reserved)]
    assert ours._records().uses == [named.count(block) for block in range(len(ours._records()))]
    with pytest.raises(StateError, match="reserved for fewer"):
        ours.advance(500)


def test_a_graph_holds_single_tokens_only(on_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_kernels(True)
    store = CompressedKV(StoreOptions(Precision(3, 3)))
    with pytest.raises(StateError, match="append some first"):
        store.reserve(10)
    tokens = draw(1, HEADS, 2, 32, seed=1, dtype=torch.float32).to(device)
    store.append(tokens, tokens)
    monkeypatch.setattr("turboquant.store.is_capturing", lambda: True)
    with pytest.raises(StateError, match="steps of one token"):
        store.append(tokens, tokens)


@pytest.mark.gpu
def test_a_captured_step_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one-token step, append and attention, replayed past the end of two blocks, against single calls."""
    monkeypatch.setattr("turboquant.store.kernels_serve", lambda device, *dims: True)
    options = StoreOptions(Precision(3, 3), window=16, sinks=2)
    bias = KeyBias(draw(HEADS, 64, seed=3, dtype=torch.float32), 10_000.0 ** -torch.linspace(0, 1, 8))
    stores = [CompressedKV(options, key_bias=bias) for _ in range(3)]
    prompt = draw(1, HEADS, 200, 64, seed=1, dtype=torch.bfloat16).cuda()
    for store in stores:
        store.append(prompt, prompt)
    graphed, plain, warm = stores
    keys, values, q = (torch.zeros(1, heads, 1, 64, dtype=torch.bfloat16).cuda() for heads in (HEADS, HEADS, 8))
    # compiles and loads exactly what the graph will hold
    warm.reserve(140)
    with monkeypatch.context() as captured:
        captured.setattr("turboquant.store.is_capturing", lambda: True)
        for _ in range(3):
            warm.append(keys, values)
            warm.attend(q, scale=0.125)
    torch.cuda.synchronize()
    graphed.reserve(140)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.append(keys, values)
        out = graphed.attend(q, scale=0.125)
    for step in range(140):
        for tensor, seed in ((keys, 0), (values, 1), (q, 2)):
            tensor.copy_(draw(*tensor.shape, seed=100 + 3 * step + seed, dtype=torch.bfloat16))
        graph.replay()
        plain.append(keys, values)
        torch.testing.assert_close(out, plain.attend(q, scale=0.125), rtol=1e-2, atol=1e-3)
    graphed.advance(140)
    for ours, theirs in zip(graphed.unpacked(), plain.unpacked(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_reads_its_own_memory(on_kernels: Any) -> None:
    """Copies of a cache with several slabs; the first one is gone when the copy is read."""
    pair = Pair(on_kernels, StoreOptions(Precision(3, 4), window=16), bias=True)
    for _ in range(3):
        pair.append(150)
    assert len(pair.stores[0]._records().slabs) > 1
    pair.stores = [copy.deepcopy(store) for store in pair.stores]
    gc.collect()
    pair.check()
    pair.append(100)
    pair.check()


def test_recording_after_decoding(on_kernels: Any) -> None:
    """Blocks that single tokens have filled stay blocks when the window grows."""
    pair = Pair(on_kernels, StoreOptions(Precision(4, 4), window=16, sinks=2))
    pair.append(60)
    for _ in range(80):
        pair.append(1)
    for store in pair.stores:
        store.record_past()
    pair.check()


@pytest.mark.parametrize("widths", [(4, 4), (16, 4)])
def test_tokens_of_another_dtype_are_rounded(on_kernels: Any, widths: tuple[int, int]) -> None:
    pair = Pair(on_kernels, StoreOptions(Precision(*widths), window=16))
    pair.dtype = torch.float16
    pair.append(20)
    pair.dtype = torch.float32
    pair.append(150)
    pair.append(1)
    pair.dtype = torch.float16
    pair.check()
