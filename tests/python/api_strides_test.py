"""Arrays that C cannot be told as they are: broadcast, reversed, masked, of other protocols."""

import unittest

import numpy as np
import vattn
from fixture import DIM, KV_HEADS, Dlpack, Fixture, attend, queries, relative_error, rows

TOKENS = 400


def strided(dtype=np.float32):
    """Name -> rows [TOKENS, KV_HEADS, DIM] whose strides are 0, negative or otherwise odd."""
    rng = np.random.default_rng(1)

    def random(*shape):
        return rng.standard_normal(shape).astype(dtype)

    one_head, one_token = random(TOKENS, 1, DIM), random(1, KV_HEADS, DIM)
    full, shape = random(TOKENS, KV_HEADS, DIM), (TOKENS, KV_HEADS, DIM)
    long = random(TOKENS + DIM)
    return {
        "over heads": np.broadcast_to(one_head, shape),
        "over tokens": np.broadcast_to(one_token, shape),
        "over both": np.broadcast_to(random(1, 1, DIM), shape),
        "reversed tokens": full[::-1],
        "reversed heads": full[:, ::-1],
        "reversed and broadcast": np.broadcast_to(one_head[::-1], shape),
        "every other token": random(2 * TOKENS, KV_HEADS, DIM)[::2],
        "overlapping": np.lib.stride_tricks.as_strided(
            long, shape, (long.itemsize, 0, long.itemsize)
        ),
    }


class Strides(Fixture):
    def answer(self, k, v, q=None):
        runtime = self.runtime(policy="dense")
        sequence = runtime.sequence()
        sequence.append(0, k, v, q)
        batch = runtime.batch(1)
        batch.set(0, sequence)
        batch.begin_step(0)
        return batch.attend(0, queries(1, 3))[0]

    def test_keys_and_values_count_as_numpy_reads_them(self):
        full = rows(TOKENS, 2)[0]
        for name, array in strided().items():
            for k, v in ((array, full), (full, array), (array, array)):
                with self.subTest(name):
                    want = attend(queries(1, 3)[0], np.array(k), np.array(v))
                    self.assertLess(relative_error(self.answer(k, v), want), 1e-5)

    def test_one_token_and_one_head(self):
        """The stride of an extent of 1 means nothing; numpy may keep any there."""
        k, v = rows(TOKENS, 2)
        runtime = self.runtime(policy="dense")
        sequence = runtime.sequence()
        for token in range(TOKENS):
            sequence.append(
                0, k[::-1][TOKENS - 1 - token :][:1], np.broadcast_to(v[token], v[:1].shape)
            )
        batch = runtime.batch(1)
        batch.set(0, sequence)
        batch.begin_step(0)
        out = batch.attend(0, queries(1, 3))[0]
        self.assertLess(relative_error(out, attend(queries(1, 3)[0], k, v)), 1e-5)

    def test_queries(self):
        """The index is calibrated on them: the same as on a contiguous copy, bit by bit."""
        k, v = rows(3000, 2)
        base = queries(256, 5)
        for q in (np.broadcast_to(base[:, :1], base.shape), base[::-1], base[:, ::-1]):
            outs = []
            for given in (q, q.copy()):
                runtime = self.runtime(policy="topk", topk_share=0.02)
                sequence = runtime.sequence(id=9)
                sequence.append(0, k, v, given)
                batch = runtime.batch(1)
                batch.set(0, sequence)
                batch.begin_step(0)
                outs.append(batch.attend(0, queries(1, 3)))
            np.testing.assert_array_equal(*outs)

    def test_a_row_broadcast_far_past_its_array(self):
        one = np.ones((1, KV_HEADS, DIM), np.float32)
        far = np.broadcast_to(one, (100_000, KV_HEADS, DIM))
        np.testing.assert_allclose(self.answer(far, far), 1, rtol=1e-5)

    def test_what_cannot_be_copied_is_refused(self):
        runtime = self.runtime()
        sequence = runtime.sequence()
        full = rows(TOKENS, 2)[0]
        far = np.broadcast_to(full[:1], full.shape).view()
        far.flags.writeable = True
        for array in (far, full[::-1]):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "k has strides .* positive"):
                sequence.append(0, Dlpack(array), full)
        self.assertEqual(sequence.length(), 0)

    def test_arrays_of_a_step_are_contiguous_or_refused(self):
        runtime = self.runtime(policy="dense")
        sequence, k, v = self.filled(runtime, TOKENS)
        batch = runtime.batch(2)
        q = queries(2, 3)
        good = {"q": q, "k_new": k[:2], "v_new": v[:2], "out": np.empty_like(q)}
        for name, array in good.items():
            wide = np.broadcast_to(array[:1], array.shape)
            heads = np.broadcast_to(array[:, :1], array.shape)
            for bad in (wide, heads, array[::-1], array[..., ::-1]):
                given = good | {name: bad}
                with self.assertRaisesRegex(vattn.InvalidArgumentError, f"{name} .* contiguous"):
                    batch.attend(0, given["q"], given["k_new"], given["v_new"], out=given["out"])


class Meaning(Fixture):
    """Arrays that say more than their numbers, which C would not hear."""

    def test_masked_arrays_are_refused(self):
        runtime = self.runtime()
        sequence = runtime.sequence()
        k, v = rows(TOKENS, 2)
        batch = runtime.batch(1)
        hidden = np.ma.masked_array(k, mask=np.zeros_like(k, bool))
        hidden[5] = np.ma.masked
        for given in ((hidden, v), (k, hidden), (k, v, np.ma.masked_array(queries(9, 1)))):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "is a masked array"):
                sequence.append(0, *given)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "q is a masked array"):
            batch.attend(0, np.ma.masked_array(queries(1, 1)), k[:1], v[:1])
        ids = np.ma.masked_array(np.arange(TOKENS, dtype=np.int32))
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "tokens is a masked array"):
            sequence.save_prefix(b"a", ids)

        class Masked:
            __array_interface__ = k.__array_interface__ | {"mask": k > 0}

        with self.assertRaisesRegex(vattn.InvalidArgumentError, "k is a masked array"):
            sequence.append(0, Masked(), v)

    def test_structures_and_objects_without_an_address(self):
        runtime = self.runtime(dtype="bf16")
        sequence = runtime.sequence()
        pairs = np.zeros((TOKENS, KV_HEADS, DIM), [("low", "u1"), ("high", "u1")])
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "k has elements of type .*low"):
            sequence.append(0, pairs, pairs)

        class Buffer:
            __array_interface__ = {"shape": (1, 2, 32), "typestr": "<u2", "data": b"", "version": 3}

        with self.assertRaisesRegex(vattn.InvalidArgumentError, "k says no address"):
            sequence.append(0, Buffer(), Buffer())


if __name__ == "__main__":
    unittest.main()
