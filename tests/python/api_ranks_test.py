"""One context over several ranks, with arrays of numpy."""

import unittest

import numpy as np
import vattn
from fixture import DIM, OPTIONS, Q_HEADS, attend, queries, relative_error, rows

RANKS = 3


class Ranks(unittest.TestCase):
    def setUp(self):
        self.k, self.v = rows(9000, 1)
        self.new_k, self.new_v = rows(1, 2)
        self.q = queries(1, 3)
        self.batches = []
        for part in np.array_split(np.arange(len(self.k)), RANKS):
            runtime = vattn.Runtime(**OPTIONS)
            self.addCleanup(runtime.close)
            sequence = runtime.sequence()
            sequence.append(0, self.k[part], self.v[part], queries(100, 4))
            batch = runtime.batch(1)
            batch.set(0, sequence)
            self.batches.append(batch)
        self.partials = [batch.partial(0, self.q) for batch in self.batches]

    def forecast(self):
        for rank, batch in enumerate(self.batches):
            last = rank == RANKS - 1
            new = (self.new_k, self.new_v) if last else (None, None)
            batch.begin_step(int(last))
            batch.attend(0, self.q, *new, partial=self.partials[rank], rank=rank, ranks=RANKS)

    def answer(self):
        """The answers and reports of all ranks, and the records that led to them."""
        self.forecast()
        again = np.ones(1, np.int32)
        while again[0] > 0:
            gathered = np.stack(self.partials)
            reports = [batch.report(0, self.q) for batch in self.batches]
            out = [
                batch.attend_more(
                    0, gathered, self.partials[rank], rank=rank, again=again, report=reports[rank]
                )
                for rank, batch in enumerate(self.batches)
            ]
        return out, reports, gathered

    def test_ranks_answer_alike(self):
        out, reports, gathered = self.answer()
        want = attend(
            self.q[0], np.concatenate([self.k, self.new_k]), np.concatenate([self.v, self.new_v])
        )
        self.assertLess(relative_error(out[0][0], want), 0.2)
        for other, report in zip(out, reports):
            np.testing.assert_array_equal(other, out[0])
            np.testing.assert_array_equal(report.error, reports[0].error)
        self.assertEqual(gathered.shape, (RANKS, 1, Q_HEADS, vattn.Partial.SCALARS + 2 * DIM))
        np.testing.assert_array_equal(
            gathered[:, 0, 0, vattn.Partial.RANK], np.arange(RANKS, dtype=np.float32)
        )
        if np.all(reports[0].verdict == vattn.Verdict.VERIFIED):
            report = vattn.Report(
                lse=np.empty((1, Q_HEADS), np.float32), verdict=np.empty((1, Q_HEADS), np.int32)
            )
            merged = self.batches[0].runtime.merge(gathered, report=report)
            np.testing.assert_allclose(merged, out[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(report.lse, reports[0].lse, rtol=1e-5)
            np.testing.assert_array_equal(report.verdict, reports[0].verdict)

    def test_errors(self):
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "partial has shape"):
            self.batches[0].begin_step(0)
            self.batches[0].attend(0, self.q, partial=self.partials[0][:, 1:], rank=0, ranks=2)
        self.forecast()
        gathered = np.stack(self.partials)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "rank is 1 of 3, must be as"):
            self.batches[0].attend_more(0, gathered, self.partials[0], rank=1)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, r"gathered\[1\].*is of version"):
            self.batches[0].attend_more(0, gathered[[0, 2, 1]], self.partials[0], rank=0)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "records have shape"):
            self.batches[0].runtime.merge(gathered[..., 1:])


if __name__ == "__main__":
    unittest.main()
