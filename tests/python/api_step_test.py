"""Steps that end half way: given up, they leave nothing behind."""

import unittest

import numpy as np
import vattn
from fixture import Fixture, queries, rows

LAYERS, TOKENS = 3, 1500


class Abandoned(Fixture):
    def setUp(self):
        self.queries = [queries(2, 20 + layer) for layer in range(LAYERS)]
        self.new = [rows(2, 30 + layer) for layer in range(LAYERS)]

    def batch(self):
        """Two sequences of LAYERS layers with random numbers of their own, in a batch."""
        runtime = self.runtime(num_layers=LAYERS, on_unverified="best_effort", seed=7)
        sequences = [runtime.sequence(id=number) for number in (1, 2)]
        batch = runtime.batch(2)
        for slot, sequence in enumerate(sequences):
            for layer in range(LAYERS):
                sequence.append(layer, *rows(TOKENS, 10 * slot + layer))
            sequence.build_index()
            batch.set(slot, sequence)
        return batch, sequences

    def whole_step(self, batch):
        batch.begin_step()
        return [batch.attend(n, self.queries[n], *self.new[n]) for n in range(LAYERS)]

    def test_the_step_begun_anew_answers_the_same(self):
        want = self.whole_step(self.batch()[0])
        for attended, interrupt in ((0, ValueError), (2, KeyboardInterrupt), (LAYERS, None)):
            batch, sequences = self.batch()
            try:
                batch.begin_step()
                for layer in range(LAYERS):
                    if layer == attended:
                        raise interrupt
                    batch.attend(layer, 2 * self.queries[layer], *self.new[layer][::-1])
            except (ValueError, KeyboardInterrupt):
                pass
            batch.abandon()
            for sequence in sequences:
                lengths = [sequence.length(layer) for layer in range(LAYERS)]
                self.assertEqual(lengths, [TOKENS] * LAYERS)
            np.testing.assert_array_equal(self.whole_step(batch), want)
            self.assertEqual(sequences[1].length(LAYERS - 1), TOKENS + 1)

    def test_without_it_a_half_step_is_in_the_way_and_says_so(self):
        batch, _ = self.batch()
        batch.begin_step()
        batch.attend(0, self.queries[0], *self.new[0])
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "layer 1 was not attended"):
            batch.begin_step()
        batch.abandon()
        self.whole_step(batch)

    def test_without_an_open_step_nothing_is_done(self):
        batch, sequences = self.batch()
        batch.abandon()
        self.whole_step(batch)
        batch.abandon()
        batch.abandon()
        self.assertEqual(sequences[0].length(), TOKENS)
        batch.close()
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "Batch is closed"):
            batch.abandon()


if __name__ == "__main__":
    unittest.main()
