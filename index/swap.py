"""Swap a newly opened index into use on all ranks at once."""

from index.search import PassageIndex
from index.watcher import IndexWatcher
from realm.runtime.distributed import all_ranks, any_rank, is_rank_zero, on_rank_zero, world_size


class IndexSlot:
    """The index in use, and the next one that the watcher has opened."""

    def __init__(self, watcher: IndexWatcher) -> None:
        self.watcher = watcher
        self.index: PassageIndex | None = None
        """The index in use; None before the first swap."""
        self.swaps = 0
        """Number of times an index was replaced by another."""
        self._next: PassageIndex | None = None

    def swap_if_ready(self) -> None:
        """Swap in the newest version that rank 0 has opened, once every rank has opened it.

        All ranks must call it together.
        """
        if self._next is None:
            self._next = self.watcher.take()
        if world_size() > 1:
            chosen = on_rank_zero(lambda: None if self._next is None else self._next.version)
            if chosen is None:
                return
            if not is_rank_zero():
                self.watcher.request(chosen)
            if any_rank(chosen.name in self.watcher.refused):
                self._close_next()
                return
            if not all_ranks(self._next is not None and self._next.version == chosen):
                if not is_rank_zero() and self._next is not None and self._next.version != chosen:
                    self._close_next()
                return
        if self._next is None:
            return
        if self.index is not None:
            self.swaps += 1
            self.index.close()
        self.index, self._next = self._next, None

    def close(self) -> None:
        """Close both indexes."""
        for index in (self.index, self._next):
            if index is not None:
                index.close()

    def _close_next(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None
