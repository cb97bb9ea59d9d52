"""One context over several devices: each rank holds a slice, all answer together, verified as one.

  python examples/context_parallel.py --tokens 65536                     one rank, on the CPU
  python examples/context_parallel.py --tokens 65536 --spawn 4           four processes, gloo
  torchrun --nproc-per-node 2 examples/context_parallel.py --device cuda --tokens 1048576 --alone

Rows are synthetic: keys and queries with the falling spectrum of recorded attention, queries that
drift from step to step. A step attends every layer: a forecast, one all-gather of records, a look,
another all-gather, and so on until all heads are verified or read whole. Every rank checks the
answers of the first layer against exact attention, which the ranks compute together. --alone
answers the same context with one rank first. With --device cuda records travel by NCCL; set
NCCL_NVLS_ENABLE=0 where NVLink multicast is not to be used.
"""

import argparse
import datetime
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import vattn

BLOCK = 256  # tokens that slices are cut by
CHUNK = 65536  # tokens that are appended at a time
FIRST = 4096  # of them, in the first chunk, that bring their queries
SPECTRUM = 0.18  # of the dimensions: fall of the variance of scores over them
SCORE_SIGMA = 2.0  # nats, standard deviation of scores over tokens
DRIFT = 0.95  # correlation of a query with that of the step before


class Rows:
    """The rows of layers that any rank can make: the same for the same layer and chunk."""

    def __init__(self, arguments, device):
        self.kv_heads, self.q_heads = arguments.kv_heads, arguments.q_heads
        self.dim, self.device, self.dtype = arguments.head_dim, device, arguments.dtype
        fall = torch.exp(-torch.arange(self.dim) / (SPECTRUM * self.dim)).sqrt()
        self.fall = (fall / fall.square().mean().sqrt()).to(device)
        # q.k / sqrt(dim) over tokens has the variance sum fall^4 / dim of queries of size 1.
        self.query_scale = SCORE_SIGMA / float((self.fall**4).mean().sqrt())

    def _normal(self, seed, *shape):
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def chunk(self, layer, first, count):
        """k, v [count, kv_heads, dim] of tokens from `first` on, made block by block of 256, so that
        slices of any length have the same ones."""
        k, v = [], []
        for block in range(first, first + count, BLOCK):
            seed, tokens = (layer << 32) + block, min(BLOCK, first + count - block)
            k.append(self._normal(2 * seed, tokens, self.kv_heads, self.dim))
            v.append(self._normal(2 * seed + 1, tokens, self.kv_heads, self.dim))
        return (torch.cat(k) * self.fall).to(self.dtype), (torch.cat(v) + 0.5).to(self.dtype)

    def queries(self, seed, count):
        """[count, q_heads, dim]"""
        return self._normal(seed, count, self.q_heads, self.dim) * self.fall * self.query_scale

    def new(self, seed):
        """k, v [1, kv_heads, dim] of a step's new token."""
        return self.chunk(1 << 20, seed, 1)


def gather(gathered, mine):
    """gathered [ranks, ...]: `mine` of all ranks. gloo moves what is in host memory alone."""
    if mine.is_cuda and dist.get_backend() == "gloo":
        there = torch.empty(gathered.shape, dtype=gathered.dtype)
        dist.all_gather(list(there.unbind(0)), mine.cpu())
        gathered.copy_(there)
    else:
        dist.all_gather(list(gathered.unbind(0)), mine)


