"""ZeRO stage 3 for codes: a rank keeps the rows it owns, and the codes of a matrix are gathered just before use.

The codes travel packed, with 2 bits per ternary weight. While the product of one matrix is computed, the rows of the
next matrix are already on their way (prefetch). The order of uses repeats: forward through the layers, then backward
through the layers in reverse. The prefetched matrix is the one that followed when the same two matrices were last used
one after the other. A wrong guess costs traffic and never changes a result. All ranks run the same program, so all
ranks make the same guess and call the same collectives.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dqt_dist.lowbit.matrix import LowBitMatrix
from dqt_dist.parallel.groups import Group
from dqt_dist.parallel.row_sharding import PendingGather, row_bounds, start_gather


class CodeGatherer:
    """Keeps in each of `weights` the rows that this rank owns. Gathers all rows when a product asks for the codes."""

    def __init__(self, weights: list[LowBitMatrix], group: Group) -> None:
        self.weights, self.group = weights, group
        self._successor: dict[tuple[int, int], int] = {}
        """The matrix that followed when two matrices were last used one after the other."""
        self._last_used, self._second_last_used = -1, -1
        self._codes: Tensor | None = None
        """Codes of the matrix used last. The last layer uses them twice: its backward follows its forward at once."""
        self._prefetched: tuple[int, PendingGather] | None = None
        for index, weight in enumerate(weights):
            start, stop = row_bounds(weight.rows, group.size())[group.rank()]
            weight.keep_rows(start, stop, partial(self._gather_all_rows, index))

    def invalidate(self, index: int | None = None) -> None:
        """Drops the gathered codes of matrix `index`, or of all matrices, and a gather in flight.

        Called before codes change.
        """
        if self._prefetched is not None and index in (None, self._prefetched[0]):
            self._prefetched[1].finish()
            self._prefetched = None
        if index in (None, self._last_used):
            self._codes = None
        if index is None:
            self._last_used, self._second_last_used = -1, -1

    def _gather_all_rows(self, index: int) -> Tensor:
        """Packed codes of all rows of matrix `index`. They are valid until another matrix is asked for."""
        self._successor[self._second_last_used, self._last_used] = index
        self._second_last_used, self._last_used, previous = self._last_used, index, self._last_used
        if previous != index or self._codes is None:
            self._codes = self._finish_gather(index)
        following = self._successor.get((self._second_last_used, index))
        if following is not None and following != index and self._prefetched is None:
            self._prefetched = (following, self._start(following))
        return self._codes

    def _finish_gather(self, index: int) -> Tensor:
        """Packed codes of all rows, from the prefetch where the guess was right."""
        if self._prefetched is None:
            return self._start(index).finish()
        (prefetched, pending), self._prefetched = self._prefetched, None
        gathered = pending.finish()
        return gathered if prefetched == index else self._start(index).finish()

    def _start(self, index: int) -> PendingGather:
        weight = self.weights[index]
        return start_gather(weight.codes, weight.rows, self.group, "codes")
