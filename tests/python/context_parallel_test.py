"""examples/context_parallel.py over processes: they answer as one, and a lost one is an error."""

import argparse
import datetime
import os
import pathlib
import socket
import sys
import tempfile
import time
import unittest

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import context_parallel

TOKENS = 12288
STEPS = 3
SECONDS = 60  # in which a rank notices that another one is lost


def arguments_for(policy):
    return argparse.Namespace(
        device="cpu",
        dtype=torch.float32,
        q_heads=4,
        kv_heads=2,
        head_dim=64,
        epsilon=0.1,
        seed=0,
        most_steps=64,
        policy=policy,
    )


def answers(policy, rank, ranks):
    """The answers of STEPS steps, [STEPS, q_heads, dim], and the exact ones."""
    rows = context_parallel.Rows(arguments_for(policy), torch.device("cpu"))
    begin, end = context_parallel.slice_of(TOKENS, rank, ranks)
    part = context_parallel.Slice(arguments_for(policy), rows, 1, begin, end, rank, ranks)
    out, exact = [], []
    for step in range(STEPS):
        q = rows.queries(step, 1)
        part.begin()
        out.append(part.attend(0, q, *rows.new(step))[0].clone())
        if part.last:
            part.held.append(rows.new(step))
        exact.append(context_parallel.merge_exact(*part.exact(q), ranks)[0])
    part.close()
    return torch.stack(out), torch.stack(exact)


def join(rank, ranks, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=SECONDS)
    )


def answer(rank, ranks, port, folder):
    join(rank, ranks, port)
    result = {policy: answers(policy, rank, ranks) for policy in ("dense", "verified")}
    torch.save(result, f"{folder}/{rank}")
    dist.destroy_process_group()


def lose(rank, ranks, port, folder):
    """The last rank ends in the middle of a step; the others say how long they waited for it."""
    join(rank, ranks, port)
    arguments = arguments_for("verified")
    rows = context_parallel.Rows(arguments, torch.device("cpu"))
    begin, end = context_parallel.slice_of(TOKENS, rank, ranks)
    part = context_parallel.Slice(arguments, rows, 1, begin, end, rank, ranks)
    part.begin()
    part.attend(0, rows.queries(0, 1), *rows.new(0))
    dist.barrier()
    if part.last:
        os._exit(3)
    started = time.monotonic()
    part.begin()
    try:
        part.attend(0, rows.queries(1, 1), *rows.new(1))
    except RuntimeError:
        waited = time.monotonic() - started
        # The step is given up, and the slice can be saved or used elsewhere.
        part.batch.abandon()
        tokens = part.sequence.length(0)
        torch.save({"waited": waited, "tokens": tokens, "held": end - begin}, f"{folder}/{rank}")
    os._exit(0)


class Processes(unittest.TestCase):
    def run_ranks(self, target, ranks):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=target, args=(rank, ranks, port, folder.name))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            self.assertIsNotNone(process.exitcode, "a rank hangs")
        return folder.name, [process.exitcode for process in processes]

    def test_ranks_answer_as_one(self):
        alone = {policy: answers(policy, 0, 1) for policy in ("dense", "verified")}
        for ranks in (2, 4, 8):
            with self.subTest(ranks=ranks):
                folder, codes = self.run_ranks(answer, ranks)
                self.assertEqual(codes, [0] * ranks)
                results = [torch.load(f"{folder}/{rank}") for rank in range(ranks)]
                for policy in ("dense", "verified"):
                    out, exact = results[0][policy]
                    for result in results:
                        self.assertTrue(torch.equal(result[policy][0], out), policy)
                    # The same rows and queries, whoever holds them.
                    self.assertLess(float((exact - alone[policy][1]).abs().max()), 1e-5)
                    scale = exact.norm(dim=-1)
                    error = (out.double() - exact).norm(dim=-1) / scale
                    limit = 1e-5 if policy == "dense" else 0.2
                    self.assertLess(float(error.max()), limit, policy)

    def test_a_lost_rank_is_an_error(self):
        folder, codes = self.run_ranks(lose, 3)
        self.assertEqual(codes, [0, 0, 3])
        for rank in range(2):
            said = torch.load(f"{folder}/{rank}")
            self.assertLess(said["waited"], SECONDS + 10)
            self.assertEqual(said["tokens"], said["held"])


if __name__ == "__main__":
    unittest.main()
