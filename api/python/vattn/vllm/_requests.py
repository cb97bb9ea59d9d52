"""Which row of controller state a request has, from what vLLM tells about a step."""

from collections import OrderedDict

import numpy as np


class RequestRows:
    """Gives a request the same row in all steps, and says which step is its first in it.

    vLLM's older runner names no requests, and moves them within its batch. It is known by the block
    that its last tokens were written to: no other request writes there. Where a block changes hands
    unseen, a request begins with the controller state of another, which costs some rows and no promise.
    """

    def __init__(self, max_requests: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        # row -> (first, length): the tokens that its last step had, and the blocks they were in.
        self._rows: OrderedDict[int, tuple[int, int, tuple[int, ...]]] = OrderedDict(
            (row, (0, 0, ())) for row in range(max_requests)
        )
        self._by_block: dict[int, int] = {}
        self._fresh = np.ones(max_requests, bool)

    def find(
        self, table: np.ndarray, lengths: np.ndarray, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, resets), both [requests] int32, of requests with query tokens.

        table [requests, entries] block ids, lengths [requests] with the query tokens, queries
        [requests] how many these are.
        """
        count = len(lengths)
        rows, resets = np.full(count, -1, np.int32), np.zeros(count, np.int32)
        first = lengths - queries
        for i in range(count):
            row = self._of(int(table[i, max(first[i] - 1, 0) // self._block_tokens]), int(first[i]))
            if row is not None and row not in rows[:i]:
                rows[i] = row
        for row in rows[rows >= 0]:
            self._rows.move_to_end(int(row))
        for i in np.flatnonzero(rows < 0):
            rows[i] = next(iter(self._rows))  # the one longest without a step
            self._rows.move_to_end(int(rows[i]))
            resets[i] = 1
        for i in range(count):
            begin, end = int(first[i]) // self._block_tokens, int(lengths[i] - 1) // self._block_tokens
            blocks = tuple(int(block) for block in table[i, begin : end + 1])
            self._forget(int(rows[i]))
            self._rows[int(rows[i])] = (int(first[i]), int(lengths[i]), blocks)
            self._by_block |= dict.fromkeys(blocks, int(rows[i]))
        return rows, resets

    def named(self, rows: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `find`, where vLLM names requests by rows: prompts [requests] are those still in theirs."""
        rows = rows.astype(np.int32)
        self._fresh[rows[prompts]] = True
        resets = self._fresh[rows].astype(np.int32)
        self._fresh[rows[~prompts]] = False
        return rows, resets

    def _of(self, block: int, computed: int) -> int | None:
        """The row whose last step ended with `computed` tokens, or with drafts after them."""
        row = self._by_block.get(block)
        if row is None:
            return None
        first, length, _ = self._rows[row]
        return row if first < computed <= length else None

    def _forget(self, row: int) -> None:
        for block in self._rows[row][2]:
            if self._by_block.get(block) == row:
                del self._by_block[block]
