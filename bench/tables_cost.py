#!/usr/bin/env python3
"""What tables of another text cost: rows read and answers off, for tables as vattn_paged has them.

    python bench/tables_cost.py --trace turns.safetensors --other answer.safetensors --steps 64

Both are recordings of the same layers of one model (vattn-trace-1). The last --steps tokens of the
first are decoded three times, over the same rows: by a sequence of vattn's own, whose index learns
from the text itself; and over a pool (vattn_paged) with tables learnt from the same text, and with
tables of the other text. Every answer is held to float64 attention: off is an answer that was
verified and is further than epsilon from it; whole are heads that were not verified and read whole.
"""

import argparse
import json
import pathlib
import struct
import tempfile
from typing import Any

import numpy as np
import vattn

Trace = dict[str, np.ndarray]


def read(path: str) -> tuple[Trace, dict[str, str]]:
    """The tensors of a recording in fp32, and its metadata."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        data = file.read()
    tensors = {}
    for name, of in header.items():
        if name == "__metadata__":
            continue
        bits = np.frombuffer(data[slice(*of["data_offsets"])], np.uint16).astype(np.uint32) << 16
        tensors[name] = bits.view(np.float32).reshape(of["shape"])
    return tensors, header["__metadata__"]


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, float]:
    """Attention of one head in float64, and the root mean square of |v| it sees."""
    s = (k @ q).astype(np.float64) * scale
    p = np.exp(s - s.max())
    p /= p.sum()
    return p @ v, float(np.sqrt(p @ np.square(v, dtype=np.float64).sum(1)))


class Tally:
    """Rows read and heads answered."""

    def __init__(self) -> None:
        self.selected = self.middle = self.off = self.verified = self.whole = self.heads = 0

    def add(self, report: vattn.Report, out: np.ndarray, want: list[tuple[np.ndarray, float]],
            epsilon: float, floor: float) -> None:
        """One step: report and out [q_heads, dim] of its only request."""
        self.selected += int(report.selected.sum())
        self.middle += int(report.middle.sum())
        for head, (answer, rms) in enumerate(want):
            verdict = report.verdict.reshape(-1)[head]
            reference = max(float(np.linalg.norm(answer)), floor * rms)
            self.heads += 1
            self.verified += verdict == vattn.Verdict.VERIFIED
            self.whole += verdict == vattn.Verdict.DENSE
            self.off += verdict == vattn.Verdict.VERIFIED and float(
                np.linalg.norm(out[head] - answer)) > epsilon * reference

    def row(self) -> dict[str, float]:
        """Shares."""
        return {"selected": self.selected / self.middle, "off": int(self.off),
                "verified": int(self.verified), "whole": int(self.whole), "heads": self.heads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    trace, about = read(args.trace)
    other, _ = read(args.other)
    layers, kv_heads, _, dim = trace["k"].shape
    q_heads = trace["q"].shape[1]
    if other["k"].shape[:2] != (layers, kv_heads):
        parser.error("the recordings are of other layers or KV heads")
    tallies = {name: Tally() for name in ("own index", "tables of the text", "tables of the other text")}
    shape = {"num_q_heads": q_heads, "num_kv_heads": kv_heads, "head_dim_k": dim, "head_dim_v": dim,
             "dtype": "f32", "backend": "cpu", "host_bytes": 1 << 30}
    for layer in range(layers):
        with vattn.Runtime(**shape) as runtime, tempfile.TemporaryDirectory() as folder:
            measure(runtime, pathlib.Path(folder), layer, trace, other, args.steps, tallies)
    rows = {name: tally.row() for name, tally in tallies.items()}
    print("| tables | selected | off of verified | whole |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {100 * row['selected']:.2f} % | {row['off']} of {row['verified']} | "
              f"{100 * row['whole'] / row['heads']:.2f} % |")
    if args.json:
        command = (f"python bench/tables_cost.py --trace {pathlib.Path(args.trace).name} --other "
                   f"{pathlib.Path(args.other).name} --steps {args.steps}")
        pathlib.Path(args.json).write_text(json.dumps(
            {"command": command, "model": about.get("model"), "layers": about.get("layers"),
             "rows": rows}, indent=1) + "\n")


def prompt(runtime: vattn.Runtime, of: Trace, layer: int, end: int) -> vattn.Sequence:
    """A sequence of the first `end` tokens of one layer, with their queries."""
    sequence = runtime.sequence()
    first = of["k"].shape[2] - of["q"].shape[2]  # the first token with a query
    k, v = (np.ascontiguousarray(of[x][layer].swapaxes(0, 1)) for x in "kv")
    q = np.ascontiguousarray(of["q"][layer].swapaxes(0, 1))
    if end <= first:
        queries = np.ascontiguousarray(of["q_prompt"][layer].swapaxes(0, 1))
        sequence.append(0, k[:end], v[:end], queries[-min(end, len(queries)):])
    else:
        sequence.append(0, k[:first], v[:first])
        sequence.append(0, k[first:end], v[first:end], q[:end - first])
    return sequence


def measure(runtime: vattn.Runtime, folder: pathlib.Path, layer: int, trace: Trace, other: Trace,
            steps: int, tallies: dict[str, Tally]) -> None:
    """The last steps of one layer, three times."""
    options = runtime.options
    total = trace["k"].shape[2]
    length, first = total - steps, total - trace["q"].shape[2]
    k, v = (np.ascontiguousarray(trace[x][layer].swapaxes(0, 1)) for x in "kv")
    q = np.ascontiguousarray(trace["q"][layer].swapaxes(0, 1))
    own = prompt(runtime, trace, layer, length)
    own.save_tables(folder / "same")
    foreign = prompt(runtime, other, layer, other["k"].shape[2])
    foreign.save_tables(folder / "foreign")
    batch = runtime.batch(1)
    batch.set(0, own)
    pools = {}
    block, group = 16, q.shape[1] // k.shape[1]
    blocks = (total + block - 1) // block
    for name, file in (("tables of the text", "same"), ("tables of the other text", "foreign")):
        pool = [np.zeros((blocks, block, *k.shape[1:]), np.float32) for _ in range(2)]
        pools[name] = runtime.paged([pool[0]], [pool[1]], max_tokens=total, max_requests=1,
                                    tables=folder / file)
        pools[name].write(0, np.arange(length), k[:length], v[:length])
    table = np.arange(blocks, dtype=np.int32)[None]
    for step in range(steps):
        at = length + step
        query = q[at - first][None]
        want = [exact(query[0, h], k[:at + 1, h // group], v[:at + 1, h // group],
                      options["softmax_scale"]) for h in range(q.shape[1])]
        batch.begin_step()
        report = batch.report(0, query)
        out = batch.attend(0, query, k[at:at + 1], v[at:at + 1], report=report)
        tallies["own index"].add(report, out[0], want, options["epsilon"], options["norm_floor"])
        for name, pool in pools.items():
            pool.write(0, np.array([at]), k[at:at + 1], v[at:at + 1])
            pool.begin_step(table, np.array([at + 1], np.int32), np.array([0, 1], np.int32),
                            np.zeros(1, np.int32), np.array([step == 0], np.int32), num_query_tokens=1)
            report = pool.report(0, query)
            out = pool.attend(0, query, report=report)
            tallies[name].add(report, out[0], want, options["epsilon"], options["norm_floor"])
    for pool in pools.values():
        pool.close()
    batch.close()


if __name__ == "__main__":
    main()
