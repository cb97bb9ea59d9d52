"""The package over numpy: sequences, files, counters, options, the log."""

import gc
import os
import pathlib
import tempfile
import unittest
import weakref

import numpy as np
import vattn
from fixture import Q_HEADS, TOKENS, Fixture, attend, queries, relative_error, rows


class Sequences(Fixture):
    def test_fork_and_truncate(self):
        runtime = self.runtime(policy="dense")
        sequence, k, v = self.filled(runtime, 600)
        copy = sequence.fork(id=7)
        copy.truncate(300)
        self.assertEqual((sequence.length(), copy.length()), (600, 300))
        batch = runtime.batch(2)
        batch.set(0, sequence)
        batch.set(1, copy)
        q = queries(2, 5)
        out = self.step(batch, q, k[0], v[0])
        for slot, tokens in enumerate((600, 300)):
            want = attend(
                q[slot], np.concatenate([k[:tokens], k[:1]]), np.concatenate([v[:tokens], v[:1]])
            )
            self.assertLess(relative_error(out[slot], want), 1e-5)

    def test_files(self):
        runtime = self.runtime()
        sequence, k, v = self.filled(runtime)
        sequence.build_index()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "sequence"
            sequence.save(path)
            outs = []
            for each in (sequence, runtime.restore(path)):
                batch = runtime.batch(1)
                batch.set(0, each)
                outs.append(self.step(batch, queries(1, 5), k[0], v[0]))
                batch.clear(0)
            np.testing.assert_array_equal(*outs)
            used = runtime.stats().host_bytes_used
            sequence.hibernate(os.fspath(path))
            self.assertLess(runtime.stats().host_bytes_used, used)
            self.assertEqual(sequence.length(), TOKENS + 1)
            sequence.wake()
            self.assertEqual(runtime.stats().host_bytes_used, used)
            path.write_bytes(path.read_bytes()[:-100])
            with self.assertRaises(vattn.Error) as damaged:
                runtime.restore(path)
            self.assertEqual(damaged.exception.status, vattn.Status.DATA_LOSS)
        with self.assertRaises(vattn.Error) as missing:
            runtime.restore("/nowhere/at/all")
        self.assertEqual(missing.exception.status, vattn.Status.NOT_FOUND)

    def test_prefixes(self):
        with tempfile.TemporaryDirectory() as folder:
            runtime = self.runtime(disk_path=f"{folder}/kv", policy="dense")
            sequence, k, v = self.filled(runtime, 600)
            tokens = np.arange(600, dtype=np.int32)
            sequence.save_prefix(b"model", tokens)
            asked = np.concatenate([tokens[:512], tokens[:80]])
            with self.assertRaises(vattn.Error) as other:
                runtime.restore_prefix(b"another", asked)
            self.assertEqual(other.exception.status, vattn.Status.NOT_FOUND)
            restored, begins = runtime.restore_prefix(b"model", asked)
            self.assertEqual((begins, restored.length()), (512, 512))
            batch = runtime.batch(1)
            batch.set(0, restored)
            q = queries(1, 5)
            out = self.step(batch, q, k[0], v[0])
            rows_seen = [np.concatenate([x[:512], x[:1]]) for x in (k, v)]
            self.assertLess(relative_error(out[0], attend(q[0], *rows_seen)), 1e-5)
            stats = runtime.stats()
            self.assertEqual((stats.prefix_hits, stats.prefix_tokens), (1, 512))
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "tokens are .* must be"):
                sequence.save_prefix(b"model", tokens.astype(np.int64))
            self.assertEqual(runtime.forget_prefixes(b"model"), 1)
            runtime.close()

    def test_prefixes_in_memory(self):
        runtime = self.runtime(policy="dense")
        sequence, k, v = self.filled(runtime, 600)
        tokens = np.arange(600, dtype=np.int32)
        sequence.save_prefix(b"model", tokens)
        sequence.close()
        begun, begins = runtime.restore_prefix(b"model", tokens[:500], tenant=3, reserve_tokens=900)
        self.assertEqual(begins, 500)
        batch = runtime.batch(1)
        batch.set(0, begun)
        q = queries(1, 5)
        out = self.step(batch, q, k[0], v[0])
        rows_seen = [np.concatenate([x[:500], x[:1]]) for x in (k, v)]
        self.assertLess(relative_error(out[0], attend(q[0], *rows_seen)), 1e-5)
        self.assertEqual((runtime.stats().memory_prefix_hits, runtime.stats().memory_prefixes), (1, 1))
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "disk_path is not given"):
            runtime.restore_prefix(b"model", tokens, tier=vattn.Tier.DISK)
        self.assertEqual(runtime.forget_prefixes(b"model"), 1)

    def test_reservations_and_tenants(self):
        runtime = self.runtime(admission="reserved", tenant_bytes=1 << 20)
        self.assertEqual(runtime.options["admission"], vattn.Admission.RESERVED)
        sequence = runtime.sequence(reserve_tokens=300, tenant=8)
        k, v = rows(400, 1)
        sequence.append(0, k[:300], v[:300])
        with self.assertRaisesRegex(vattn.FullError, "vattn_sequence_reserve"):
            sequence.append(0, k, v)
        sequence.reserve(700)
        sequence.append(0, k, v)
        use = runtime.tenant_use(8)
        self.assertEqual((use.host_bytes_used, use.sequences), (runtime.stats().host_bytes_used, 1))
        self.assertLessEqual(use.host_bytes_limit, 1 << 20)
        with self.assertRaisesRegex(vattn.FullError, "tenant 8 is at its quota"):
            sequence.reserve(100000)
        runtime.limit_tenant(8, 32 << 20)
        sequence.reserve(20000)
        self.assertGreater(runtime.tenant_use(8).host_bytes_reserved, 1 << 20)
        with tempfile.TemporaryDirectory() as folder:
            sequence.save(f"{folder}/saved")
            other = runtime.restore(f"{folder}/saved", tenant=9, reserve_tokens=1000)
            self.assertEqual((other.length(), runtime.tenant_use(9).sequences), (700, 1))

    def test_a_full_pool_loses_nothing(self):
        runtime = self.runtime(host_bytes=1 << 20)
        sequence, k, v = self.filled(runtime, 500)
        with self.assertRaisesRegex(vattn.FullError, "host_bytes"):
            for _ in range(100):
                sequence.append(0, k, v)
        self.assertEqual(sequence.length() % 500, 0)
        with self.assertRaises(vattn.FullError):
            runtime.sequence(reserve_tokens=1 << 20)
        self.assertGreater(runtime.stats().full_refusals, 1)

    def test_closing(self):
        runtime = self.runtime()
        sequence, _, _ = self.filled(runtime, 100)
        batch = runtime.batch(1)
        batch.set(0, sequence)
        runtime.close()
        runtime.close()
        for call in (sequence.length, runtime.stats, batch.begin_step):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, "closed"):
                call()
        runtime = self.runtime()
        collected = weakref.ref(runtime.sequence())
        gc.collect()
        self.assertIsNone(collected())
        self.assertEqual(runtime.stats().sequences, 0)