def slice_of(tokens, rank, ranks):
    """First token and end of a rank's slice, whole chunks of 256."""
    blocks = tokens // BLOCK
    return BLOCK * (blocks * rank // ranks), BLOCK * (blocks * (rank + 1) // ranks)


class Slice:
    """A runtime with a slice of one context in `layers` layers."""

    def __init__(self, arguments, rows, layers, begin, end, rank, ranks):
        self.rows, self.layers, self.rank, self.ranks = rows, layers, rank, ranks
        self.last = rank == ranks - 1
        tokens = end - begin + arguments.most_steps + 256
        row = 2 * arguments.head_dim * torch.finfo(arguments.dtype).bits // 8
        blocks = layers * arguments.kv_heads * (tokens // 256 + 1)
        code = max(32, min(64, (arguments.head_dim // 4 + 15) // 16 * 16))
        self.runtime = vattn.Runtime(
            num_layers=layers,
            num_q_heads=arguments.q_heads,
            num_kv_heads=arguments.kv_heads,
            head_dim_k=arguments.head_dim,
            head_dim_v=arguments.head_dim,
            dtype={torch.float32: "f32", torch.bfloat16: "bf16"}[arguments.dtype],
            backend=arguments.device,
            device=rows.device.index or 0,
            host_bytes=int(blocks * 256 * (row + code) * 1.02) + (64 << 20),
            policy=arguments.policy,
            epsilon=arguments.epsilon,
            seed=arguments.seed,
        )
        self.sequence = self.runtime.sequence(id=1)
        self.held = []  # rows of layer 0, for exact attention
        for layer in range(layers):
            first = begin
            while first < end:
                count = min(FIRST if first == begin else CHUNK, end - first)
                k, v = rows.chunk(layer, first, count)
                q = rows.queries(7 + layer, FIRST).to(arguments.dtype) if first == begin else None
                if q is not None:
                    q = q[:count]
                self.sequence.append(layer, k, v, q)
                if layer == 0:
                    self.held.append((k, v))
                first += count
        self.sequence.build_index()
        self.batch = self.runtime.batch(1)
        self.batch.set(0, self.sequence)
        like = torch.empty(0, device=rows.device, dtype=arguments.dtype)
        self.partial = self.batch.partial(0, like)
        self.gathered = torch.empty((ranks, *self.partial.shape), device=rows.device)
        self.again = torch.zeros(1, dtype=torch.int32, device=rows.device)
        self.out = torch.empty(
            (1, arguments.q_heads, arguments.head_dim), device=rows.device, dtype=torch.float32
        )
        self.report = self.batch.report(0, like, "lse", "verdict", "error", "selected", "looks")
        self.gathers = 0

    def close(self):
        self.batch.close()
        self.sequence.close()
        self.runtime.close()

    def begin(self):
        self.batch.begin_step(1 if self.last else 0)

    def attend(self, layer, q, k_new, v_new):
        """The answer of the whole context, the same on every rank."""
        if not self.last:
            k_new = v_new = None
        if self.ranks == 1:
            self.batch.attend(layer, q, k_new, v_new, out=self.out, report=self.report)
            return self.out
        self.batch.attend(
            layer, q, k_new, v_new, partial=self.partial, rank=self.rank, ranks=self.ranks
        )
        while True:
            gather(self.gathered, self.partial)
            self.gathers += 1
            self.batch.attend_more(
                layer,
                self.gathered,
                self.partial,
                rank=self.rank,
                again=self.again,
                out=self.out,
                report=self.report,
            )
            again = int(self.again.item())
            if again == 0:
                return self.out
            if again < 0:
                raise RuntimeError("the records of the ranks are of different versions or rounds")

    def exact(self, q):
        """Exact attention of layer 0 over the slice: out, lse and mean |v|^2, in float64."""
        q = q[0].double()
        heads, shared = q.shape[0], q.shape[0] // self.rows.kv_heads
        top = torch.full((heads,), -torch.inf, dtype=torch.float64, device=q.device)
        mass = torch.zeros_like(top)
        norm2 = torch.zeros_like(top)
        total = torch.zeros((heads, q.shape[1]), dtype=torch.float64, device=q.device)
        grouped = q.view(self.rows.kv_heads, shared, -1) / q.shape[1] ** 0.5
        for k, v in self.held:
            s = torch.einsum("hgd,thd->hgt", grouped.float(), k.float()).double().flatten(0, 1)
            most = torch.maximum(top, s.amax(-1))
            scale = torch.exp(top - most)
            e = torch.exp(s - most[:, None])
            values = v.float()
            weighted = torch.einsum(
                "hgt,thd->hgd", e.float().view(self.rows.kv_heads, shared, -1), values
            )
            norms = torch.einsum(
                "hgt,th->hg",
                e.float().view(self.rows.kv_heads, shared, -1),
                values.square().sum(-1),
            )
            total = total * scale[:, None] + weighted.flatten(0, 1).double()
            norm2 = norm2 * scale + norms.flatten().double()
            mass = mass * scale + e.sum(-1)
            top = most
        return total / mass[:, None], top + mass.log(), norm2 / mass


def merge_exact(out, lse, norm2, ranks):
    """The exact answers of slices as one."""
    if ranks > 1:
        mine = torch.cat([out, lse[:, None], norm2[:, None]], 1)
        parts = torch.empty((ranks, *mine.shape), dtype=mine.dtype, device=mine.device)
        gather(parts, mine)
        weight = torch.softmax(parts[:, :, -2], 0)
        out = (weight[:, :, None] * parts[:, :, :-2]).sum(0)
        norm2 = (weight * parts[:, :, -1]).sum(0)
    return out, norm2


def measure(arguments, rows, tokens, layers, rank, ranks):
    """A context of `tokens` tokens in `layers` layers over ranks: its figures."""
    held = min(layers, arguments.held_layers)
    rounds = -(-layers // held)
    arguments.most_steps = (arguments.steps + arguments.warmup) * rounds + 64
    begin, end = slice_of(tokens, rank, ranks)
    started = time.perf_counter()
    part = Slice(arguments, rows, held, begin, end, rank, ranks)
    if rows.device.type == "cuda":
        torch.cuda.synchronize()
    filled_s = time.perf_counter() - started
    state = [rows.queries(1000 + layer, 1) for layer in range(held)]
    times, selected, verified, wrong, judged, dense, looks = [], 0, 0, 0, 0, 0, 0
    worst_exact = 0.0
    middle = 0
    for step in range(arguments.warmup + arguments.steps):
        queries = []
        for turn in range(rounds):
            for layer in range(held):
                seed = 10_000 + (step * rounds + turn) * held + layer
                fresh = rows.queries(seed, 1)
                state[layer] = DRIFT * state[layer] + (1 - DRIFT**2) ** 0.5 * fresh
                queries.append((layer, state[layer].to(arguments.dtype), *rows.new(seed)))
        part.gathers = 0
        if rows.device.type == "cuda":
            torch.cuda.synchronize()
        if ranks > 1:
            dist.barrier()
        started = time.perf_counter()
        first = None
        for at, (layer, q, k_new, v_new) in enumerate(queries):
            if layer == 0:
                part.begin()
            out = part.attend(layer, q, k_new, v_new)
            if at == 0:
                first = (out.clone(), part.report.verdict.clone(), q, part.report.selected.clone())
                first_looks = part.report.looks.clone()
        if rows.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        # The exact side gets the new tokens of layer 0 too: each turn has one.
        if part.last:
            part.held += [(k, v) for layer, _, k, v in queries[:1] if layer == 0]
        later = [(k, v) for layer, _, k, v in queries[1:] if layer == 0]
        if step >= arguments.warmup:
            times.append(elapsed)
            selected += int(first[3].sum())
            looks += int(first_looks.sum())
            middle += part.rows.kv_heads * (end - begin)
            out, norm2 = merge_exact(*part.exact(first[2]), ranks)
            error = (first[0][0].double() - out).norm(dim=1)
            ref = torch.maximum(out.norm(dim=1), 0.5 * norm2.sqrt())
            for head in range(arguments.q_heads):
                verdict = int(first[1][0, head])
                judged += 1
                if verdict == int(vattn.Verdict.VERIFIED):
                    verified += 1
                    wrong += int(error[head] > arguments.epsilon * ref[head])
                else:
                    dense += 1
                    worst_exact = max(worst_exact, float(error[head] / ref[head]))
        if part.last:
            part.held += later
    gathers = part.gathers
    record_bytes = part.partial.numel() * 4
    part.close()
    if ranks > 1:
        counts = torch.tensor([selected, middle], dtype=torch.int64, device=rows.device)
        parts = torch.empty((ranks, 2), dtype=torch.int64, device=rows.device)
        gather(parts, counts)
        selected, middle = parts.sum(0).tolist()
    return {
        "ranks": ranks,
        "tokens": tokens,
        "layers": rounds * held,
        "held_layers": held,
        "steps": arguments.steps,
        "step_ms": statistics.median(times) * 1e3,
        "step_ms_least": min(times) * 1e3,
        "gathers_a_step": gathers,
        "bytes_sent_a_step": gathers * record_bytes * (ranks - 1) if ranks > 1 else 0,
        "record_bytes": record_bytes,
        "rows_share": selected / middle,
        "looks": looks / (arguments.steps * arguments.kv_heads),
        "heads_judged": judged,
        "heads_verified": verified,
        "heads_wrong": wrong,
        "heads_whole": dense,
        "largest_error_of_whole": worst_exact,
        "fill_s": filled_s,
    }


def run(arguments, rank, ranks):
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    arguments.dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    if arguments.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if ranks > 1:
        one_device = arguments.device == "cuda" and torch.cuda.device_count() < ranks
        backend = "nccl" if arguments.device == "cuda" and not one_device else "gloo"
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=arguments.timeout),
            device_id=device if backend == "nccl" else None,
        )
    rows = Rows(arguments, device)
    results = []
    for tokens in arguments.tokens:
        for layers in arguments.layers:
            if arguments.alone and ranks > 1:
                if rank == 0:
                    results.append(measure(arguments, rows, tokens, layers, 0, 1))
                dist.barrier()
            results.append(measure(arguments, rows, tokens, layers, rank, ranks))
            if rank == 0:
                for result in results[-2:] if arguments.alone and ranks > 1 else results[-1:]:
                    print(json.dumps(result), flush=True)
    if rank == 0 and arguments.json:
        facts = {
            "what": "context_parallel",
            "command": " ".join(["python", *sys.argv]),
            "device": (
                torch.cuda.get_device_name(device) if arguments.device == "cuda" else "cpu"
            ),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver() if arguments.device == "cuda" else "",
            "vattn": vattn.build_info(),
            "q_heads": arguments.q_heads,
            "kv_heads": arguments.kv_heads,
            "head_dim": arguments.head_dim,
            "policy": arguments.policy,
            "epsilon": arguments.epsilon,
            "results": results,
        }
        pathlib.Path(arguments.json).write_text(json.dumps(facts, indent=1) + "\n")
    if ranks > 1:
        dist.destroy_process_group()


def driver():
    """Version of the CUDA driver's package, or "" where nvidia-smi does not tell."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return ""


def spawned(rank, arguments, ranks, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    run(arguments, rank, ranks)


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=numbers, default=[32768], help="of the whole context")
    parser.add_argument("--layers", type=numbers, default=[1])
    parser.add_argument(
        "--held-layers",
        type=int,
        default=7,
        help="layers with rows of their own: more are attended by steps of these one after another",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--q-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--policy", choices=("verified", "dense"), default="verified")
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spawn", type=int, default=0, help="processes to start on this machine")
    parser.add_argument("--alone", action="store_true", help="one rank with the context first")
    parser.add_argument("--timeout", type=int, default=120, help="seconds to wait for a rank")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    if arguments.spawn > 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(
            spawned, (arguments, arguments.spawn, port), nprocs=arguments.spawn
        )
        return
    run(arguments, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


if __name__ == "__main__":
    main()
