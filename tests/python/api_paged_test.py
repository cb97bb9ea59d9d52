"""A pool of KV blocks of the caller's: attention by its block tables, and refusals by name."""

import gc
import tempfile
import unittest
import weakref

import numpy as np
import vattn
from fixture import DIM, KV_HEADS, Q_HEADS, Dlpack, Fixture, attend, queries, relative_error, rows

BLOCKS, BLOCK = 200, 16
MAX_TOKENS = 1600
ENTRIES = MAX_TOKENS // BLOCK


class Paged(Fixture):
    def paged(self, runtime, packed=True, **arguments):
        """A pool, and views k and v [blocks, block, heads, dim] of it."""
        if packed:  # as vLLM has it: [blocks, heads, tokens, K and V]
            whole = np.zeros((BLOCKS, KV_HEADS, BLOCK, 2 * DIM), np.float32)
            k, v = (half.transpose(0, 2, 1, 3) for half in (whole[..., :DIM], whole[..., DIM:]))
        else:
            k, v = np.zeros((2, BLOCKS, BLOCK, KV_HEADS, DIM), np.float32)
        chosen = {"max_tokens": MAX_TOKENS, "max_requests": 4, "max_query_tokens": 4} | arguments
        pool = runtime.paged([k], [v], **chosen)
        self.addCleanup(pool.close)
        return pool, k, v

    def tables(self, runtime, model=""):
        """A file of tables learnt from random rows."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        sequence = runtime.sequence()
        sequence.append(0, *rows(3000, 5), queries(3000, 6))
        sequence.save_tables(f"{folder.name}/tables", model)
        return f"{folder.name}/tables"

    def request(self, pool, tokens, seed, blocks):
        """Rows of a request, written to these blocks."""
        k, v = rows(tokens, seed)
        places = np.arange(tokens)
        slots = np.asarray(blocks, np.int64)[places // BLOCK] * BLOCK + places % BLOCK
        pool.write(0, slots, k, v)
        return k, v

    def step(self, pool, requests, numbers, **arguments):
        """Opens a step for [(blocks, length, query tokens)]."""
        table = np.full((len(requests), ENTRIES), -1, np.int32)
        for row, (blocks, _, _) in zip(table, requests):
            row[: len(blocks)] = blocks
        lengths = np.array([length for _, length, _ in requests], np.int32)
        starts = np.cumsum([0, *(tokens for _, _, tokens in requests)], dtype=np.int32)
        pool.begin_step(table, lengths, starts, np.asarray(numbers, np.int32), **arguments)
        return int(starts[-1])


class Answers(Paged):
    def test_requests_of_any_number_of_query_tokens(self):
        for packed in (True, False):
            for policy in ("dense", "verified"):
                runtime = self.runtime(policy=policy, epsilon=0.05, window=32)
                tables = {} if policy == "dense" else {"tables": self.tables(runtime)}
                pool, _, _ = self.paged(runtime, packed, **tables)
                blocks = np.random.default_rng(3).permutation(BLOCKS)
                first, second = blocks[:90], blocks[100:110]
                given = [self.request(pool, n, n, b) for n, b in ((1430, first), (150, second))]
                asked = [(first, 1430, 3), ([], 0, 0), (second, 150, 1)]
                tokens = self.step(pool, asked, [2, -1, 0])
                q = queries(tokens, 9)
                report = pool.report(0, q)
                out = pool.attend(0, q, report=report)
                for token, (request, length) in enumerate(
                    ((0, 1428), (0, 1429), (0, 1430), (1, 150))
                ):
                    k, v = (array[:length] for array in given[request])
                    error = relative_error(out[token], attend(q[token], k, v))
                    self.assertLess(error, 1e-5 if policy == "dense" else 0.1)
                self.assertEqual(report.verdict.shape, (4, Q_HEADS))
                self.assertEqual(report.middle.shape, (3, KV_HEADS))
                self.assertEqual(
                    set(report.verdict[:3].flat) <= {0, 1, 2}, True, report.verdict[:3]
                )
                exact = pool.attend(0, q, dense=True)
                want = attend(q[0], *(array[:1428] for array in given[0]))
                self.assertLess(relative_error(exact[0], want), 1e-5)
                if policy == "verified":
                    self.assertGreater(runtime.stats().heads_verified, 0)

    def test_requests_share_blocks_and_slots_are_written_again(self):
        runtime = self.runtime()
        pool, keys, values = self.paged(runtime, tables=self.tables(runtime))
        k, v = self.request(pool, 1280, 1, range(80))
        other_k, other_v = rows(64, 2)
        pool.write(0, np.arange(90 * BLOCK, 94 * BLOCK), other_k, other_v)
        self.step(pool, [([*range(80), *range(90, 94)], 1344, 1)], [1], resets=np.ones(1, np.int32))
        q = 30 * np.repeat(k[700, :, None], Q_HEADS // KV_HEADS, 1).reshape(1, Q_HEADS, DIM)
        want = attend(q[0], np.concatenate([k, other_k]), np.concatenate([v, other_v]))
        self.assertLess(relative_error(pool.attend(0, q)[0], want), 0.1)
        # The block that has what the queries look for gets other rows, by the caller.
        keys[43], values[43] = rows(BLOCK, 8)
        pool.write(0, np.arange(43 * BLOCK, 44 * BLOCK))
        k[43 * BLOCK : 44 * BLOCK], v[43 * BLOCK : 44 * BLOCK] = keys[43], values[43]
        want = attend(q[0], np.concatenate([k, other_k]), np.concatenate([v, other_v]))
        self.step(pool, [([*range(80), *range(90, 94)], 1344, 1)], [1])
        self.assertLess(relative_error(pool.attend(0, q)[0], want), 0.2)

    def test_a_chunk_is_exact(self):
        pool, _, _ = self.paged(self.runtime(policy="dense"))
        blocks = np.array([5, 3, 8, 1, 190, 7], np.int32)
        k, v = self.request(pool, 90, 4, blocks)
        q, lse = queries(20, 3), np.empty((20, Q_HEADS), np.float32)
        out = pool.prefill(0, q, blocks, 90, lse=lse)
        for token in range(20):
            want = attend(q[token], k[: 71 + token], v[: 71 + token])
            self.assertLess(relative_error(out[token], want), 1e-5)
        self.assertTrue(np.isfinite(lse).all())
        strided = np.repeat(q, 2, 1)[:, ::2]
        np.testing.assert_array_equal(pool.prefill(0, strided, blocks, 90), out)

    def test_codes_may_be_the_callers(self):
        runtime = self.runtime()
        tables = self.tables(runtime)
        used = KV_HEADS * BLOCK * runtime.options["index_bytes"]
        codes = [np.zeros((BLOCKS, used + 64), np.uint8)]
        pool, _, _ = self.paged(runtime, tables=tables, codes=codes)
        self.request(pool, 64, 4, range(4))
        self.assertTrue(codes[0][:4, :used].any())
        self.assertFalse(codes[0][:, used:].any())
        with self.assertRaisesRegex(
            vattn.InvalidArgumentError, rf"codes\[0\] has shape .* must be \[{BLOCKS}, {used}\]"
        ):
            self.paged(runtime, tables=tables, codes=[np.zeros((BLOCKS, used - 1), np.uint8)])
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "elements of f32"):
            self.paged(runtime, tables=tables, codes=[np.zeros((BLOCKS, used), np.float32)])


class Life(Paged):
    def test_it_keeps_the_pool_alive_and_lets_go_of_it(self):
        runtime = self.runtime(policy="dense")
        pool, k, v = self.paged(runtime)
        self.request(pool, 40, 4, range(3))
        gone = weakref.ref(k.base)
        del k, v
        gc.collect()
        self.assertIsNotNone(gone())
        self.assertIn(f"{BLOCKS} blocks of {BLOCK} tokens", repr(pool))
        pool.close()
        gc.collect()
        self.assertIsNone(gone())
        self.assertIn("closed", repr(pool))
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "Paged is closed"):
            pool.write(0, np.zeros(0, np.int64))

    def test_a_runtime_that_is_closed_closes_it(self):
        runtime = self.runtime(policy="dense")
        pool, _, _ = self.paged(runtime)
        runtime.close()
        self.assertTrue(pool.closed)

    def test_tables_are_of_a_model(self):
        runtime = self.runtime()
        tables = self.tables(runtime, "one")
        self.paged(runtime, tables=tables)
        self.paged(runtime, tables=tables, model="one")
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "model"):
            self.paged(runtime, tables=tables, model="another")
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "tables is NULL"):
            self.paged(runtime)
        with self.assertRaises(vattn.Error) as missing:
            self.paged(runtime, tables=tables + ".no")
        self.assertEqual(missing.exception.status, vattn.Status.NOT_FOUND)
        few = runtime.sequence()
        few.append(0, *rows(300, 5), queries(300, 6))
        with self.assertRaises(vattn.InvalidArgumentError):
            few.save_tables(tables)


class Refused(Paged):
    def setUp(self):
        self.pool, self.k, self.v = self.paged(self.runtime(policy="dense"))

    def refused(self, text, function, *arguments, **named):
        with self.assertRaisesRegex(vattn.InvalidArgumentError, text):
            function(*arguments, **named)

    def test_arrays_of_a_pool(self):
        make = self.pool.runtime.paged
        k, v = self.k, self.v
        self.refused(r"k has 2 layers, must have the 1", make, [k, k], [v, v], max_tokens=64)
        self.refused(r"k\[0\] is NoneType, must be an array", make, [None], [v], max_tokens=64)
        self.refused(
            rf"v\[0\] has shape .* must be \[{BLOCKS}, {BLOCK}, {KV_HEADS}, {DIM}\]",
            make,
            [k],
            [v[:, :8]],
            max_tokens=64,
        )
        self.refused(
            r"v\[0\] has strides .* as the other", make, [k], [v.copy("C")], max_tokens=64
        )
        self.refused("has elements of f16", make, [k.astype("f2")], [v], max_tokens=64)
        self.refused("must have 1 for the last", make, [k[..., ::-1]], [v], max_tokens=64)
        readonly = k.view()
        readonly.flags.writeable = False
        self.refused(r"k\[0\] is read-only", make, [readonly], [v], max_tokens=64)
        self.refused("block_tokens is 10", make, [k[:, :10]], [v[:, :10]], max_tokens=64)
        self.refused("max_tokens is 0", make, [k], [v], max_tokens=0)

    def test_rows(self):
        k, v = rows(4, 1)
        slots = np.arange(4)
        write = self.pool.write
        self.refused("slots has elements of i32, must be i64", write, 0, slots.astype("i4"), k, v)
        self.refused(r"slots has shape \[2, 2\]", write, 0, slots.reshape(2, 2), k, v)
        self.refused(r"k has shape \[3, .* must be \[4, ", write, 0, slots, k[:3], v)
        self.refused("v has elements of i64, must be f32", write, 0, slots, k, v.astype("i8"))
        self.refused("must have positive ones", write, 0, slots, k[::-1], v)
        self.refused("v is NULL, must be given", write, 0, slots, k)
        self.refused("layer is 1", write, 1, slots, k, v)
        write(0, slots - 2, k, v)  # two of them are padding
        np.testing.assert_array_equal(self.k[0, :2], k[2:])
        write(0, slots, *map(Dlpack, (k, v)))
        np.testing.assert_array_equal(self.v[0, :4], v)

    def test_steps(self):
        pool = self.pool
        table, one = np.zeros((1, ENTRIES), np.int32), np.ones(1, np.int32)
        starts = np.array([0, 1], np.int32)
        row = np.zeros(1, np.int32)
        self.refused("no step is open", pool.attend, 0, queries(1, 1))
        step = pool.begin_step
        self.refused(r"block_table has shape \[100\]", step, table[0], one, starts, row)
        spread = np.zeros((1, 200), np.int32)[:, ::2]
        self.refused("block_table has strides", step, spread, one, starts, row)
        self.refused("block_table has elements of i64", step, table.astype("i8"), one, starts, row)
        self.refused(r"query_starts has shape \[1\], must be \[2\]", step, table, one, one, row)
        self.refused("lengths has elements of f32", step, table, one.astype("f4"), starts, row)
        self.refused("block_table_stride is 10", step, table[:, :10].copy(), one, starts, row)
        self.refused("lengths", step, table, one + MAX_TOKENS, starts, row)
        self.refused("request_rows", step, table, one, starts, row + 4)
        self.refused("block_table", step, table + BLOCKS, one, starts, row)
        self.refused("max_query_tokens is 5", step, table, one, starts, row, max_query_tokens=5)
        self.request(pool, 1, 1, [0])
        step(table, one, starts, row)
        self.refused("q has 2 tokens, must have the 1", pool.attend, 0, queries(2, 1))
        self.refused("q has shape", pool.attend, 0, queries(1, 1)[0])
        self.refused("report has no 'lsd'", pool.report, 0, queries(1, 1), "lsd")
        self.assertEqual(pool.attend(0, queries(1, 1)).shape, (1, Q_HEADS, DIM))

    def test_chunks(self):
        self.request(self.pool, 20, 1, [0, 1])
        prefill, blocks = self.pool.prefill, np.array([0, 1], np.int32)
        q = queries(5, 1)
        self.refused(r"blocks has shape \[1\], must be \[2\]", prefill, 0, q, blocks[:1], 20)
        self.refused(r"blocks\[1\] is 200", prefill, 0, q, blocks * BLOCKS, 20)
        self.refused("length is 4, must be 5", prefill, 0, q, blocks, 4)
        self.refused(
            "out has shape", prefill, 0, queries(5, 1), blocks, 20, out=queries(4, 1)
        )


if __name__ == "__main__":
    unittest.main()
