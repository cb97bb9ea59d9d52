"""The vLLM plug-in's pages, plans and layers, driven by metadata as vLLM makes it; vLLM is not needed.

VATTN_BACKEND=cuda runs them on a device.
"""

import tempfile
import unittest

import numpy as np
import torch
import vattn
from vattn.vllm._options import Options
from vattn.vllm._pages import Page
from vattn.vllm._requests import RequestRows
from vllm_engine import DEVICE, DIM, DTYPE, KV_HEADS, LAYERS, Q_HEADS, Engine, Request, normal

EXACT = 2e-5 if DTYPE == torch.float32 else 2e-2
ROWS = ("page", "pool") if DEVICE.type == "cpu" else ("auto",)


def text(seed, tokens):
    return np.random.default_rng(seed).integers(0, 256, tokens, np.uint8).tobytes()


class Steps(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.tables = f"{cls.folder.name}/tables"
        with vattn.Runtime(
            backend="cpu",
            num_layers=LAYERS,
            num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS,
            head_dim_k=DIM,
            head_dim_v=DIM,
            dtype=DTYPE,
        ) as runtime:
            sequence, words = runtime.sequence(), text(99, 2048)
            for layer in range(LAYERS):
                k, v = (normal(words, 2048, KV_HEADS, layer, what) for what in "kv")
                sequence.append(layer, k, v, 3 * normal(words, 2048, Q_HEADS, layer, "q"))
            sequence.save_tables(cls.tables)

    def engine(self, blocks, **arguments):
        engine = Engine(blocks, **arguments)
        self.addCleanup(engine.pool.close)
        return engine

    def prefill(self, engine, request, chunk=500):
        """Computes a prompt in chunks."""
        worst = 0.0
        while request.computed < request.prompt:
            tokens = min(chunk, request.prompt - request.computed)
            worst = max(worst, engine.step([(request, tokens)])[request.name])
        self.assertLess(worst, EXACT)

    def test_requests_decode_together_exactly(self):
        for rows in ROWS:
            for named in (False, True):
                engine = self.engine(60, rows=rows, named=named, policy="dense")
                one, two = (Request(str(n), text(n, 700), 600 - 200 * n) for n in (0, 1))
                for request in (one, two):
                    engine.admit(request)
                    self.prefill(engine, request)
                for queries in ((1, 1), (3, 1), (2, 4)):
                    errors = engine.step([(one, queries[0]), (two, queries[1])])
                    self.assertLess(max(errors.values()), EXACT)
                stats = engine.pool.runtime.stats()
                self.assertEqual(stats.steps, 2 * 3 * LAYERS)
                self.assertEqual(stats.requests_refused, 0)

    def test_a_prompt_beside_decoding_requests(self):
        """Also where it stands between them, and where its chunk is shorter than what decodes."""
        for rows in ROWS:
            engine = self.engine(60, rows=rows, policy="dense")
            one, two = (Request(str(n), text(n, 500), 300) for n in (0, 1))
            for request in (one, two):
                engine.admit(request)
                self.prefill(engine, request)
            new = Request("new", text(5, 400), 203)
            engine.admit(new)
            for tokens in (100, 100, 3):
                errors = engine.step([(one, 1), (new, tokens), (two, 2)])
                self.assertLess(max(errors.values()), EXACT, tokens)
                self.assertEqual(len(engine.plan.prompts), 1)
                self.assertEqual(engine.plan.queries, 3)
            errors = engine.step([(new, 1), (two, 1), (one, 1)])
            self.assertLess(max(errors.values()), EXACT)
            self.assertFalse(engine.plan.prompts)

    def test_verified_steps_over_shared_and_reused_blocks(self):
        for rows in ROWS:
            engine = self.engine(150, rows=rows, tables=self.tables, epsilon=0.2, window=32)
            words = text(7, 2000)
            first = Request("first", words + text(8, 60), 2000)
            engine.admit(first)
            self.prefill(engine, first)
            second = Request("second", words[:1920] + text(9, 140), 1990)
            engine.admit(second)
            self.assertEqual(second.computed, 1920)
            self.prefill(engine, second)
            errors = [engine.step([(first, 1), (second, 1)]) for _ in range(6)]
            # Speculation: of four tokens one is kept, and others are written over the rest.
            engine.step([(first, 4), (second, 1)])
            first.computed -= 3
            first.text = first.text[: first.computed] + text(10, 40)
            errors += [engine.step([(first, 1), (second, 1)]) for _ in range(6)]
            # Preemption: its blocks are given away, and it is computed again.
            engine.release(second)
            third = Request("third", text(11, 1200), 1100)
            engine.admit(third)
            self.prefill(engine, third)
            engine.release(third)
            engine.admit(second)
            self.prefill(engine, second)
            errors += [engine.step([(second, 1), (first, 1)]) for _ in range(6)]
            worst = np.array([max(error.values()) for error in errors])
            self.assertLess(np.median(worst), 0.2)
            self.assertLess(worst.max(), 1.0)
            stats = engine.pool.runtime.stats()
            self.assertGreater(stats.heads_verified, 0)
            self.assertLess(stats.rows_selected, stats.rows_middle)
            self.assertEqual(stats.requests_refused, 0)

    @unittest.skipUnless(DEVICE.type == "cuda", "graphs are of CUDA: VATTN_BACKEND=cuda")
    def test_a_captured_step_serves_later_ones(self):
        engine = self.engine(150, named=True, tables=self.tables, epsilon=0.2, window=32)
        requests = [Request(str(n), text(n + 20, 1500), 1400 + 20 * n) for n in (0, 1)]
        for request in requests:
            engine.admit(request)
            self.prefill(engine, request)
        work = [(request, 1) for request in requests]
        static, slots, rows = engine.metadata(work)
        plan = engine.planner.plan(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = engine.compute(plan, slots, rows)
        errors = []
        for _ in range(12):
            told, new_slots, new_rows = engine.metadata(work)
            for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
                getattr(static, name).copy_(getattr(told, name))
            slots.copy_(new_slots)
            for old, new in zip(rows, new_rows):
                for to, of in zip(old, new):
                    to.copy_(of)
            engine.planner.plan(told)
            graph.replay()
            errors.append(max(engine.finish(work, told, [one.cpu() for one in answers]).values()))
        self.assertLess(np.median(errors), 0.2)
        self.assertLess(max(errors), 1.0)
        stats = engine.pool.runtime.stats()
        self.assertGreater(stats.heads_verified, 0)
        self.assertEqual(stats.requests_refused, 0)

    def test_many_requests_come_and_go(self):
        """A random schedule over a pool for a third of what it is asked for."""
        rng = np.random.default_rng(3)
        engine = self.engine(26, max_requests=4, policy="dense")
        waiting = [Request(str(n), text(n % 3, 100) + text(n + 50, 300), 150 + 20 * n) for n in range(9)]
        running, preempted = [], 0
        while waiting or running:
            if waiting and len(running) < 4 and len(engine.free) > 6:
                running.append(waiting.pop(0))
                engine.admit(running[-1])
            work = []
            for request in list(running):
                left = request.prompt - request.computed
                tokens = min(left, int(rng.integers(1, 90))) if left > 0 else int(rng.integers(1, 5))
                tokens = min(tokens, len(request.text) - request.computed)
                need = -(-(request.computed + tokens) // 32) - len(request.blocks)
                while need > len(engine.free) and running[-1] is not request:
                    victim = running.pop()
                    work = [(one, n) for one, n in work if one is not victim]
                    engine.release(victim)
                    waiting.insert(0, victim)
                    preempted += 1
                if request in running and need <= len(engine.free):
                    engine.free, taken = engine.free[need:], engine.free[:need]
                    for block in taken:
                        engine.cached = {t: b for t, b in engine.cached.items() if b != block}
                        engine.uses[block] = 1
                    request.blocks += taken
                    work.append((request, tokens))
            rng.shuffle(work)
            if work:
                errors = engine.step(work)
                self.assertLess(max(errors.values()), EXACT)
            for request in list(running):
                if request.computed == len(request.text):
                    running.remove(request)
                    engine.release(request)
        self.assertGreater(preempted, 0)

    def test_a_rank_answers_as_all_heads_do(self):
        """Tensor parallelism: each rank has a pool with its own heads; answers have the same bits."""
        verified = {"tables": self.tables, "epsilon": 0.2, "window": 32, "exact_below": 64}
        group = Q_HEADS // KV_HEADS
        for options in ({"policy": "dense"}, verified):
            answers = []
            for heads in ((0, 2), (0, 1), (1, 2)):
                engine = self.engine(50, heads=heads, **options)
                request = Request("one", text(1, 1300), 1250)
                engine.admit(request)
                self.prefill(engine, request, 625)
                answers.append([])
                for tokens in (3, 1, 1):
                    engine.step([(request, tokens)])
                    answers[-1] += engine.answers
                stats = engine.pool.runtime.stats()
                self.assertEqual(stats.heads_verified > 0, options is verified)
            for whole, first, second in zip(*answers):
                self.assertTrue(torch.equal(whole[:, :group], first))
                self.assertTrue(torch.equal(whole[:, group:], second))


class Pages(unittest.TestCase):
    def page(self, options, on_cpu=True):
        return Page.of(
            options, heads=2, tokens=32, head_dim_k=64, head_dim_v=64, dtype=torch.bfloat16, on_cpu=on_cpu
        )

    def test_what_vllm_counts(self):
        dense = {"policy": "dense"}
        self.assertEqual(self.page(Options()).state_bytes, 256 + 32)
        self.assertEqual(self.page(Options(), on_cpu=False).state_bytes, 32)
        self.assertEqual(self.page(Options(runtime=dense)).state_bytes, 256)
        self.assertEqual(self.page(Options(rows="pool", runtime=dense)).state_bytes, 16)
        with self.assertRaisesRegex(ValueError, "rows is page, must be pool or auto on CUDA"):
            self.page(Options(rows="page"), on_cpu=False)

    def test_too_little_host_memory(self):
        page = self.page(Options(rows="pool"))
        with self.assertRaisesRegex(ValueError, "--num-gpu-blocks-override 3"):
            page.host_rows(2, 5, 3 * 2 * 2 * 32 * 256)


class Rows(unittest.TestCase):
    def test_a_request_keeps_its_row_while_it_moves(self):
        rows = RequestRows(3, 16)
        table = np.array([[5, 6, 0], [7, 8, 9]], np.int32)
        one, new = rows.find(table, np.array([17, 40]), np.array([1, 1]))
        self.assertEqual(new.tolist(), [1, 1])
        # Moved within the batch; the first has grown by a block.
        table = np.array([[7, 8, 9], [5, 6, 0]], np.int32)
        two, new = rows.find(table, np.array([41, 18]), np.array([1, 1]))
        self.assertEqual((two.tolist(), new.tolist()), ([one[1], one[0]], [0, 0]))

    def test_drafts_that_were_rejected_leave_the_block(self):
        rows = RequestRows(2, 16)
        one, _ = rows.find(np.array([[3, 4]], np.int32), np.array([18]), np.array([4]))
        two, new = rows.find(np.array([[3, 9]], np.int32), np.array([17]), np.array([2]))
        self.assertEqual((two.tolist(), new.tolist()), (one.tolist(), [0]))

    def test_two_requests_behind_one_shared_block(self):
        rows = RequestRows(4, 16)
        rows.find(np.array([[3, 0]], np.int32), np.array([16]), np.array([1]))
        both = np.array([[3, 4], [3, 5]], np.int32)
        found, new = rows.find(both, np.array([17, 17]), np.array([1, 1]))
        self.assertNotEqual(found[0], found[1])
        self.assertEqual(new.tolist(), [0, 1])

    def test_the_newer_runner_names_them(self):
        rows = RequestRows(4, 16)
        named = np.array([2, 1])
        self.assertEqual(rows.named(named, np.array([True, False]))[1].tolist(), [1, 1])
        self.assertEqual(rows.named(named, np.array([False, False]))[1].tolist(), [1, 0])
        self.assertEqual(rows.named(named, np.array([False, False]))[1].tolist(), [0, 0])
        self.assertEqual(rows.named(named, np.array([False, True]))[1].tolist(), [0, 1])
        self.assertEqual(rows.named(named, np.array([False, False]))[1].tolist(), [0, 1])


if __name__ == "__main__":
    unittest.main()
