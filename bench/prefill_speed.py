#!/usr/bin/env python3
"""Time of `Sequence.prefill` beside torch's attention over the same arrays, on the CPU.

    python bench/prefill_speed.py --stored 0,8192,30000 --tokens 500 --heads 32 8 128

Both take a chunk's queries over everything stored and the chunk itself, causally; torch by
scaled_dot_product_attention (its flash kernel, with a mask where something is stored), with K and V
of the query heads laid out beforehand. The better of --rounds rounds, taken in turns; FLOP are those
of the pairs that are seen.
"""

import argparse
import json
import platform
import time

import torch
import vattn


def lengths(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stored", type=lengths, default=[0, 8192], help="tokens before the chunk")
    parser.add_argument("--tokens", type=int, default=512, help="of the chunk")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128],
                        metavar=("Q", "KV", "DIM"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(args, stored) for stored in args.stored]
    print("| stored | ours, ms | torch bf16, ms | torch fp32, ms | ours, GFLOP/s |")
    print("|---:|---:|---:|---:|---:|")
    for row in rows:
        ms = [f"{1e3 * row[name]:.0f}" for name in ("ours", "torch_bf16", "torch_f32")]
        print(f"| {row['stored']} | {' | '.join(ms)} | {row['flop'] / row['ours'] / 1e9:.0f} |")
    if args.json:
        with open(args.json, "w") as file:
            command = (f"python bench/prefill_speed.py --stored {','.join(map(str, args.stored))} "
                       f"--tokens {args.tokens} --heads {' '.join(map(str, args.heads))} "
                       f"--threads {args.threads}")
            json.dump({"command": command, "processor": platform.processor() or platform.machine(),
                       "torch": torch.__version__, "threads": args.threads,
                       "tokens": args.tokens, "heads": args.heads, "rows": rows}, file, indent=1)
            file.write("\n")


def measure(args: argparse.Namespace, stored: int) -> dict[str, float]:
    """Seconds of each, for a chunk behind so many tokens."""
    q_heads, kv_heads, dim = args.heads
    total = stored + args.tokens
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(tokens, heads, dim, generator=generator).to(torch.bfloat16)
        for tokens, heads in ((args.tokens, q_heads), (total, kv_heads), (total, kv_heads))
    )
    runtime = vattn.Runtime(
        num_layers=1, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim_k=dim, head_dim_v=dim,
        dtype="bf16", backend="cpu", num_threads=args.threads,
        host_bytes=(total // 256 + 2) * 256 * kv_heads * (4 * dim + 64) + (64 << 20),
    )
    sequence = runtime.sequence()
    if stored:
        sequence.append(0, k[:stored], v[:stored])
    group = q_heads // kv_heads
    wide = [x.transpose(0, 1).repeat_interleave(group, 0)[None].contiguous() for x in (k, v)]
    arrays = [q.transpose(0, 1)[None].contiguous(), *wide]
    mask = torch.ones(args.tokens, total, dtype=torch.bool).tril(stored) if stored else None

    def ours() -> torch.Tensor:
        return sequence.prefill(0, q, k[stored:], v[stored:])

    def torchs(given: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *given, attn_mask=mask, is_causal=mask is None
        )

    whole = [x.float() for x in arrays]
    best = {"ours": float("inf"), "torch_bf16": float("inf"), "torch_f32": float("inf")}
    for _ in range(args.rounds):
        for name, call in (("ours", ours), ("torch_bf16", lambda: torchs(arrays)),
                           ("torch_f32", lambda: torchs(whole))):
            sequence.truncate(stored)
            start = time.perf_counter()
            answer = call()
            best[name] = min(best[name], time.perf_counter() - start)
            if name == "ours":
                mine = answer.float()
    exact = torchs(whole)[0].transpose(0, 1)
    off = float((mine - exact).norm() / exact.norm())
    if off > 0.01:
        raise SystemExit(f"answers are {off:.2g} apart")
    pairs = args.tokens * stored + args.tokens * (args.tokens + 1) / 2
    return {"stored": stored, "flop": 4 * q_heads * dim * pairs, "apart": off, **best}


if __name__ == "__main__":
    main()
