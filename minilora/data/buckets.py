"""Batches of examples of about one length, so that little is padding, in an order that is random but repeatable.

Sorting everything would show the model all short texts first; not sorting pads each to the longest of its batch. Between
them: shuffle, cut into pools of many batches, sort inside each pool, cut into batches, and shuffle the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POOL = 50                                                  # batches in a pool


class Buckets:
    """Batch number i -> the indices of its examples; each example comes once in an epoch.

    lengths (n,): the tokens of each example. rows: examples in a batch; or tokens: at most so many in a batch, padding
    counted (an example that alone is longer has a batch of its own). Everything follows from the seed and i, so a run that
    goes on in the middle gets the batches it would have got.

    Raises ValueError without examples, unless one of rows and tokens is given, or if it is below 1.
    """

    def __init__(self, lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None, seed: int = 0) -> None:
        if not len(lengths):
            raise ValueError("got no examples, expected at least one")
        if (rows is None) == (tokens is None) or (rows or tokens or 0) < 1:
            raise ValueError(f"rows = {rows}, tokens = {tokens}: expected one of them, of at least 1: how large is a batch?")
        self.lengths, self.rows, self.tokens, self.seed = np.asarray(lengths), rows, tokens, seed
        self.starts = [0]                                  # the number of the first batch of each epoch, as far as is known
        self._last: tuple[int, list[np.ndarray]] = (-1, [])

    def __call__(self, i: int) -> np.ndarray:              # -> (rows,)
        """The indices of batch i, counted from 0 through all epochs."""
        while self.starts[-1] <= i:
            self.starts.append(self.starts[-1] + len(self.epoch(len(self.starts) - 1)))
        e = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.epoch(e)[i - self.starts[e]]

    def epoch(self, e: int) -> list[np.ndarray]:
        """The batches of epoch e."""
        if self._last[0] != e:
            rng = np.random.default_rng([self.seed, e])
            order = rng.permutation(len(self.lengths))
            pool = POOL * self.rows if self.rows else max(1, POOL * int(self.tokens or 1) // max(1, int(self.lengths.mean())))
            found = []
            for start in range(0, len(order), pool):
                members = order[start : start + pool]
                found += self.cut(members[np.argsort(self.lengths[members], kind="stable")])
            self._last = e, [found[j] for j in rng.permutation(len(found))]
        return self._last[1]

    def cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Indices, sorted by length, cut into batches."""
        if self.rows:
            return [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        batches, start = [], 0
        for stop in range(1, len(order) + 1):              # the longest of a batch is its last
            if stop == len(order) or (stop + 1 - start) * self.lengths[order[stop]] > int(self.tokens or 1):
                batches.append(order[start:stop])
                start = stop
        return batches

    def sorted(self) -> list[np.ndarray]:
        """All examples in batches by length, for evaluation."""
        return self.cut(np.argsort(self.lengths, kind="stable"))

    def steps(self, epochs: float) -> int:
        """The number of batches in so many epochs, at least 1."""
        whole = int(epochs)
        count = sum(len(self.epoch(e)) for e in range(whole))
        part = epochs - whole
        return max(1, count + (round(part * len(self.epoch(whole))) if part else 0))

    def waste(self, e: int = 0) -> float:
        """The share of padding in an epoch."""
        padded = sum(len(batch) * int(self.lengths[batch].max()) for batch in self.epoch(e))
        return 1.0 - int(self.lengths.sum()) / padded


def split(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, held out) of n examples: a share of them, drawn by the seed, is held out. Both in ascending order.

    Raises ValueError for a share that is not between 0 and 1, or leaves one side empty.
    """
    held = round(n * share) if 0.0 < share < 1.0 else 0
    if not 0 < held < n:
        raise ValueError(f"got a held-out share of {share} of {n} examples, expected a share between 0 and 1 that leaves some "
                         "on both sides: give more data, or a file of its own (--eval)")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])
