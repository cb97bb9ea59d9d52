"""The joint promise of several ranks on recordings: a context cut into slices, one runtime each, in one process.

    python bench/ranks_coverage.py --traces A.safetensors,B.safetensors --ranks 1,2,4,8 --json FILE

Each recording (vattn-trace-1) ends in --steps steps whose queries and tokens it has; what comes before is cut into slices of
even length. --forks sequences of other random numbers, all fresh (refresh 1), answer each step at a time. Counted are: answers
flagged VERIFIED that are off by more than epsilon, with the exact 95 % bound (Clopper-Pearson) of the query head where it is
highest; rows of the middle that are read; looks of a KV head; all-gathers that the slowest of all forks took; bytes of one
rank's records of a layer of one sequence, which it sends in each.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import scipy.stats
import torch
import vattn
from safetensors import safe_open

QUERIES = 512  # of a slice, that calibrate its index


class Trace:
    """A recording, with the queries that are known."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
            names = list(file.keys())
            self.k, self.v, self.q = (file.get_tensor(name) for name in ("k", "v", "q"))
            prompt = file.get_tensor("q_prompt") if "q_prompt" in names else self.q[:, :, :0]
        self.name = pathlib.Path(path).stem
        self.first_query = int(self.metadata["prompt_tokens"]) - prompt.shape[2]
        self.q = torch.cat([prompt, self.q], 2)  # of tokens from first_query on
        self.layers, self.kv_heads, self.tokens, self.dim_k = self.k.shape
        self.q_heads, self.dim_v = self.q.shape[1], self.v.shape[3]

    def queries(self, layer, begin, end):
        """[tokens, q_heads, dim] of the last tokens of [begin, end), or the first ones known."""
        first = max(self.first_query, end - QUERIES)
        if end - first < QUERIES // 2:
            first, end = self.first_query, self.first_query + QUERIES
        at = slice(first - self.first_query, end - self.first_query)
        return self.q[layer, :, at].transpose(0, 1).contiguous()


