#!/usr/bin/env python3
"""Time of `Sequence.prefill` beside torch's attention over the same arrays.

    python bench/prefill_speed.py --stored 0,8192,30000 --tokens 500 --heads 32 8 128
    python bench/prefill_speed.py --device cuda --stored 131072 --tokens 8192
    python bench/prefill_speed.py --device cuda --prompt 1048576 --tokens 8192

Both take a chunk's queries over everything stored and the chunk itself, causally. What is stored is
in host memory for ours, and where the model is for torch (scaled_dot_product_attention: its flash
kernel on CUDA, on the CPU the same with a mask where something is stored and K and V of the query
heads laid out beforehand). The best of --rounds rounds, taken in turns; FLOP are those of the pairs
that are seen. --prompt N reads one prompt of N tokens in chunks of --tokens instead, beside its two
limits on CUDA: its FLOP at the speed of torch's flash attention for the last chunk, and the rows that
all chunks read at the speed of one large copy from pinned memory.
"""

import argparse
import json
import platform
import time
from typing import Any

import torch
import vattn
from torch.nn.attention.bias import causal_lower_right


def lengths(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stored", type=lengths, default=[0, 8192], help="tokens before the chunk")
    parser.add_argument("--tokens", type=int, default=512, help="of the chunk")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128],
                        metavar=("Q", "KV", "DIM"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, help="one prompt of so many tokens in chunks of --tokens")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.prompt:
        if args.device != "cuda":
            parser.error("--prompt needs --device cuda")
        of = measure_prompt(args)
        print(f"{args.prompt} tokens in {of['seconds']:.1f} s: {of['flop'] / of['seconds'] / 1e12:.0f} TFLOP/s; "
              f"torch's flash attention {of['torch_flop_per_second'] / 1e12:.0f}, one copy "
              f"{of['copy_bytes_per_second'] / 1e9:.1f} GB/s, {of['bytes'] / 1e9:.0f} GB read")
        if args.json:
            write(args, f"--prompt {args.prompt}", {"prompt": args.prompt, **of})
        return
    rows = [measure(args, stored) for stored in args.stored]
    print("| stored | ours, ms | torch, ms | torch in fp32, ms | ours, TFLOP/s | stored rows, GB/s |")
    print("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        ms = [f"{1e3 * row[x]:.1f}" if x in row else "-" for x in ("ours", "torch", "torch_f32")]
        tflops, rate = row["flop"] / row["ours"] / 1e12, row["bytes"] / row["ours"] / 1e9
        print(f"| {row['stored']} | {' | '.join(ms)} | {tflops:.2f} | {rate:.1f} |")
    if args.json:
        write(args, f"--stored {','.join(map(str, args.stored))}", {"rows": rows})


def write(args: argparse.Namespace, which: str, results: dict[str, Any]) -> None:
    """The results and what they were measured with, as JSON."""
    command = (f"python bench/prefill_speed.py {which} --device {args.device} --tokens {args.tokens} "
               f"--heads {' '.join(map(str, args.heads))} --threads {args.threads}")
    processor = (torch.cuda.get_device_name() if args.device == "cuda"
                 else platform.processor() or platform.machine())
    with open(args.json, "w") as file:
        json.dump({"command": command, "processor": processor, "torch": torch.__version__,
                   "threads": args.threads, "tokens": args.tokens, "heads": args.heads, **results},
                  file, indent=1)
        file.write("\n")


def runtime_for(args: argparse.Namespace, tokens: int) -> vattn.Runtime:
    """One layer with room for so many tokens in host memory."""
    q_heads, kv_heads, dim = args.heads
    return vattn.Runtime(
        num_layers=1, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim_k=dim, head_dim_v=dim,
        dtype="bf16", backend=args.device, num_threads=args.threads, hot_share=0.0,
        host_bytes=(tokens // 256 + 2) * 256 * kv_heads * (4 * dim + 64) + (64 << 20),
    )


def measure_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a prompt in chunks, and what its limits are made of."""
    q_heads, kv_heads, dim = args.heads
    generator = torch.Generator(args.device).manual_seed(1)

    def rows(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, dim, generator=generator, device=args.device,
                           dtype=torch.bfloat16)

    runtime = runtime_for(args, args.prompt)
    warm = runtime.sequence()
    warm.prefill(0, rows(args.tokens, q_heads), rows(args.tokens, kv_heads), rows(args.tokens, kv_heads))
    del warm
    sequence = runtime.sequence()
    k, v = rows(args.prompt, kv_heads), rows(args.prompt, kv_heads)
    chunks = []
    for begin in range(0, args.prompt, args.tokens):
        end = min(args.prompt, begin + args.tokens)
        q = rows(end - begin, q_heads)
        wait(args.device)
        start = time.perf_counter()
        out = sequence.prefill(0, q, k[begin:end], v[begin:end])
        wait(args.device)
        chunks.append(time.perf_counter() - start)
    flop = 4 * q_heads * dim * (args.prompt * (args.prompt + 1) / 2)
    of = {"seconds": sum(chunks), "flop": flop,
          "bytes": sum(4 * kv_heads * dim * begin for begin in range(0, args.prompt, args.tokens)),
          "chunks": chunks}
    count = q.shape[0]
    arrays = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    best = float("inf")
    for _ in range(args.rounds):
        wait(args.device)
        start = time.perf_counter()
        answer = torch.nn.functional.scaled_dot_product_attention(
            *arrays, attn_mask=causal_lower_right(count, args.prompt), enable_gqa=True)
        wait(args.device)
        best = min(best, time.perf_counter() - start)
    exact = answer[0].transpose(0, 1).float()
    of["apart"] = float((out.float() - exact).norm() / exact.norm())
    if of["apart"] > 0.02:
        raise SystemExit(f"answers are {of['apart']:.2g} apart")
    last = 4 * q_heads * dim * (count * (args.prompt - count) + count * (count + 1) / 2)
    of["torch_flop_per_second"] = last / best
    of["copy_bytes_per_second"] = copy_speed(args.rounds)
    return of


def copy_speed(rounds: int) -> float:
    """Bytes a second of one large copy from pinned memory to the device."""
    pinned = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(pinned, device="cuda")
    best = float("inf")
    for _ in range(rounds + 1):
        wait("cuda")
        start = time.perf_counter()
        there.copy_(pinned, non_blocking=True)
        wait("cuda")
        best = min(best, time.perf_counter() - start)
    return pinned.numel() / best


def measure(args: argparse.Namespace, stored: int) -> dict[str, float]:
    """Seconds of each, for a chunk behind so many tokens."""
    q_heads, kv_heads, dim = args.heads
    total = stored + args.tokens
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(tokens, heads, dim, generator=generator).to(torch.bfloat16).to(args.device)
        for tokens, heads in ((args.tokens, q_heads), (total, kv_heads), (total, kv_heads))
    )
    sequence = runtime_for(args, total).sequence()
    for begin in range(0, stored, 65536):
        sequence.append(0, k[begin : min(stored, begin + 65536)], v[begin : min(stored, begin + 65536)])
    lower_right = causal_lower_right(args.tokens, total) if stored else None
    if args.device == "cpu":
        k, v = (x.repeat_interleave(q_heads // kv_heads, 1) for x in (k, v))
        if stored:
            lower_right = torch.ones(args.tokens, total, dtype=torch.bool).tril(stored)
    arrays = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    new_k, new_v = (x[stored:, :: q_heads // kv_heads if args.device == "cpu" else 1].contiguous()
                    for x in (k, v))

    def torchs(given: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *given, attn_mask=lower_right, is_causal=not stored, enable_gqa=args.device == "cuda"
        )

    calls = {
        "ours": lambda: sequence.prefill(0, q, new_k, new_v),
        "torch": lambda: torchs(arrays),
    }
    if args.device == "cpu":
        whole = [x.float() for x in arrays]
        calls["torch_f32"] = lambda: torchs(whole)
    best, answers = dict.fromkeys(calls, float("inf")), {}
    for _ in range(args.rounds):
        for name, call in calls.items():
            sequence.truncate(stored)
            wait(args.device)
            start = time.perf_counter()
            answers[name] = call()
            wait(args.device)
            best[name] = min(best[name], time.perf_counter() - start)
    exact = answers[list(calls)[-1]][0].transpose(0, 1).float()
    off = float((answers["ours"].float() - exact).norm() / exact.norm())
    if off > 0.02:
        raise SystemExit(f"answers are {off:.2g} apart")
    pairs = args.tokens * stored + args.tokens * (args.tokens + 1) / 2
    return {"stored": stored, "flop": 4 * q_heads * dim * pairs, "apart": off,
            "bytes": 4 * stored * kv_heads * dim, **best}


def wait(device: str) -> None:
    """Until the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
