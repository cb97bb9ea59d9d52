"""Who owns a handle: copies, pickles, use after close, collection; errors that are pickled."""

import copy
import gc
import pickle
import unittest
import weakref

import numpy as np
import vattn
from fixture import OPTIONS, Fixture, attend, queries, relative_error, rows

TOKENS = 600


class Copies(Fixture):
    def answer(self, sequence):
        batch = sequence.runtime.batch(1)
        batch.set(0, sequence)
        batch.begin_step(0)
        out = batch.attend(0, queries(1, 3))[0]
        batch.close()
        return out

    def test_a_copied_sequence_is_a_fork(self):
        runtime = self.runtime(policy="dense")
        sequence, k, v = self.filled(runtime, TOKENS)
        want = attend(queries(1, 3)[0], k, v)
        for how in (copy.copy, copy.deepcopy, lambda s: copy.deepcopy({"kept": [s]})["kept"][0]):
            other = how(sequence)
            self.assertIsInstance(other, vattn.Sequence)
            self.assertNotEqual(other.handle, sequence.handle)
            self.assertIs(other.runtime, runtime)
            other.append(0, k[:100], v[:100])
            other.truncate(300)
            self.assertEqual((sequence.length(), other.length()), (TOKENS, 300))
            other.close()
            self.assertLess(relative_error(self.answer(sequence), want), 1e-5)
        other = copy.deepcopy(sequence)
        sequence.close()
        self.assertLess(relative_error(self.answer(other), want), 1e-5)

    def test_one_sequence_held_twice_is_forked_once(self):
        runtime = self.runtime()
        sequence, _, _ = self.filled(runtime, TOKENS)
        held = copy.deepcopy([sequence, sequence])
        self.assertIs(held[0], held[1])
        self.assertEqual(runtime.stats().sequences, 2)

    def test_runtimes_and_batches_are_not_copied_and_nothing_is_pickled(self):
        runtime = self.runtime()
        sequence, _, _ = self.filled(runtime, TOKENS)
        batch = runtime.batch(1)
        for handle, hint in (
            (runtime, r"Runtime\(\*\*runtime.options\)"),
            (batch, "Runtime.batch"),
        ):
            for how in (copy.copy, copy.deepcopy, lambda x: copy.deepcopy([x])):
                with self.assertRaisesRegex(TypeError, f"cannot be copied.*{hint}"):
                    how(handle)
        for handle, hint in ((runtime, "options"), (sequence, "Runtime.restore"), (batch, "batch")):
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with self.assertRaisesRegex(TypeError, f"cannot be pickled.*{hint}"):
                    pickle.dumps({"held": handle}, protocol)
        gc.collect()
        self.assertEqual((sequence.length(), runtime.stats().sequences), (TOKENS, 1))

    def test_what_can_be_pickled(self):
        runtime = self.runtime()
        for value in (runtime.options, runtime.stats(), runtime.tenant_use(1), vattn.Policy.TOPK):
            self.assertEqual(pickle.loads(pickle.dumps(value)), value)
            self.assertEqual(copy.deepcopy(value), value)


class Closed(Fixture):
    def test_every_call_says_so(self):
        runtime = self.runtime()
        sequence, k, v = self.filled(runtime, TOKENS)
        batch = runtime.batch(1)
        other = runtime.sequence()
        batch.set(0, other)
        tokens = np.arange(TOKENS, dtype=np.int32)
        of_sequence = [
            lambda: sequence.append(0, k, v),
            lambda: sequence.reserve(5),
            lambda: sequence.fork(),
            lambda: copy.copy(sequence),
            lambda: copy.deepcopy(sequence),
            lambda: sequence.truncate(5),
            lambda: sequence.length(),
            lambda: sequence.build_index(),
            lambda: sequence.save("nowhere"),
            lambda: sequence.save_prefix(b"a", tokens),
            lambda: sequence.hibernate("nowhere"),
            lambda: sequence.wake(),
        ]
        of_batch = [
            lambda: batch.set(0, other),
            lambda: batch.clear(0),
            lambda: batch.begin_step(),
            lambda: batch.attend(0, queries(1, 1), k[:1], v[:1]),
        ]
        of_runtime = [
            lambda: runtime.sequence(),
            lambda: runtime.batch(1),
            lambda: runtime.stats(),
            lambda: runtime.tenant_use(1),
            lambda: runtime.limit_tenant(1, 5),
            lambda: runtime.prometheus(),
            lambda: runtime.restore("nowhere"),
            lambda: runtime.restore_prefix(b"a", tokens),
            lambda: runtime.forget_prefixes(b"a"),
        ]

        def all_say(calls, text):
            for call in calls:
                with self.assertRaisesRegex(vattn.InvalidArgumentError, text):
                    call()

        sequence.close()
        all_say([*of_sequence, lambda: batch.set(0, sequence)], "Sequence is closed, must be open")
        batch.close()
        all_say(of_batch, "Batch is closed, must be open")
        sequence, batch = other, runtime.batch(1)
        runtime.close()
        all_say(of_sequence, "Sequence is closed, as its Runtime is")
        all_say(of_batch, "Batch is closed, as its Runtime is")
        all_say(of_runtime, "Runtime is closed, must be open")
        for handle in (sequence, batch, runtime):
            self.assertTrue(handle.closed)
            handle.close()
            self.assertRegex(repr(handle), r"^<vattn\.\w+, closed>$")

    def test_a_closed_handle_frees_no_other_at_its_address(self):
        """The library may give a new sequence the address of one that is gone."""
        runtime = self.runtime()
        for _ in range(50):
            old = runtime.sequence()
            address = old.handle
            old.close()
            new = runtime.sequence()
            old.close()
            del old
            gc.collect()
            self.assertEqual(new.length(), 0)
            if new.handle == address:
                break
            new.close()
        self.assertEqual(runtime.stats().sequences, 1)

    def test_with_closes(self):
        with vattn.Runtime(**OPTIONS) as runtime, runtime.sequence() as sequence:
            with runtime.batch(1) as batch:
                batch.set(0, sequence)
            self.assertTrue(batch.closed)
            self.assertFalse(sequence.closed)
        self.assertTrue(sequence.closed and runtime.closed)


