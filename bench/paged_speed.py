#!/usr/bin/env python3
"""Time of a decode step over an engine's pool (vattn_paged) beside one over vattn's own sequences.

    python bench/paged_speed.py --tokens 32768,131072 --batch 1,8 --json paged.json

One layer on a CUDA device, the same rows and queries for both: keys whose variance falls over a
rotated basis as it does in models, queries alike. Both are replayed CUDA graphs. A step of an
engine is one graph with the new rows written, their codes made, the step's groups made on the
device and attention; of vattn's own sequences the graph has the attention, and begin_step runs on
the host before it. The medians of --steps steps after as many to warm up; the hot sets hold
--hot-share of the rows.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
from typing import Any

import torch
import vattn

Q_HEADS, KV_HEADS, DIM = 32, 8, 128


def numbers(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=numbers, default=[32768])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--block-tokens", type=numbers, default=[16])
    parser.add_argument("--hot-share", type=float, default=.03)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    rows = [measure(args, tokens, batch, block)
            for tokens in args.tokens for batch in args.batch for block in args.block_tokens]
    print("| tokens x batch | block | own, us | pool, us | rows per KV head: own | pool |")
    print("|---|---:|---:|---:|---:|---:|")
    for r in rows:
        print(f"| {r['tokens']} x {r['batch']} | {r['block_tokens']} | {r['own_us']:.0f} | "
              f"{r['pool_us']:.0f} | {r['own_rows']:.0f} | {r['pool_rows']:.0f} |")
    if args.json:
        command = (f"python bench/paged_speed.py --tokens {','.join(map(str, args.tokens))} --batch "
                   f"{','.join(map(str, args.batch))} --block-tokens {','.join(map(str, args.block_tokens))} "
                   f"--hot-share {args.hot_share} --steps {args.steps}")
        pathlib.Path(args.json).write_text(json.dumps(
            {"command": command, "device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


class Model:
    """Keys, values and queries on the device."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        basis = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, device="cuda"))[0]
        falls = torch.exp(-torch.arange(DIM, device="cuda") / (.18 * DIM) / 2)
        self.keys = basis * falls * (DIM / falls.square().sum()).sqrt()
        self.queries = self.keys.repeat_interleave(Q_HEADS // KV_HEADS, 0) * 1.6

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [count, KV heads, dim]."""
        k = torch.einsum("thj,hij->thi", torch.randn(count, KV_HEADS, DIM, device="cuda"), self.keys)
        return k.bfloat16().contiguous(), torch.randn(count, KV_HEADS, DIM, device="cuda").bfloat16()

    def query(self, count: int) -> torch.Tensor:
        """q [count, query heads, dim]."""
        q = torch.einsum("thj,hij->thi", torch.randn(count, Q_HEADS, DIM, device="cuda"), self.queries)
        return q.bfloat16().contiguous()


def measure(args: argparse.Namespace, tokens: int, batch: int, block: int) -> dict[str, Any]:
    """Both times of one shape."""
    model, steps = Model(), 2 * args.steps
    host_bytes = batch * (tokens + steps + 512) * KV_HEADS * (2 * DIM * 2 + 64)
    shape = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim_k": DIM, "head_dim_v": DIM,
             "dtype": "bf16", "backend": "cuda", "host_bytes": host_bytes}
    prompts = [model.rows(tokens) for _ in range(batch)]
    prompt_queries = model.query(4096)
    new = [model.rows(batch) for _ in range(steps)]
    queries = [model.query(batch) for _ in range(steps)]
    with vattn.Runtime(**shape, hot_share=args.hot_share) as runtime:
        own_us, own_rows, tables = measure_own(runtime, prompts, prompt_queries, new, queries)
    with vattn.Runtime(**(shape | {"host_bytes": 1 << 22})) as runtime:
        pool_us, pool_rows = measure_pool(runtime, args, block, tables, prompts, new, queries)
    tables.unlink()
    return {"tokens": tokens, "batch": batch, "block_tokens": block, "own_us": own_us,
            "pool_us": pool_us, "own_rows": own_rows, "pool_rows": pool_rows}


Rows = list[tuple[torch.Tensor, torch.Tensor]]


def measure_own(runtime: vattn.Runtime, prompts: Rows, prompt_queries: torch.Tensor, new: Rows,
                queries: list[torch.Tensor]) -> tuple[float, float, pathlib.Path]:
    """Microseconds and rows of a step, and a file of tables learnt from the first prompt."""
    batch, stream = runtime.batch(len(prompts)), torch.cuda.Stream()
    sequences = []
    for slot, (k, v) in enumerate(prompts):
        sequences.append(runtime.sequence())
        sequences[-1].append(0, k, v, prompt_queries)
        batch.set(slot, sequences[-1])
    file = pathlib.Path(tempfile.mkstemp(suffix=".tables")[1])
    sequences[0].save_tables(file)
    q, k, v = (torch.zeros_like(x) for x in (queries[0], *new[0]))
    out = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        batch.begin_step(stream=stream)
        report = batch.report(0, q)
        batch.attend(0, q, k, v, out=out, report=report)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    batch.begin_step(stream=stream)
    with torch.cuda.graph(graph, stream=stream):
        batch.attend(0, q, k, v, out=out, report=report, stream=stream)

    def begin() -> None:
        batch.begin_step(stream=stream)

    graph.replay()
    torch.cuda.synchronize()
    us, rows = time_steps(stream, graph, begin, (q, k, v), queries, new, report)
    batch.close()
    return us, rows, file


def measure_pool(runtime: vattn.Runtime, args: argparse.Namespace, block: int, tables: pathlib.Path,
                 prompts: Rows, new: Rows, queries: list[torch.Tensor]) -> tuple[float, float]:
    """Microseconds and rows of a step."""
    tokens, requests = prompts[0][0].shape[0], len(prompts)
    most = tokens + len(new) + 8
    per_request = (most + block - 1) // block
    pools = [torch.empty(requests * per_request, block, KV_HEADS, DIM, dtype=torch.bfloat16,
                         pin_memory=True) for _ in range(2)]
    hot_bytes = int(args.hot_share * requests * tokens * KV_HEADS * 4 * DIM)
    stream = torch.cuda.Stream()
    with runtime.paged([pools[0]], [pools[1]], max_tokens=most, max_requests=requests, tables=tables,
                       hot_bytes=hot_bytes) as pool:
        order = torch.randperm(requests * per_request, dtype=torch.int32)
        table = order.reshape(requests, per_request).cuda()

        def slots(request: int, first: int, end: int) -> torch.Tensor:
            at = torch.arange(first, end, device="cuda")
            return table[request, at // block].long() * block + at % block

        for request, (k, v) in enumerate(prompts):
            for first in range(0, tokens, 65536):
                end = min(tokens, first + 65536)
                pool.write(0, slots(request, first, end), k[first:end], v[first:end])
        lengths = torch.full((requests,), tokens, dtype=torch.int32, device="cuda")
        starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
        rows_of = torch.arange(requests, dtype=torch.int32, device="cuda")
        resets = torch.ones(requests, dtype=torch.int32, device="cuda")
        new_slots = torch.zeros(requests, dtype=torch.int64, device="cuda")
        all_slots = torch.stack([slots(r, tokens, most) for r in range(requests)], 1)
        q, k, v = (torch.zeros_like(x) for x in (queries[0], *new[0]))
        out = torch.zeros_like(q)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            pool.begin_step(table, lengths, starts, rows_of, resets, num_query_tokens=requests)
            report = pool.report(0, q)
            pool.write(0, new_slots, k, v)
            pool.attend(0, q, out=out, report=report)
        step = iter(range(len(new)))

        def begin() -> None:
            at = next(step)
            lengths.add_(1)
            new_slots.copy_(all_slots[at])
            resets.fill_(1 if at == 0 else 0)

        return time_steps(stream, graph, begin, (q, k, v), queries, new, report)


def time_steps(stream: torch.cuda.Stream, graph: torch.cuda.CUDAGraph, begin: Any, static: Any,
               queries: list[torch.Tensor], new: Rows, report: vattn.Report) -> tuple[float, float]:
    """Medians over the second half of the steps: microseconds of the graph, rows read per KV head."""
    times, rows = [], []
    for at, (query, (k, v)) in enumerate(zip(queries, new)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for to, of in zip(static, (query, k, v)):
                to.copy_(of)
            begin()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        if 2 * at >= len(queries):
            times.append(1e3 * start.elapsed_time(end))
            rows.append(report.selected.float().mean().item())
    return statistics.median(times), statistics.median(rows)


if __name__ == "__main__":
    main()
