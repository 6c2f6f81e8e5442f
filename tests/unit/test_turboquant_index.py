"""TurboQuantIndex against exact search, and what it does with wrong input."""

from pathlib import Path

import pytest
import torch

from turboquant import TurboQuantIndex
from turboquant.errors import OptionError, ShapeError, StateError

DIM = 96


def embeddings(count: int, seed: int = 0) -> torch.Tensor:
    """Vectors as sentence embeddings lie: one direction shared by all, and clusters."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, DIM, generator=torch.Generator().manual_seed(99))
    x = centres[torch.randint(50, (count,), generator=draw)] + torch.randn(count, DIM, generator=draw)
    return x + 1.5


def exact(x: torch.Tensor, q: torch.Tensor, metric: str) -> torch.Tensor:
    """Scores of all vectors, the largest best."""
    if metric == "cosine":
        x, q = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(q, dim=1)
    return -torch.cdist(q, x).square() if metric == "l2" else q @ x.T


def recall(index: TurboQuantIndex, x: torch.Tensor, q: torch.Tensor, k: int = 10) -> float:
    wanted = exact(x, q, index.metric).topk(k).indices
    found = index.search(q, k)[1]
    return (found[:, :, None] == wanted[:, None, :]).any(1).float().mean().item()


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_recall_grows_with_bits(metric: str) -> None:
    x, q = embeddings(20_000), embeddings(200, seed=1)
    found = []
    for bits in (2, 3, 4, 8):
        index = TurboQuantIndex(DIM, bits, metric)
        assert index.add(x) == range(20_000)
        found.append(recall(index, x, q))
    assert found == sorted(found)
    assert found[2] > 0.75  # 4 bits: no rerank, and neighbours of random clusters lie close together
    assert found[3] > 0.97


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_scores_are_estimates_of_the_metric(metric: str) -> None:
    x, q = embeddings(1000), embeddings(20, seed=1)
    index = TurboQuantIndex(DIM, 8, metric)
    index.add(x)
    scores, ids = index.search(q, 5)
    wanted = exact(x, q, metric).gather(1, ids)
    wanted = -wanted if metric == "l2" else wanted
    assert torch.allclose(scores, wanted, rtol=2e-2, atol=1e-2 * wanted.abs().max().item())
    order = scores.diff(dim=1)
    assert ((order >= 0) if metric == "l2" else (order <= 0)).all()


def test_a_large_mean_costs_nothing_when_it_is_taken_out() -> None:
    x, q = embeddings(20_000) + 6, embeddings(200, seed=1) + 6
    plain, centred = (TurboQuantIndex(DIM, 3, center=center) for center in (False, True))
    plain.add(x)
    centred.add(x)
    assert recall(centred, x, q) > recall(plain, x, q) + 0.1


def test_vectors_come_in_pieces() -> None:
    x, q = embeddings(40_000), embeddings(30, seed=1)
    whole, pieces = TurboQuantIndex(DIM, center=False), TurboQuantIndex(DIM, center=False)
    whole.add(x)
    for piece in x.split(7_000):
        pieces.add(piece)
    assert len(whole) == len(pieces) == 40_000
    assert torch.equal(whole.search(q)[1], pieces.search(q)[1])


def test_bytes_are_those_of_the_codes() -> None:
    index = TurboQuantIndex(DIM, 4)
    index.add(embeddings(1000))
    # codes, a scale and the product with the mean each, and the mean
    assert index.nbytes == 1000 * (DIM // 2 + 2 + 4) + 4 * DIM


def test_what_was_saved_answers_the_same(tmp_path: Path) -> None:
    index = TurboQuantIndex(DIM, 3, "l2", seed=5)
    index.add(embeddings(2000))
    q = embeddings(7, seed=1)
    index.save(tmp_path / "vectors.tq")
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.tq"]
    again = TurboQuantIndex.load(tmp_path / "vectors.tq")
    for one, other in zip(index.search(q), again.search(q), strict=True):
        assert torch.equal(one, other)
    assert again.add(embeddings(3, seed=2)) == range(2000, 2003)


def test_wrong_input_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown metric 'dot'; use one of cosine, ip, l2"):
        TurboQuantIndex(DIM, metric="dot")
    index = TurboQuantIndex(DIM)
    with pytest.raises(StateError, match="holds no vectors"):
        index.search(embeddings(1))
    with pytest.raises(ShapeError, match=r"vectors must be \[n, 96\] floating point, got \[96\]"):
        index.add(embeddings(1)[0])
    broken = embeddings(5)
    broken[3, 2] = float("nan")
    with pytest.raises(ShapeError, match="vectors must be finite; row 3 is not"):
        index.add(broken)
    assert len(index) == index.nbytes == 0
    assert index.add(embeddings(0)) == range(0)
    index.add(embeddings(4))
    with pytest.raises(OptionError, match="k must be 1 to 4, the number of vectors; got 10"):
        index.search(embeddings(1))
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(OptionError, match="is no TurboQuantIndex"):
        TurboQuantIndex.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        TurboQuantIndex.load(tmp_path / "none")