class World:
    """Ranks that hold the slices of one context, each in `forks` sequences."""

    def __init__(self, trace, tokens, ranks, arguments):
        self.trace, self.ranks, self.forks = trace, ranks, arguments.forks
        self.runtimes, self.batches, self.sequences = [], [], []
        cuts = [256 * (tokens // 256 * r // ranks) for r in range(ranks)] + [tokens]
        self.cuts = cuts
        for r in range(ranks):
            begin, end = cuts[r], cuts[r + 1]
            runtime = vattn.Runtime(
                num_layers=trace.layers,
                num_q_heads=trace.q_heads,
                num_kv_heads=trace.kv_heads,
                head_dim_k=trace.dim_k,
                head_dim_v=trace.dim_v,
                dtype="bf16",
                backend="cpu",
                num_threads=arguments.threads,
                host_bytes=4 << 30,
                epsilon=arguments.epsilon,
                delta=arguments.delta,
                refresh=1,
            )
            whole = runtime.sequence(id=1)
            for layer in range(trace.layers):
                rows = [x[layer, :, begin:end].transpose(0, 1) for x in (trace.k, trace.v)]
                whole.append(layer, *rows, trace.queries(layer, begin, end))
            whole.build_index()
            batch = runtime.batch(self.forks)
            forks = [whole.fork(id=2 + s) for s in range(self.forks)]
            for slot, fork in enumerate(forks):
                batch.set(slot, fork)
            self.runtimes.append(runtime)
            self.sequences.append([whole, *forks])
            self.batches.append(batch)
        like = torch.empty(0, dtype=torch.bfloat16)
        self.partials = [batch.partial(0, like) for batch in self.batches]
        self.reports = [
            batch.report(0, like, "verdict", "error", "selected", "looks", "middle")
            for batch in self.batches
        ]
        self.again = torch.zeros(1, dtype=torch.int32)

    def begin(self):
        for rank, batch in enumerate(self.batches):
            batch.begin_step(1 if rank == self.ranks - 1 else 0)

    def attend(self, layer, token):
        """Answers [forks, q_heads, dim_v] of the query of `token`, and how many gathers they took."""
        trace = self.trace
        q = trace.q[layer, :, token - trace.first_query]
        same = lambda x: x.expand(self.forks, *x.shape).contiguous()
        k_new, v_new = same(trace.k[layer, :, token]), same(trace.v[layer, :, token])
        out = torch.empty((self.forks, trace.q_heads, trace.dim_v))
        for rank, batch in enumerate(self.batches):
            last = rank == self.ranks - 1
            new = (k_new, v_new) if last else (None, None)
            batch.attend(
                layer, same(q), *new, partial=self.partials[rank], rank=rank, ranks=self.ranks
            )
        gathers = 0
        while True:
            gathers += 1
            gathered = torch.stack(self.partials)
            for rank, batch in enumerate(self.batches):
                batch.attend_more(
                    layer,
                    gathered,
                    self.partials[rank],
                    rank=rank,
                    again=self.again,
                    out=out,
                    report=self.reports[rank],
                )
            if int(self.again) == 0:
                return out, gathers

    def close(self):
        for runtime in self.runtimes:
            runtime.close()


def exact(trace, layer, token):
    """out [q_heads, dim_v] and sqrt of the mean |v|^2, in float64, of the tokens up to `token`."""
    q = trace.q[layer, :, token - trace.first_query].double().numpy()
    shared = trace.q_heads // trace.kv_heads
    out, rms = np.empty((trace.q_heads, trace.dim_v)), np.empty(trace.q_heads)
    for g in range(trace.kv_heads):
        k = trace.k[layer, g, : token + 1].float().numpy()
        v = trace.v[layer, g, : token + 1].float().numpy().astype(np.float64)
        s = q[g * shared : (g + 1) * shared] @ k.T.astype(np.float64) / np.sqrt(trace.dim_k)
        e = np.exp(s - s.max(1, keepdims=True))
        e /= e.sum(1, keepdims=True)
        out[g * shared : (g + 1) * shared] = e @ v
        rms[g * shared : (g + 1) * shared] = np.sqrt(e @ (v * v).sum(1))
    return out, rms


def measure(trace, ranks, references, arguments):
    first = trace.tokens - arguments.steps
    world = World(trace, first, ranks, arguments)
    heads = (trace.layers, trace.q_heads)
    verified, wrong = np.zeros(heads, int), np.zeros(heads, int)
    whole = selected = middle = gathers = looks = 0
    for step in range(arguments.steps):
        world.begin()
        for layer in range(trace.layers):
            out, rounds = world.attend(layer, first + step)
            gathers += rounds
            expected, rms = references[layer, step]
            off = np.linalg.norm(out.double().numpy() - expected, axis=2)
            ref = np.maximum(np.linalg.norm(expected, axis=1), 0.5 * rms)
            verdict = world.reports[0].verdict.numpy()
            is_verified = verdict == int(vattn.Verdict.VERIFIED)
            verified[layer] += is_verified.sum(0)
            wrong[layer] += (is_verified & (off > arguments.epsilon * ref)).sum(0)
            whole += int((~is_verified).sum())
            looks += float(world.reports[0].looks.float().mean())
            for report in world.reports:
                selected += int(report.selected.sum())
                middle += int(report.middle.sum())
    world.close()
    with np.errstate(invalid="ignore"):
        bound = scipy.stats.beta.ppf(0.95, wrong + 1, np.maximum(verified - wrong, 1e-9))
    bound = np.where(verified == 0, 0, np.nan_to_num(bound, nan=1.0))
    calls = arguments.steps * trace.layers
    return {
        "recording": trace.name,
        "ranks": ranks,
        "tokens": first,
        "answers": int(verified.sum()) + whole,
        "verified": int(verified.sum()),
        "wrong": int(wrong.sum()),
        "worst_head_bound": float(bound.max()),
        "rows": selected,
        "middle": middle,
        "gathers": gathers / calls,
        "looks": looks / calls,
        "bytes": world.partials[0][0].numel() * 4,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=lambda text: text.split(","), required=True)
    parser.add_argument(
        "--ranks", type=lambda text: [int(x) for x in text.split(",")], default=[1, 2, 4, 8]
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--forks", type=int, default=32)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.traces:
        trace = Trace(path)
        first = trace.tokens - arguments.steps
        references = {
            (layer, step): exact(trace, layer, first + step)
            for layer in range(trace.layers)
            for step in range(arguments.steps)
        }
        for ranks in arguments.ranks:
            rows.append(measure(trace, ranks, references, arguments))
            print(json.dumps(rows[-1]), flush=True)
    names = [pathlib.Path(path).name for path in arguments.traces]
    given = dict(zip(sys.argv[1::2], sys.argv[2::2])) | {"--traces": ",".join(names)}
    facts = {
        "what": "ranks_coverage",
        "command": "python bench/ranks_coverage.py "
        + " ".join(f"{key} {value}" for key, value in given.items()),
        "vattn": vattn.build_info(),
        "epsilon": arguments.epsilon,
        "delta": arguments.delta,
        "steps": arguments.steps,
        "forks": arguments.forks,
        "rows": rows,
    }
    pathlib.Path(arguments.json).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
