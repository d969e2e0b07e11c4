"""ZeRO stage 3 for codes: a rank keeps its rows, and the packed codes of a matrix are gathered just before they are used.

What travels are packed codes, 2 bits a ternary weight. While a matrix computes, the next one's rows are already on their way:
the order of uses repeats (forward through the layers, backward through them in reverse), so the one that followed the last
time the same two matrices came in a row is fetched ahead. A wrong guess costs its traffic, never a wrong result; all ranks run
the same program, guess alike and so call the same collectives.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import PendingGather, row_bounds, start_gather


class CodeGatherer:
    """Leaves each of `weights` with the rows this rank owns and lends it the others when they are asked for."""

    def __init__(self, weights: list[LowBitMatrix], group: Group) -> None:
        self.weights, self.group = weights, group
        self._successor: dict[tuple[int, int], int] = {}
        self._last, self._before = -1, -1
        self._codes: Tensor | None = None
        """Of the matrix used last: its forward in the last layer is followed by its backward."""
        self._ahead: tuple[int, PendingGather] | None = None
        for index, weight in enumerate(weights):
            start, stop = row_bounds(weight.rows, group.size())[group.rank()]
            weight.keep_rows(start, stop, partial(self._lend, index))

    def forget(self, index: int | None = None) -> None:
        """Drops what was gathered of matrix `index`, or of all, also what is under way: to be called before codes change."""
        if self._ahead is not None and index in (None, self._ahead[0]):
            self._ahead[1].finish()
            self._ahead = None
        if index in (None, self._last):
            self._codes = None
        if index is None:
            self._last, self._before = -1, -1

    def _lend(self, index: int) -> Tensor:
        """Packed codes of all rows of matrix `index`; good until another one is asked for."""
        self._successor[self._before, self._last] = index
        self._before, self._last, previous = self._last, index, self._last
        if previous != index or self._codes is None:
            self._codes = self._take(index)
        following = self._successor.get((self._before, index))
        if following is not None and following != index and self._ahead is None:
            self._ahead = (following, self._start(following))
        return self._codes

    def _take(self, index: int) -> Tensor:
        if self._ahead is None:
            return self._start(index).finish()
        (ahead, pending), self._ahead = self._ahead, None
        gathered = pending.finish()
        return gathered if ahead == index else self._start(index).finish()

    def _start(self, index: int) -> PendingGather:
        weight = self.weights[index]
        return start_gather(weight.codes, weight.rows, self.group, "codes")
