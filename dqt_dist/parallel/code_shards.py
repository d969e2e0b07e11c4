"""ZeRO stage 3 for codes: a rank keeps its rows, and the packed codes of a matrix are gathered just before they are used.

Packed codes travel, 2 bits per ternary weight. While one matrix computes, the rows of the next one are already on their way. The order of
uses repeats: forward through the layers, backward through them in reverse. The matrix fetched ahead is the one that followed when the
same two matrices were last used one after the other. A wrong guess costs its traffic, never a wrong result. All ranks run the same
program, so they guess alike and call the same collectives.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import PendingGather, row_bounds, start_gather


class CodeGatherer:
    """Leaves each of `weights` with the rows this rank owns, and gathers all rows when a product asks for them."""

    def __init__(self, weights: list[LowBitMatrix], group: Group) -> None:
        self.weights, self.group = weights, group
        self._successor: dict[tuple[int, int], int] = {}
        self._last_used, self._used_before = -1, -1
        self._codes: Tensor | None = None
        """Of the matrix that was used last. In the last layer its backward follows its forward at once."""
        self._prefetched: tuple[int, PendingGather] | None = None
        for index, weight in enumerate(weights):
            start, stop = row_bounds(weight.rows, group.size())[group.rank()]
            weight.keep_rows(start, stop, partial(self._all_rows, index))

    def forget(self, index: int | None = None) -> None:
        """Drops what was gathered of matrix `index`, or of all matrices, also what is under way. Called before codes change."""
        if self._prefetched is not None and index in (None, self._prefetched[0]):
            self._prefetched[1].finish()
            self._prefetched = None
        if index in (None, self._last_used):
            self._codes = None
        if index is None:
            self._last_used, self._used_before = -1, -1

    def _all_rows(self, index: int) -> Tensor:
        """Packed codes of all rows of matrix `index`; valid until another matrix is asked for."""
        self._successor[self._used_before, self._last_used] = index
        self._used_before, self._last_used, previous = self._last_used, index, self._last_used
        if previous != index or self._codes is None:
            self._codes = self._gathered(index)
        following = self._successor.get((self._used_before, index))
        if following is not None and following != index and self._prefetched is None:
            self._prefetched = (following, self._start(following))
        return self._codes

    def _gathered(self, index: int) -> Tensor:
        if self._prefetched is None:
            return self._start(index).finish()
        (prefetched, pending), self._prefetched = self._prefetched, None
        gathered = pending.finish()
        return gathered if prefetched == index else self._start(index).finish()

    def _start(self, index: int) -> PendingGather:
        weight = self.weights[index]
        return start_gather(weight.codes, weight.rows, self.group, "codes")