class Facts(Fixture):
    def test_versions_and_machine(self):
        self.assertRegex(vattn.version(), r"^0\.1\.\d+$")
        self.assertIn("backends cpu", vattn.build_info())
        self.assertEqual(vattn.doctor()["schema_version"], 1)
        self.assertEqual(vattn.devices(), vattn.doctor()["cuda"]["devices"])

    def test_options_in_force(self):
        options = self.runtime(
            num_layers=3, layer_kv_heads=[2, 0, 2], preset="fast", seed=5
        ).options
        self.assertEqual(options["layer_kv_heads"], [2, 0, 2])
        self.assertEqual(options["policy"], vattn.Policy.VERIFIED)
        self.assertAlmostEqual(options["epsilon"], 0.2, places=6)
        self.assertEqual((options["seed"], options["profile"]), (5, ""))

    def test_counters(self):
        runtime = self.runtime()
        sequence, k, v = self.filled(runtime)
        batch = runtime.batch(1)
        batch.set(0, sequence)
        self.step(batch, queries(1, 1), k[0], v[0])
        stats = runtime.stats()
        self.assertEqual((stats.sequences, stats.tokens, stats.steps), (1, TOKENS + 1, 1))
        self.assertEqual(stats.heads_verified + stats.heads_dense, Q_HEADS)
        self.assertIn(f"vattn_rows_selected {stats.rows_selected}\n", runtime.prometheus())

    def test_log(self):
        lines = []
        runtime = self.runtime(log=lambda level, text: lines.append((level, text)))
        sequence = runtime.sequence()
        handle, runtime._handle = runtime.handle, None
        vattn._library.LIBRARY.vattn_runtime_destroy(
            handle
        )  # unlike close, with the sequence alive
        self.assertEqual([level for level, _ in lines], [vattn.LogLevel.ERROR])
        self.assertIn("1 of its sequences", lines[0][1])
        sequence.close()


if __name__ == "__main__":
    unittest.main()
