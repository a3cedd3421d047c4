"""The order of samples: exact, shuffled, the same for any number of ranks and after any restart."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from parallelism.data.batches import TokenBatches
from parallelism.data.config import DataConfig
from parallelism.data.order import permute
from parallelism.data.prepare import prepare

GOLDEN_FIRST = [509, 269, 263, 712, 407, 922, 112, 999]
GOLDEN_SECOND = [974, 906, 88, 834, 821, 102, 878, 228]


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4096, 100_003])
def test_every_number_comes_exactly_once(size: int) -> None:
    for key in [(0, 0), (0, 1), (7, 0)]:
        assert np.sort(permute(np.arange(size), size, *key)).tolist() == list(range(size))


def test_huge_orders_need_no_memory() -> None:
    size = 10**15 + 37
    indices = np.array([0, 1, 2, size - 1])
    found = permute(indices, size, 1, 2)
    assert len(set(found.tolist())) == 4
    assert found.min() >= 0
    assert found.max() < size
    # Numbers far apart: the chance of four draws within a millionth of the range is nil.
    assert np.ptp(found) > size // 10**6


def test_the_order_is_the_one_that_older_versions_used() -> None:
    """A change here would continue old checkpoints on other data."""
    assert permute(np.arange(8), 1000, 1234, 0).tolist() == GOLDEN_FIRST
    assert permute(np.arange(8), 1000, 1234, 1).tolist() == GOLDEN_SECOND


def test_every_sample_is_as_likely_at_every_place() -> None:
    # 4 places × 4 samples over 1600 keys: each count is binomial with mean 400 and deviation 17.3.
    orders = [tuple(permute(np.arange(4), 4, key, 0).tolist()) for key in range(1600)]
    counts = np.array([Counter(place).most_common() for place in zip(*orders, strict=True)])[:, :, 1]
    assert counts.shape == (4, 4)
    assert np.abs(counts - 400).max() < 5 * 17.3
    assert len(set(orders)) == 24  # every order occurs


def test_neighbours_are_unrelated() -> None:
    size = 50_000
    order = permute(np.arange(size), size, 3, 0).astype(float)
    # The correlation of n independent pairs has deviation 1/√n = 0.0045.
    for lag in (1, 2, 16, 1024):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
    other = permute(np.arange(size), size, 3, 1)
    assert (order == other).sum() < 10  # fixed points of a random permutation: one on average


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(f"{number:05d} the quick brown fox\n" for number in range(3000))
    (folder / "a.txt").write_text(lines)
    config = DataConfig(train=[str(folder / "a.txt")], documents="line", tokenizer={"kind": "bytes"})
    prepare(config, folder / "out", 1)
    return folder / "out"


def test_an_epoch_holds_every_sample_once_and_the_next_one_in_another_order(data: Path) -> None:
    batches = TokenBatches(data, "train", 64, seed=5)
    count = batches.samples_per_epoch
    first = batches.samples(range(count)).tolist()
    second = batches.samples(range(count, 2 * count)).tolist()
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second
    assert first != list(range(count))


def test_targets_continue_inputs_across_samples(data: Path) -> None:
    batches = TokenBatches(data, "train", 64, seed=5)
    rows = batches.rows(range(batches.samples_per_epoch))
    assert rows.dtype == np.int64
    by_sample = rows[np.argsort(batches.samples(range(batches.samples_per_epoch)))]
    assert (by_sample[:-1, -1] == by_sample[1:, 0]).all()
    assert 256 in rows  # documents end inside samples


def test_any_split_of_the_positions_gives_the_same_rows(data: Path) -> None:
    """Data-parallel ranks take positions step·batch + rank; a restart begins anywhere."""
    whole = TokenBatches(data, "train", 64, seed=5)
    positions = np.arange(3 * whole.samples_per_epoch - 7, 3 * whole.samples_per_epoch + 25)  # over an epoch's end
    rows = whole.rows(positions)
    for ranks in (1, 2, 4):
        fresh = TokenBatches(data, "train", 64, seed=5)
        for rank in range(ranks):
            assert (fresh.rows(positions[rank::ranks]) == rows[rank::ranks]).all()
    assert (TokenBatches(data, "train", 64, seed=6).rows(positions) != rows).any()


def test_what_is_not_there_or_too_short_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prepared data"):
        TokenBatches(tmp_path, "train", 64, seed=5)
    with pytest.raises(ValueError, match=r"data\.sequence_length: 1000000"):
        TokenBatches(data, "validation", 1_000_000, seed=5)
    with pytest.raises(AssertionError, match="begin at 0"):
        TokenBatches(data, "train", 64, seed=5).rows([-1])
