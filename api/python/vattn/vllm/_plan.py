"""What a step is made of: prompts that are attended exactly, and requests that decode."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ._requests import RequestRows

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class Prompt:
    """A chunk of one request's prompt."""

    begin: int  # its query tokens among those of the step
    end: int
    length: int  # the request's tokens, with these
    blocks: torch.Tensor  # [entries] int32


@dataclass
class Plan:
    """A step of vLLM's, for all layers of a group."""

    num_tokens: int
    prompts: list[Prompt] = field(default_factory=list)
    # Decoding requests, as Paged.begin_step takes them; none where block_table is None.
    block_table: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    query_starts: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    resets: torch.Tensor | None = None
    queries: int = 0  # query tokens of them
    most_queries: int = 0  # of one of them
    # Which tokens these are; None: the first ones.
    tokens: torch.Tensor | None = None


class Planner:
    """Makes a plan of each step's metadata."""

    def __init__(
        self, *, max_requests: int, max_query_tokens: int, block_tokens: int, device: torch.device
    ) -> None:
        self._most = max_query_tokens
        self._device = device
        self._rows = RequestRows(max_requests, block_tokens)
        # Read when a captured graph is replayed, therefore always in the same place.
        self._row_buffer = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._reset_buffer = torch.zeros(max_requests, dtype=torch.int32, device=device)

    def plan(self, m: "CommonAttentionMetadata") -> Plan:
        """The plan of a step."""
        count = m.num_reqs
        starts = m.query_start_loc_cpu[: count + 1].numpy()
        # On the host these are upper bounds, exact for prompts and on the CPU.
        bounds = m.seq_lens if m.seq_lens_cpu_upper_bound is None else m.seq_lens_cpu_upper_bound
        lengths, queries = bounds[:count].numpy(), np.diff(starts)
        active = queries > 0
        early = np.zeros(count, bool) if m.is_prefilling is None else m.is_prefilling[:count].numpy()
        prompts = active & ((queries > self._most) | early)
        if self._device.type != "cpu" and (queries[active] == m.max_query_len).all():
            # vLLM may run this step as a captured graph, which answers all requests in one way.
            prompts &= queries > self._most
        decodes = active & ~prompts
        plan = Plan(m.num_actual_tokens)
        for i in np.flatnonzero(prompts):
            begin, end = int(starts[i]), int(starts[i + 1])
            plan.prompts.append(Prompt(begin, end, int(lengths[i]), m.block_table_tensor[i]))
        if decodes.any():
            self._fill(plan, m, decodes, starts, lengths, queries, early | prompts)
        elif m.req_idx is not None:
            known = min(count, len(m.req_idx))  # not of padding
            self._rows.named(m.req_idx[:known], (early | prompts)[:known])
        return plan

    def _fill(
        self,
        plan: Plan,
        m: "CommonAttentionMetadata",
        decodes: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        queries: np.ndarray,
        early: np.ndarray,
    ) -> None:
        count = m.num_reqs
        chosen = np.flatnonzero(decodes)
        used = len(chosen)
        plan.most_queries = int(queries[chosen].max())
        # Those that decode come first, with padding behind them, or they are picked out.
        leading = bool((chosen == np.arange(used)).all())
        whole = leading and not plan.prompts
        pick = slice(0, count if whole else used) if leading else torch.from_numpy(chosen)
        if not leading:
            pick = pick.to(self._device)
        plan.block_table = m.block_table_tensor[pick]
        plan.lengths = m.seq_lens[:count][pick].to(torch.int32)
        if leading:
            plan.query_starts = m.query_start_loc[: (count if whole else used) + 1]
            plan.queries = m.num_actual_tokens if whole else int(starts[used])
        else:
            sizes = queries[chosen]
            ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            plan.queries = int(ends[-1])
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
            plan.query_starts = torch.from_numpy(ends).to(self._device)
            plan.tokens = torch.from_numpy(places.astype(np.int64)).to(self._device)
        plan.query_starts = plan.query_starts.to(torch.int32)
        if m.req_idx is None:
            table = m.block_table_tensor.cpu().numpy()[chosen]
            rows, resets = self._rows.find(table, lengths[chosen], queries[chosen])
        else:
            known = min(count, len(m.req_idx))
            rows, resets = self._rows.named(m.req_idx[:known], early[:known])
            rows, resets = rows[chosen], resets[chosen]
        size = plan.block_table.shape[0]
        plan.rows, plan.resets = self._row_buffer[:size], self._reset_buffer[:size]
        plan.rows[:used].copy_(torch.from_numpy(rows), non_blocking=True)
        plan.resets[:used].copy_(torch.from_numpy(resets), non_blocking=True)
