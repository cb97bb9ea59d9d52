"""Dense attention of a decode step by torch's flash backend, all KV in device memory: what `vattn step` stands beside.

  python bench/flash_step.py --json flash.json

The query heads of a KV head are the rows of one attention, so that every key is read once. A step is a replayed
CUDA graph; other bytes are written to the caches before each, as the other layers of a model would do.
"""

import argparse
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

WARM_UP, TIMED = 5, 20
FLUSH_BYTES = 256 << 20


def graph_of(attend):
    """A captured call of `attend`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    return graph


def microseconds(graph, flush):
    """The median time of a replay."""
    times = []
    for i in range(WARM_UP + TIMED):
        flush.fill_(i)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times[WARM_UP:])


def measure(arguments, tokens, batch, kv_heads, flush):
    heads = arguments.q_heads // kv_heads
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, kv_heads, heads, arguments.head_dim, **kind)
    k = torch.randn(batch, kv_heads, tokens, arguments.head_dim, **kind)
    v = torch.randn_like(k)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        graph = graph_of(lambda: scaled_dot_product_attention(q, k, v))
    return {
        "tokens": tokens,
        "batch": batch,
        "kv_heads": kv_heads,
        "q_heads": arguments.q_heads,
        "us": round(microseconds(graph, flush), 1),
    }


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=numbers, default=[32768, 131072, 524288, 1048576])
    parser.add_argument("--batch", type=numbers, default=[1])
    parser.add_argument("--kv-heads", type=numbers, default=[8])
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", help="write everything to this file")
    arguments = parser.parse_args()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    rows = []
    for kv_heads in arguments.kv_heads:
        for batch in arguments.batch:
            for tokens in arguments.tokens:
                rows.append(measure(arguments, tokens, batch, kv_heads, flush))
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    if arguments.json:
        options = " ".join(sys.argv[1:])
        report = {
            "command": f"python bench/flash_step.py {options}",
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(),
            "rows": rows,
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
