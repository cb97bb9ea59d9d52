"""What the rows of a cache have been given: ids, and which of them were padding."""

import torch


class History:
    """Columns [rows, tokens] as transformers counts them, padding included, on the device of the
    tokens. An id of -1 stands for a token that came as an embedding: it agrees with every id."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = 0
        self.padded = False  # does any column hold padding
        self._ids = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self._real = torch.empty(rows, 0, dtype=torch.bool, device=device)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._ids.shape[0]

    @property
    def ids(self) -> torch.Tensor:
        """[rows, tokens] int64."""
        return self._ids[:, : self.tokens]

    @property
    def real(self) -> torch.Tensor:
        """[rows, tokens] bool: False for padding."""
        return self._real[:, : self.tokens]

    def add(self, ids: torch.Tensor | None, real: torch.Tensor | None, tokens: int) -> None:
        """Columns for new tokens: ids and real [rows, tokens]; None: embeddings, no padding."""
        end = self.tokens + tokens
        if end > self._ids.shape[1]:
            more = max(end, 2 * self.tokens, 64) - self._ids.shape[1]
            self._ids = torch.nn.functional.pad(self._ids, (0, more), value=-1)
            self._real = torch.nn.functional.pad(self._real, (0, more), value=True)
        self._ids[:, self.tokens : end] = -1 if ids is None else ids
        self._real[:, self.tokens : end] = True if real is None else real
        self.padded |= real is not None
        self.tokens = end

    def cut(self, tokens: int) -> None:
        """Keeps the first columns."""
        self.tokens = min(self.tokens, tokens)

    def select(self, rows: list[int]) -> None:
        """The rows become these of the present ones."""
        chosen = torch.tensor(rows, dtype=torch.int64, device=self._ids.device)
        self._ids, self._real = self._ids[chosen], self._real[chosen]

    def copy(self) -> "History":
        """Another with the same columns."""
        other = History(self.rows, self._ids.device)
        other.add(self.ids, self.real, self.tokens)
        other.padded = self.padded
        return other

    def lengths(self, tokens: int) -> list[int]:
        """Tokens that are no padding among the first columns, by row."""
        if not self.padded:
            return [tokens] * self.rows
        counts: list[int] = self._real[:, :tokens].sum(1).tolist()
        return counts

    def agree(self, ids: torch.Tensor, mask: torch.Tensor | None) -> int:
        """How many first columns are those of ids and mask [rows, any number of tokens]."""
        tokens = min(self.tokens, ids.shape[1])
        ids, real, mine = ids[:, :tokens].to(self._ids.device), self._real[:, :tokens], self._ids
        given = torch.ones_like(real) if mask is None else mask[:, :tokens].to(real.device).bool()
        mine = mine[:, :tokens]
        same = (given == real) & ((mine == ids) | (mine == -1) | ~real)
        return int(same.all(0).long().cumprod(0).sum())
