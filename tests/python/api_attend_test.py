"""The package over numpy: attention against float64, arrays and their refusals."""

import unittest

import numpy as np
import vattn
from fixture import (
    DIM,
    KV_HEADS,
    Q_HEADS,
    TOKENS,
    Dlpack,
    Fixture,
    attend,
    queries,
    relative_error,
    rows,
)


class Attention(Fixture):
    def test_dense_equals_the_reference(self):
        runtime = self.runtime(policy="dense")
        batch = runtime.batch(2)
        kept = []
        for slot, tokens in enumerate((TOKENS, 700)):
            sequence, k, v = self.filled(runtime, tokens, seed=slot)
            batch.set(slot, sequence)
            kept.append((k, v))
        q, (k1, v1) = queries(2, 3), rows(1, 4)
        report = batch.report(0, q)
        out = self.step(batch, q, k1[0], v1[0], report)
        for slot, (k, v) in enumerate(kept):
            want = attend(q[slot], np.concatenate([k, k1]), np.concatenate([v, v1]))
            self.assertLess(relative_error(out[slot], want), 1e-5)
        self.assertTrue((report.verdict == vattn.Verdict.EXACT).all())
        middle = (
            TOKENS + 1 - 128
        ) // 64 * 64 - 16  # what has left the window is coded 64 tokens at a time
        self.assertEqual(report.middle.tolist(), [[middle] * KV_HEADS, [0] * KV_HEADS])

    def test_prefill(self):
        if self.runtime().options["backend"] == vattn.Backend.CUDA:
            self.skipTest("prefill is the CPU backend's")
        runtime = self.runtime(policy="dense")
        sequence = runtime.sequence()
        k, v = rows(500, 1)
        q = queries(500, 2)
        lse = np.empty((200, Q_HEADS), np.float32)
        out = np.concatenate(
            [
                sequence.prefill(0, q[:300], k[:300], v[:300]),
                sequence.prefill(0, q[300:], k[300:], v[300:], lse=lse),
            ]
        )
        for token in (0, 1, 255, 299, 300, 499):
            want = attend(q[token], k[: token + 1], v[: token + 1])
            self.assertLess(relative_error(out[token], want), 1e-5)
        self.assertTrue(np.isfinite(lse).all())
        self.assertEqual(sequence.length(), 500)
        for call, text in (
            (lambda: sequence.prefill(0, q[:3], k[:4], v[:4]), "q has 3 tokens, must have the 4"),
            (lambda: sequence.prefill(0, q[:4], k[:4], v[:3]), "v has 3 tokens, must have the 4"),
            (
                lambda: sequence.prefill(0, q[:4], k[:4], v[:4], lse=lse),
                r"lse has shape \[200, 6\], must be \[4, 6\]",
            ),
            (
                lambda: sequence.prefill(0, q[:4], k[:4], v[:4], out=np.zeros((4, 6, 32), np.int32)),
                "out has elements of i32, must be f32 or f16 or bf16",
            ),
        ):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, text):
                call()
        self.assertEqual(sequence.length(), 500)

    def test_several_query_tokens(self):
        for policy in ("dense", "verified"):
            runtime = self.runtime(policy=policy, epsilon=0.1)
            batch = runtime.batch(2)
            kept = []
            for slot, tokens in enumerate((TOKENS, 300)):
                sequence, k, v = self.filled(runtime, tokens, seed=slot)
                batch.set(slot, sequence)
                kept.append((k, v))
            q = np.stack([queries(5, 3), queries(5, 4)])
            k1, v1 = (np.stack(pair) for pair in zip(rows(5, 5), rows(5, 6)))
            report = batch.report(0, q, tokens=5)
            batch.begin_step(5)
            out = batch.attend(0, q, k1, v1, report=report)
            self.assertEqual(out.shape, q.shape)
            self.assertEqual(report.error.shape, (2, 5, Q_HEADS))
            self.assertEqual(report.selected.shape, (2, KV_HEADS))
            for slot, (k, v) in enumerate(kept):
                for token in range(5):
                    seen = token + 1
                    want = attend(
                        q[slot, token],
                        np.concatenate([k, k1[slot, :seen]]),
                        np.concatenate([v, v1[slot, :seen]]),
                    )
                    off = relative_error(out[slot, token], want)
                    self.assertLess(off, 1e-5 if policy == "dense" or slot == 1 else 0.3)
            batch.begin_step(2)
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "num_tokens is 5, must be 2"):
                batch.attend(0, q, k1, v1)
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "tokens of q is 17"):
                batch.attend(0, np.zeros((2, 17, Q_HEADS, DIM), np.float32), k1, v1)
            batch.abandon()

    def test_verified_reads_less_and_stays_within_its_bound(self):
        runtime = self.runtime(policy="verified", epsilon=0.1, delta=0.05, norm="output")
        batch = runtime.batch(1)
        sequence, k, v = self.filled(runtime)
        batch.set(0, sequence)
        misses = steps = 0
        for i in range(20):
            q, (k1, v1) = queries(1, 10 + i), rows(1, 50 + i)
            report = batch.report(0, q, "verdict", "error", "selected", "middle")
            out = self.step(batch, q, k1[0], v1[0], report)
            k, v = np.concatenate([k, k1]), np.concatenate([v, v1])
            want = attend(q[0], k, v)
            errors = np.linalg.norm(out[0] - want, axis=-1) / np.linalg.norm(want, axis=-1)
            verified = report.verdict[0] == vattn.Verdict.VERIFIED
            self.assertTrue((report.error[0][verified] <= 0.1).all())
            misses, steps = (
                misses + int((errors[verified] > 0.1).sum()),
                steps + int(verified.sum()),
            )
        self.assertIsNone(report.lse)
        self.assertGreater(steps, 60)
        self.assertLess(misses, 0.1 * steps)
        self.assertLess(runtime.stats().rows_selected, 0.7 * runtime.stats().rows_middle)

    def test_strided_rows_equal_contiguous_ones(self):
        runtime = self.runtime(policy="dense")
        k, v = rows(500, 1)
        by_head = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (k, v)]
        outs = []
        for prompt in ((k, v), by_head):
            sequence = runtime.sequence()
            sequence.append(0, prompt[0][:200], prompt[1][:200])
            sequence.append(0, prompt[0][200:], prompt[1][200:], q=queries(100, 2))
            self.assertEqual(sequence.length(), 500)
            batch = runtime.batch(1)
            batch.set(0, sequence)
            outs.append(self.step(batch, queries(1, 3), k[0], v[0]))
        np.testing.assert_array_equal(*outs)

    def test_half_types_and_the_type_of_the_output(self):
        k, v = rows(800, 1)
        q, new = queries(1, 2), rows(1, 3)
        want = attend(q[0], np.concatenate([k, new[0]]), np.concatenate([v, new[1]]))

        def bf16(x):  # round to nearest even; the bits as uint16
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

        for dtype, convert, tolerance in (
            ("f16", lambda x: x.astype(np.float16), 5e-3),
            ("bf16", bf16, 4e-2),
        ):
            runtime = self.runtime(policy="dense", dtype=dtype)
            sequence = runtime.sequence()
            sequence.append(0, convert(k), convert(v))
            batch = runtime.batch(1)
            batch.set(0, sequence)
            batch.begin_step()
            out = np.empty((1, Q_HEADS, DIM), np.float32)
            self.assertIs(batch.attend(0, *map(convert, (q, *new)), out=out), out)
            self.assertLess(relative_error(out[0], want), tolerance, dtype)

    def test_scores_of_the_caller(self):
        runtime = self.runtime(index="external", epsilon=0.1, delta=0.05, norm="output")
        sequence, k, v = self.filled(runtime)
        batch = runtime.batch(1)
        batch.set(0, sequence)
        q, (k1, v1) = queries(1, 2), rows(1, 3)
        group = Q_HEADS // KV_HEADS
        exact = np.stack([k[:, head // group] @ q[0, head] for head in range(Q_HEADS)])[None]
        report = batch.report(0, q, "verdict", "selected", "middle")
        batch.begin_step()
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "scores"):
            batch.attend(0, q, k1, v1)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "scores has shape"):
            batch.attend(0, q, k1, v1, scores=exact[:, :5].copy())
        scores = (exact / np.sqrt(DIM)).astype(np.float32)
        out = batch.attend(0, q, k1, v1, scores=scores, report=report)
        want = attend(q[0], np.concatenate([k, k1]), np.concatenate([v, v1]))
        self.assertLess(relative_error(out[0], want), 0.15)
        self.assertTrue((report.verdict == vattn.Verdict.VERIFIED).all())
        self.assertLess(report.selected.sum(), 0.5 * report.middle.sum())
        k, v = np.concatenate([k, k1]), np.concatenate([v, v1])
        scores = np.concatenate([scores, scores[..., :1]], -1).astype(np.float16)
        q, (k1, v1) = queries(1, 4), rows(1, 5)
        batch.begin_step()
        batch.attend(0, q, k1, v1, scores=scores, report=report)
        self.assertTrue((report.verdict != vattn.Verdict.EXACT).all())
        k, v = np.concatenate([k, k1]), np.concatenate([v, v1])
        batch.begin_step()
        out = batch.attend(0, q, k1, v1, dense=True, report=report)
        self.assertTrue((report.verdict == vattn.Verdict.EXACT).all())
        want = attend(q[0], np.concatenate([k, k1]), np.concatenate([v, v1]))
        self.assertLess(relative_error(out[0], want), 1e-4)

    def test_selection_of_the_library_attended_by_its_list(self):
        runtime = self.runtime(policy="verified", on_unverified="best_effort", max_looks=1)
        batch = runtime.batch(1)
        sequence, k, v = self.filled(runtime)
        batch.set(0, sequence)
        q, (k1, v1) = queries(1, 2), rows(1, 3)
        batch.begin_step()
        small = batch.selection(0, q, 8)
        with self.assertRaises(vattn.FullError) as full:
            batch.select(0, q, k1, v1, small)
        self.assertEqual(full.exception.status, vattn.Status.FULL)
        chosen = batch.selection(0, q, int(small.counts.max()))
        batch.select(0, q, k1, v1, chosen)
        batch.begin_step()
        out = batch.attend_selected(0, q, k1, v1, chosen)
        k, v = (np.concatenate([x, new]) for x, new in ((k, k1), (v, v1)))
        for head in range(Q_HEADS):
            shared = head // (Q_HEADS // KV_HEADS)
            count = chosen.counts[0, shared]
            tokens = chosen.tokens[0, shared, :count]
            s = (
                k[tokens, shared] @ q[0, head] / np.sqrt(DIM)
                + chosen.log_weights[0, shared, :count]
            )
            p = np.exp(s - s.max())
            want = p @ v[tokens, shared] / p.sum()
            self.assertLess(np.linalg.norm(out[0, head] - want) / np.linalg.norm(want), 1e-4)


class Arrays(Fixture):
    def test_dlpack(self):
        runtime = self.runtime(policy="dense")
        k, v = rows(600, 1)
        outs = []
        for wrap in (lambda x: x, Dlpack):
            sequence = runtime.sequence()
            sequence.append(0, wrap(k.swapaxes(0, 1).copy().swapaxes(0, 1)), wrap(v))
            batch = runtime.batch(1)
            batch.set(0, sequence)
            batch.begin_step()
            out = np.empty((1, Q_HEADS, DIM), np.float32)
            batch.attend(
                0,
                *map(
                    wrap,
                    (
                        queries(1, 2),
                        k[:1],
                        v[:1],
                    ),
                ),
                out=wrap(out),
            )
            outs.append(out)
        np.testing.assert_array_equal(*outs)
        batch.begin_step()
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "outputs .* must be given"):
            batch.attend(0, *map(Dlpack, (queries(1, 2), k[:1], v[:1])))
        read_only = np.empty((1, Q_HEADS, DIM), np.float32)
        read_only.flags.writeable = False
        for out in (read_only, Dlpack(read_only)):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "out is read-only"):
                batch.attend(0, queries(1, 2), k[:1], v[:1], out=out)

    def test_device_memory_is_refused_by_a_cpu_runtime(self):
        class OnDevice:
            __cuda_array_interface__ = {
                "shape": (1, Q_HEADS, DIM),
                "typestr": "<f4",
                "data": (4096, False),
                "version": 3,
                "stream": 2,
            }

        runtime = self.runtime()
        batch = runtime.batch(1)
        with self.assertRaisesRegex(
            vattn.InvalidArgumentError, "q is on cuda:0, must be in host memory"
        ):
            batch.attend(0, OnDevice())

    def test_refusals(self):
        runtime = self.runtime()
        batch = runtime.batch(1)
        sequence, k, v = self.filled(runtime, 50)
        q = queries(1, 1)
        cases = [
            (
                lambda: sequence.append(0, k[:, :1], v),
                r"k has shape \[50, 1, 32\], must be \[tokens, 2, 32\]",
            ),
            (lambda: sequence.append(0, k, v[:7]), "v has 7 tokens, must have the 50 of k"),
            (lambda: sequence.append(0, k.astype(np.float64), v), "k has elements of type <f8"),
            (
                lambda: sequence.append(0, k.astype(np.float16), v),
                "k has elements of f16, must be f32",
            ),
            (
                lambda: sequence.append(0, k.swapaxes(1, 2).copy().swapaxes(1, 2), v),
                "must have 1 for the last",
            ),
            (lambda: sequence.append(1, k, v), "layer is 1, must be 0 to 0"),
            (lambda: sequence.append(0, [1.0], v), "k is a list"),
            (lambda: sequence.append(0, k), "v is NULL"),
            (
                lambda: batch.attend(0, q[:, :5].copy(), k[:1], v[:1]),
                r"q has shape \[1, 5, 32\], must be \[1, 6, 32\]",
            ),
            (lambda: batch.attend(0, q[..., ::-1], k[:1], v[:1]), "must be contiguous"),
            (
                lambda: batch.attend(
                    0, q, k[:1], v[:1], report=vattn.Report(verdict=np.zeros((1, 6), np.int64))
                ),
                "report.verdict has elements of i64, must be i32",
            ),
            (lambda: batch.attend(0, q, k[:1], v[:1]), "step"),
            (lambda: batch.set(3, sequence), "slot is 3"),
            (lambda: batch.begin_step(17), "new_tokens is 17"),
            (lambda: runtime.batch(0), "slots is 0"),
            (lambda: self.runtime(epsilon=-1.0), "epsilon is -1"),
            (lambda: self.runtime(epsilom=0.1), "epsilom"),
            (lambda: self.runtime(policy="best"), "policy"),
        ]
        for call, text in cases:
            with self.assertRaisesRegex(vattn.InvalidArgumentError, text) as refused:
                call()
            self.assertIsInstance(refused.exception, ValueError)


if __name__ == "__main__":
    unittest.main()