class Collected(Fixture):
    def test_a_cycle_is_freed_in_an_order_that_the_library_allows(self):
        """A runtime and its sequences in one cycle, as by a log function that knows its owner."""

        class Engine:
            def __init__(self):
                self.lines = lines
                self.runtime = vattn.Runtime(log=self.log, **OPTIONS)
                self.sequences = [self.runtime.sequence() for _ in range(3)]
                self.batch = self.runtime.batch(3)
                self.sequences[0].append(0, *rows(TOKENS, 1))
                for slot, sequence in enumerate(self.sequences):
                    self.batch.set(slot, sequence)

            def log(self, level, text):
                self.lines.append((level, text))

        for _ in range(5):
            lines = []
            gone = weakref.ref(Engine())
            gc.collect()
            self.assertIsNone(gone())
            self.assertEqual(lines, [])

    def test_a_sequence_keeps_its_runtime_and_a_batch_its_sequences(self):
        runtime = vattn.Runtime(**OPTIONS | {"policy": "dense"})
        sequence, k, v = self.filled(runtime, TOKENS)
        batch = runtime.batch(1)
        batch.set(0, sequence)
        gone = weakref.ref(sequence)
        del runtime, sequence
        gc.collect()
        batch.begin_step(0)
        out = batch.attend(0, queries(1, 3))[0]
        self.assertLess(relative_error(out, attend(queries(1, 3)[0], k, v)), 1e-5)
        batch.close()
        gc.collect()
        self.assertIsNone(gone())

    def test_a_runtime_that_was_never_made(self):
        with self.assertRaises(vattn.InvalidArgumentError) as refused:
            vattn.Runtime(**OPTIONS | {"epsilon": -1})
        bare = vattn.Runtime.__new__(vattn.Runtime)
        self.assertEqual(repr(bare), "<vattn.Runtime, closed>")
        del bare, refused
        gc.collect()


class Shown(Fixture):
    def test_repr(self):
        runtime = self.runtime(num_layers=2)
        sequence, k, v = self.filled(runtime, TOKENS)
        batch = runtime.batch(3)
        batch.set(1, sequence)
        self.assertEqual(
            repr(runtime), "<vattn.Runtime on cpu, num_layers 2, dtype f32, policy verified>"
        )
        self.assertEqual(repr(sequence), "<vattn.Sequence of 0 to 600 tokens>")
        sequence.append(1, k, v)
        self.assertEqual(repr(sequence), "<vattn.Sequence of 600 tokens>")
        self.assertEqual(repr(batch), "<vattn.Batch of 3 slots, 1 filled>")
        for shown in (batch.report(0, queries(3, 1)), batch.selection(0, k, 4), runtime.stats()):
            self.assertRegex(repr(shown), r"^(Report|Selection|Stats)\(")

    def test_names_are_those_of_the_package(self):
        for name in vattn.__all__:
            if isinstance(value := getattr(vattn, name), type) and value is not vattn.Array:
                self.assertEqual((value.__module__, value.__name__), ("vattn", name))

    def test_version(self):
        self.assertRegex(vattn.__version__, r"^\d+\.\d+\.\d+$")
        self.assertEqual(vattn.__version__, vattn.version())


class Errors(Fixture):
    def test_pickled_and_copied(self):
        runtime = self.runtime(host_bytes=1 << 20)
        k, v = rows(5000, 1)
        for call, kind, status in (
            (lambda: runtime.sequence().append(0, k, v), vattn.FullError, vattn.Status.FULL),
            (lambda: runtime.batch(0), vattn.InvalidArgumentError, vattn.Status.INVALID_ARGUMENT),
            (lambda: runtime.batch(0.5), vattn.InvalidArgumentError, vattn.Status.INVALID_ARGUMENT),
            (lambda: runtime.restore("/nowhere/at/all"), vattn.Error, vattn.Status.NOT_FOUND),
        ):
            with self.assertRaises(kind) as raised:
                call()
            error = raised.exception
            error.add_note("in layer 3")
            again = [
                pickle.loads(pickle.dumps(error, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)
            ]
            for other in [*again, copy.copy(error), copy.deepcopy(error)]:
                self.assertIs(type(other), type(error))
                self.assertEqual(str(other), str(error))
                self.assertEqual((other.status, other.text), (status, error.text))
                self.assertEqual(other.__notes__, ["in layer 3"])

    def test_classes(self):
        for kind in (vattn.OutOfMemoryError, vattn.NotSupportedError, vattn.FullError):
            error = pickle.loads(pickle.dumps(kind(vattn.Status.FULL, "text")))
            self.assertEqual((type(error), error.text), (kind, "text"))

    def test_a_code_that_this_package_does_not_know(self):
        error = vattn._errors.error_of(77, "of a newer library")
        self.assertIs(type(error), vattn.Error)
        self.assertRegex(str(error), "INTERNAL: code 77, .*: of a newer library")


if __name__ == "__main__":
    unittest.main()
