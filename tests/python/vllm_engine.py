"""vLLM's side of the plug-in without vLLM: blocks, batches and metadata as its runners make them.

Requests share prefix blocks, are computed in chunks, speculate, are preempted, and end; blocks are used
again. The rows of every token are functions of the text before it, so that shared blocks hold what both
requests would have computed, and exact attention is known for each query.
"""

import functools
import os
import types
import zlib

import numpy as np
import torch
from vattn.vllm._layer import ServedLayer
from vattn.vllm._options import Options
from vattn.vllm._pages import Page
from vattn.vllm._plan import Planner
from vattn.vllm._pool import Pool

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 64
BLOCK = 32
ENTRIES = 80
DEVICE = torch.device("cuda:0" if os.environ.get("VATTN_BACKEND") == "cuda" else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@functools.cache
def row(digest, heads, layer, what):
    """A token's row [heads, DIM]. Values have a mean, so that attention does not cancel."""
    rng = np.random.default_rng([digest, layer, ord(what)])
    return rng.standard_normal((heads, DIM), np.float32) + np.float32(what == "v")


def normal(text, tokens, heads, layer, what):
    """[tokens, heads, DIM] for the last `tokens` of a text: each row by the text up to its token."""
    digest = zlib.crc32(text[: len(text) - tokens])
    out = []
    for place in range(len(text) - tokens, len(text)):
        digest = zlib.crc32(text[place : place + 1], digest)
        out.append(row(digest, heads, layer, what))
    return torch.from_numpy(np.stack(out)).to(DTYPE)


def exact(q, k, v):
    """float64 attention of q [q_heads, DIM] over k, v [tokens, kv_heads, DIM]."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    group = len(q) // k.shape[1]
    out = np.empty((len(q), v.shape[2]))
    for head in range(len(q)):
        scores = k[:, head // group] @ q[head] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[:, head // group] / weights.sum()
    return out


class Request:
    """A text, and how much of it has been computed into which blocks."""

    def __init__(self, name, text, prompt):
        self.name, self.text, self.prompt = name, bytes(text), prompt
        self.computed = 0
        self.blocks = []
        self.row = -1  # of the newer runner's table


class Engine:
    """A pool with layers, and vLLM's bookkeeping around it."""

    def __init__(
        self,
        blocks,
        *,
        rows="auto",
        max_requests=8,
        max_queries=4,
        named=False,
        heads=(0, KV_HEADS),
        tables=None,
        **runtime,
    ):
        """named: as the newer runner, which tells a request's row. heads: KV heads of this rank."""
        self.named, self.max_queries = named, max_queries
        self.kv = slice(*heads)
        group = Q_HEADS // KV_HEADS
        self.q = slice(heads[0] * group, heads[1] * group)
        count = heads[1] - heads[0]
        options = Options(rows=rows, runtime=runtime)
        page = Page.of(
            options,
            heads=count,
            tokens=BLOCK,
            head_dim_k=DIM,
            head_dim_v=DIM,
            dtype=DTYPE,
            on_cpu=DEVICE.type == "cpu",
        )
        width = page.state_bytes // DTYPE.itemsize
        self.pages = torch.full((LAYERS, blocks, count, BLOCK, width), 7, dtype=DTYPE, device=DEVICE)
        self.pool = Pool(
            page,
            list(self.pages),
            options,
            layers=list(range(LAYERS)),
            num_layers=LAYERS,
            first_kv_head=heads[0],
            num_q_heads=count * group,
            scale=DIM**-0.5,
            max_tokens=ENTRIES * BLOCK,
            max_requests=max_requests,
            max_query_tokens=max_queries,
            tables=tables,
            model=None,
        )
        self.layers = [ServedLayer() for _ in range(LAYERS)]
        for index, layer in enumerate(self.layers):
            layer.bind(self.pool, index)
        self.planner = Planner(
            max_requests=max_requests,
            max_query_tokens=max_queries,
            block_tokens=BLOCK,
            device=DEVICE,
        )
        self.free = list(range(1, blocks))  # vLLM keeps block 0 for padding
        self.uses = np.zeros(blocks, int)
        self.cached = {}  # text of full blocks -> block
        self.rows = list(range(max_requests))

    def admit(self, request):
        """Gives it the blocks of the longest prefix that others have computed, as vLLM does."""
        while (len(request.blocks) + 1) * BLOCK < len(request.text):
            block = self.cached.get(request.text[: (len(request.blocks) + 1) * BLOCK])
            if block is None:
                break
            request.blocks.append(block)
            self.uses[block] += 1
            if block in self.free:
                self.free.remove(block)
        request.computed = len(request.blocks) * BLOCK
        request.row = self.rows.pop(0)

    def release(self, request):
        """Preempts or ends it; full blocks may still be found by their text until they are taken."""
        for block in request.blocks:
            self.uses[block] -= 1
            if self.uses[block] == 0:
                self.free.append(block)
        self.rows.append(request.row)
        request.blocks, request.computed, request.row = [], 0, -1

    def _grow(self, request, end):
        while len(request.blocks) * BLOCK < end:
            block = self.free.pop(0)
            self.cached = {text: one for text, one in self.cached.items() if one != block}
            self.uses[block] = 1
            request.blocks.append(block)

    def metadata(self, work):
        """(metadata as vLLM's builder is given it, slots, [(k, v, q) of each layer]) of a step."""
        count = len(work)
        table = np.zeros((count, ENTRIES), np.int32)
        starts = np.cumsum([0, *(tokens for _, tokens in work)], dtype=np.int32)
        slots, lengths, prompts = [], [], []
        for i, (request, tokens) in enumerate(work):
            end = request.computed + tokens
            self._grow(request, end)
            table[i, : len(request.blocks)] = request.blocks
            places = np.arange(request.computed, end)
            slots.append(np.asarray(request.blocks, np.int64)[places // BLOCK] * BLOCK + places % BLOCK)
            lengths.append(end)
            prompts.append(request.computed < request.prompt)
        bounds = torch.tensor(lengths, dtype=torch.int32)
        told = types.SimpleNamespace(
            num_reqs=count,
            num_actual_tokens=int(starts[-1]),
            query_start_loc=torch.from_numpy(starts).to(DEVICE),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=bounds.to(DEVICE),
            seq_lens_cpu_upper_bound=bounds,
            max_query_len=int(np.diff(starts).max()),
            block_table_tensor=torch.from_numpy(table).to(DEVICE),
            is_prefilling=torch.tensor(prompts),
            req_idx=np.array([r.row for r, _ in work]) if self.named else None,
        )
        rows = []
        for layer in range(LAYERS):
            new = [self._rows(r, end, tokens, layer) for (r, tokens), end in zip(work, lengths)]
            rows.append([torch.cat([part[i] for part in new]).to(DEVICE) for i in range(3)])
        return told, torch.from_numpy(np.concatenate(slots)).to(DEVICE), rows

    def compute(self, plan, slots, rows):
        """What vLLM calls in a step; the answers of each layer."""
        answers = []
        for one, (k, v, q) in zip(self.layers, rows):
            one.write(k, v, slots)
            answers.append(torch.full(q.shape, float("nan"), dtype=DTYPE, device=DEVICE))
            one.attend(q, answers[-1], plan)
        return answers

    def step(self, work):
        """Computes [(request, query tokens)]: {name: error of its worst answer, relative}.

        The text must have these tokens already; drafts that are not accepted are cut off by the caller,
        who also lowers `computed`.
        """
        told, slots, rows = self.metadata(work)
        self.plan = self.planner.plan(told)
        self.answers = [one.cpu() for one in self.compute(self.plan, slots, rows)]
        return self.finish(work, told, self.answers)

    def finish(self, work, told, answers):
        """Compares a step's answers with exact ones, and counts its tokens as computed."""
        errors = {}
        for i, (request, tokens) in enumerate(work):
            end, start = int(told.seq_lens_cpu_upper_bound[i]), int(told.query_start_loc_cpu[i])
            errors[request.name] = self._worst(request, tokens, end, start, answers)
            request.computed = end
            for full in range(1, request.computed // BLOCK + 1):
                self.cached.setdefault(request.text[: full * BLOCK], request.blocks[full - 1])
        return errors

    def _rows(self, request, end, tokens, layer):
        text = request.text[:end]
        return (
            normal(text, tokens, KV_HEADS, layer, "k")[:, self.kv],
            normal(text, tokens, KV_HEADS, layer, "v")[:, self.kv],
            3 * normal(text, tokens, Q_HEADS, layer, "q")[:, self.q],
        )

    def _worst(self, request, tokens, end, start, answers):
        worst = 0.0
        for layer in range(LAYERS):
            k, v = (normal(request.text[:end], end, KV_HEADS, layer, what)[:, self.kv] for what in "kv")
            q = 3 * normal(request.text[:end], tokens, Q_HEADS, layer, "q")[:, self.q]
            for i in sorted({0, tokens // 2, tokens - 1}):
                seen = end - tokens + i + 1
                want = exact(q[i], k[:seen], v[:seen])
                got = answers[layer][start + i].double().numpy()
                lengths = np.linalg.norm(want, axis=1)
                error = np.linalg.norm(got - want, axis=1) / lengths
                worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
        return worst
