"""Which windows a step trains on: a pure function of (seed, step), nothing to save or skip.

An epoch's order is a keyed Feistel permutation of 0 .. num_windows - 1 (a block cipher on a small
domain, made to fit by cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
2002), so any place in it is computed alone, in O(1).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


def batch_indices(
    *, seed: int, step: int, batch_windows: int, num_windows: int
) -> NDArray[np.int64]:
    """Window indices of one step, int64 [batch_windows].

    Step after step walks through all windows in an order shuffled anew for each epoch: every
    window comes exactly once an epoch. An epoch may end within a batch.

    Args:
        seed: any integer; another seed gives another order.
        step: number of the step, from 0.
        batch_windows: windows in one step.
        num_windows: windows in the corpus.
    """
    return walk(batch_places(step, batch_windows), seed=seed, num_windows=num_windows)


def batch_places(step: int, batch_windows: int) -> NDArray[np.int64]:
    """The places of a step's windows, counted over all steps, int64 [batch_windows]."""
    if step < 0 or batch_windows < 1:
        raise ValueError(f"no batch: {step=}, {batch_windows=}")
    return step * batch_windows + np.arange(batch_windows, dtype=np.int64)


def walk(places: NDArray[np.int64], *, seed: int, num_windows: int) -> NDArray[np.int64]:
    """The windows at these places of the endless walk through them, int64 [num_places]."""
    if num_windows < 1:
        raise ValueError(f"no batch: {num_windows=}")
    epochs, places_in_epoch = np.divmod(places, num_windows)
    indices = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        keys = _round_keys(seed, int(epoch))
        indices[here] = _permute(places_in_epoch[here], num_windows, keys)
    return indices


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"batches {seed} {epoch}".encode(), digest_size=8 * ROUNDS)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def _permute(places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Image of each place under the permutation of 0 .. size - 1 that the keys stand for."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    # The cipher permutes 0 .. 4**half_bits - 1, fewer than 4 * size for a size above 1. Walking on
    # from a value outside comes back inside, and never to a value another place has reached.
    while outside.any():
        values[outside] = _encipher(values[outside], half_bits, keys)
        outside = values >= size
    return values.astype(np.int64)


def _encipher(
    values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every input bit over all 64 (the finaliser of splitmix64); wraps around by intent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
