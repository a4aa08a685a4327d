import numpy as np
import pytest

from capgap.corpus.text import batch_indices

SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 63, 64, 65, 100, 127, 256, 257, 1000, 1021, 4096, 10007]


def epoch_order(size: int, *, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return batch_indices(seed=seed, step=epoch, batch_windows=size, num_windows=size)


@pytest.mark.parametrize("size", SIZES)
def test_every_window_comes_once_an_epoch(size: int) -> None:
    for epoch in range(3):
        order = epoch_order(size, seed=5, epoch=epoch)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_batches_that_cross_epochs_still_give_every_window_once_an_epoch() -> None:
    size, batch = 37, 10
    steps = [
        batch_indices(seed=1, step=step, batch_windows=batch, num_windows=size)
        for step in range(size)
    ]
    epochs = np.concatenate(steps).reshape(batch, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_a_batch_may_hold_several_epochs() -> None:
    batch = batch_indices(seed=1, step=0, batch_windows=10, num_windows=3)
    for epoch in batch[:9].reshape(3, 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(3))


def test_steps_may_be_asked_in_any_order_and_batch_size_does_not_change_the_order() -> None:
    def at(step: int, batch: int) -> np.ndarray:
        return batch_indices(seed=3, step=step, batch_windows=batch, num_windows=1000)

    backwards = [at(step, 8) for step in reversed(range(50))][::-1]
    np.testing.assert_array_equal(np.concatenate(backwards), at(0, 400))
    np.testing.assert_array_equal(at(13, 8), at(13, 8))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [epoch_order(500, seed=s, epoch=e) for s in (0, 1, -1, 2**40) for e in range(3)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders agree in one place on average (a Poisson variable).
            assert (one == other).sum() < 10


@pytest.mark.parametrize("size", [200, 1021, 4096, 50000])
def test_order_looks_shuffled(size: int) -> None:
    for seed in range(5):
        order = epoch_order(size, seed=seed)
        correlation = np.corrcoef(np.arange(size), order)[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)
        serial = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(serial) < 5 / np.sqrt(size)
        # In a random order about two pairs of neighbours lie side by side.
        assert (np.abs(np.diff(order)) == 1).sum() < 15
        fixed = (order == np.arange(size)).sum()
        assert fixed < 10


def test_small_orders_are_all_reached() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        order = tuple(epoch_order(4, seed=seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) >= 12
    first = np.array([epoch_order(4, seed=seed)[0] for seed in range(600)])
    assert np.abs(np.bincount(first, minlength=4) / 600 - 0.25).max() < 0.1


def test_work_does_not_grow_with_the_corpus() -> None:
    # A list of the windows would take 8 EB here.
    batch = batch_indices(seed=0, step=10**12, batch_windows=4096, num_windows=10**18)
    assert len(set(batch.tolist())) == 4096
    assert 0 <= batch.min() <= batch.max() < 10**18
    assert batch.std() / 10**18 == pytest.approx(1 / np.sqrt(12), rel=0.05)


@pytest.mark.parametrize("wrong", [{"step": -1}, {"batch_windows": 0}, {"num_windows": 0}])
def test_impossible_batches_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="no batch"):
        batch_indices(**({"seed": 0, "step": 0, "batch_windows": 1, "num_windows": 1} | wrong))


def test_order_is_the_same_on_every_machine_and_version() -> None:
    # A changed order would make a resumed run differ from an uninterrupted one.
    batch = batch_indices(seed=7, step=2, batch_windows=6, num_windows=1000)
    assert batch.tolist() == [596, 455, 334, 692, 95, 305]
