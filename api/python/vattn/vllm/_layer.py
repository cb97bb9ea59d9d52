"""Attention of one layer over a pool: the part of vLLM's AttentionImpl that is ours on every device."""

import torch

from ._calls import LayerCalls
from ._plan import Plan
from ._pool import Pool


class ServedLayer:
    """A layer of a pool; `bind` gives it its place there when vLLM has made its pages."""

    pool: Pool | None = None
    index = 0

    def bind(self, pool: Pool, index: int) -> None:
        """Makes this the pool's layer that has number `index` in the model."""
        self.pool, self.index = pool, index
        self._calls = LayerCalls(pool.paged, index)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes new rows, key and value [tokens, kv_heads, dim], to slots [tokens] int64."""
        if self.pool is None:
            return  # vLLM measures how much memory a step takes, before there are pages
        count = slots.shape[0]
        self._calls.write(slots, key[:count], value[:count])

    def attend(self, query: torch.Tensor, output: torch.Tensor, plan: Plan) -> None:
        """Answers query [tokens, q_heads, dim] in output [tokens, q_heads, dim_v]."""
        assert self.pool is not None
        if plan.block_table is not None:
            self._step(self.pool, query, output, plan)
        for prompt in plan.prompts:
            part = slice(prompt.begin, prompt.end)
            self.pool.paged.prefill(
                self.index, query[part], prompt.blocks, prompt.length, out=output[part]
            )
        if self.index == self.pool.first_layer:
            self.pool.step_tokens += plan.queries
            self.pool.prompt_tokens += sum(one.end - one.begin for one in plan.prompts)

    def _step(self, pool: Pool, query: torch.Tensor, output: torch.Tensor, plan: Plan) -> None:
        if self.index == pool.first_layer:
            pool.paged.begin_step(
                plan.block_table,
                plan.lengths,
                plan.query_starts,
                plan.rows,
                plan.resets,
                max_query_tokens=plan.most_queries,
                num_query_tokens=plan.queries,
            )
        if plan.tokens is None:
            part = query[: plan.queries].contiguous()
            self._calls.attend(part, output[: plan.queries], plan.most_queries)
        else:
            part = query[plan.tokens]
            answers = torch.empty((len(part), *output.shape[1:]), dtype=output.dtype, device=output.device)
            self._calls.attend(part, answers, plan.most_queries)
            output[plan.tokens] = answers
