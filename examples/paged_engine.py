"""An inference engine that keeps its KV in blocks of its own and attends through vattn.

    python examples/paged_engine.py

Two requests that begin alike share the blocks of their common prefix. Prompts are computed in
chunks, exactly; then both decode together, a token a step, with verified answers. The model is a
toy of random weights: what matters here is who owns which array.
"""

import pathlib
import tempfile

import numpy as np
import vattn

LAYERS, Q_HEADS, KV_HEADS, DIM, WIDTH, VOCABULARY = 2, 8, 2, 64, 512, 1000
BLOCKS, BLOCK, MAX_TOKENS, CHUNK = 400, 16, 3200, 512
PREFIX, STEPS = 2000, 8
MODEL = "toy, seed 1"

rng = np.random.default_rng(1)
embedding = rng.standard_normal((VOCABULARY, WIDTH), np.float32)
unembedding = rng.standard_normal((WIDTH, VOCABULARY), np.float32)
project = {
    name: rng.standard_normal((LAYERS, WIDTH, heads * DIM), np.float32) / WIDTH**0.5
    for name, heads in (("q", Q_HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
}
mix = rng.standard_normal((LAYERS, Q_HEADS * DIM, WIDTH), np.float32) / WIDTH**0.5

runtime = vattn.Runtime(
    num_layers=LAYERS,
    num_q_heads=Q_HEADS,
    num_kv_heads=KV_HEADS,
    head_dim_k=DIM,
    head_dim_v=DIM,
    dtype="f32",
    policy="verified",
    epsilon=0.2,
    delta=0.1,
)


def rows(layer, hidden):
    """Queries, keys and values of tokens. A real model turns queries and keys by position here."""
    return [(hidden @ project[name][layer]).reshape(len(hidden), -1, DIM) for name in "qkv"]


def add(layer, hidden, out):
    """What the attention's answer does to the hidden states."""
    return hidden + out.reshape(len(hidden), -1) @ mix[layer]


def save_tables(path):
    """Learns the model's tables from a text; for real models `python -m vattn.tables` does it."""
    with runtime.sequence() as sequence:
        hidden = embedding[rng.integers(0, VOCABULARY, 2500)]
        for layer in range(LAYERS):
            hidden = add(layer, hidden, sequence.prefill(layer, *rows(layer, hidden)))
        sequence.save_tables(path, MODEL)


# The engine's pool, [layer, block, KV head, token, K and V], in host memory; page-locked where a
# CUDA device is to read it. vattn takes views [layer][block, token, KV head, dim].
pool = np.zeros((LAYERS, BLOCKS, KV_HEADS, BLOCK, 2 * DIM), np.float32)
keys, values = pool[..., :DIM].swapaxes(2, 3), pool[..., DIM:].swapaxes(2, 3)
with tempfile.TemporaryDirectory() as folder:
    tables = pathlib.Path(folder, "tables")
    save_tables(tables)
    paged = runtime.paged(
        keys, values, max_tokens=MAX_TOKENS, max_requests=8, tables=tables, model=MODEL
    )
free_blocks = list(range(BLOCKS))


class Request:
    """Tokens, and the blocks that their rows are in."""

    def __init__(self, tokens, row, shared=()):
        """shared: full blocks that another request computed for the same first tokens."""
        self.tokens, self.row, self.blocks = list(tokens), row, list(shared)
        self.computed = len(shared) * BLOCK

    def slots(self, end):
        """Slots of the tokens from `computed` to `end`, with blocks for them."""
        while len(self.blocks) * BLOCK < end:
            self.blocks.append(free_blocks.pop())
        places = np.arange(self.computed, end)
        return np.array(self.blocks, np.int64)[places // BLOCK] * BLOCK + places % BLOCK

    def prefill(self):
        """Computes the prompt in chunks; its last token's answer is the first new token."""
        while self.computed < len(self.tokens):
            end = min(self.computed + CHUNK, len(self.tokens))
            slots, hidden = self.slots(end), embedding[self.tokens[self.computed : end]]
            for layer in range(LAYERS):
                q, k, v = rows(layer, hidden)
                paged.write(layer, slots, k, v)
                out = paged.prefill(layer, q, np.array(self.blocks, np.int32), end)
                hidden = add(layer, hidden, out)
            self.computed = end
        self.tokens.append(int(np.argmax(hidden[-1] @ unembedding)))


def decode_step(requests, first):
    """One more token of every request; counts the verdicts."""
    slots = np.concatenate([request.slots(len(request.tokens)) for request in requests])
    block_table = np.zeros((len(requests), MAX_TOKENS // BLOCK), np.int32)
    for entries, request in zip(block_table, requests):
        entries[: len(request.blocks)] = request.blocks
    paged.begin_step(
        block_table,
        lengths=np.array([len(request.tokens) for request in requests], np.int32),
        query_starts=np.arange(len(requests) + 1, dtype=np.int32),
        request_rows=np.array([request.row for request in requests], np.int32),
        resets=np.full(len(requests), first, np.int32),
    )
    hidden = embedding[[request.tokens[-1] for request in requests]]
    verdicts = np.zeros(len(vattn.Verdict), int)
    for layer in range(LAYERS):
        q, k, v = rows(layer, hidden)
        paged.write(layer, slots, k, v)
        report = paged.report(layer, q)
        hidden = add(layer, hidden, paged.attend(layer, q, report=report))
        verdicts += np.bincount(report.verdict.ravel(), minlength=len(verdicts))
    for request, state in zip(requests, hidden):
        request.computed = len(request.tokens)
        request.tokens.append(int(np.argmax(state @ unembedding)))
    return verdicts


prefix = rng.integers(0, VOCABULARY, PREFIX)
one = Request([*prefix, *rng.integers(0, VOCABULARY, 300)], row=0)
one.prefill()
common = one.blocks[: PREFIX // BLOCK]
two = Request([*prefix, *rng.integers(0, VOCABULARY, 500)], row=1, shared=common)
two.prefill()
for step in range(STEPS):
    counts = zip(vattn.Verdict, decode_step([one, two], first=step == 0))
    print(f"step {step}:", ", ".join(f"{n} {verdict.name.lower()}" for verdict, n in counts if n))
read = runtime.stats().rows_selected / runtime.stats().rows_middle
print(f"{BLOCKS - len(free_blocks)} blocks, {len(common)} shared; {read:.0%} of the middle read")
print("tokens:", one.tokens[-STEPS:], two.tokens[-STEPS:])
