"""Options and arguments of the package: what is accepted, and what is refused by name."""

import copy
import json
import os
import pathlib
import tempfile

import numpy as np
import vattn
from fixture import OPTIONS, Fixture

FIRST_64 = 2**64


class Whole(int):
    """A whole number of another class."""


class Accepted(Fixture):
    def test_options_in_force_make_the_same_runtime(self):
        with tempfile.TemporaryDirectory() as folder:
            for given in (
                {},
                {"policy": "topk_uniform", "target": "denominator", "dtype": "bf16"},
                {"num_layers": 3, "layer_kv_heads": [2, 0, 1], "num_kv_heads": 3},
                {"index": "page", "value_bits": 4, "on_unverified": "best_effort", "bound": "safe"},
                {"index": "sign", "index_bytes": 8, "pilot": 1, "seed": FIRST_64 - 1},
                {
                    "preset": "strict",
                    "delta": 0.215,
                    "softmax_scale": 1e-30,
                    "admission": "reserved",
                },
                {
                    "disk_path": f"{folder}/kv",
                    "spill": 1,
                    "io_engine": "pread",
                    "disk_bytes": 2**40,
                },
            ):
                with self.subTest(given=given):
                    runtime = self.runtime(**given)
                    options = runtime.options
                    runtime.close()
                    again = self.runtime_of(options)
                    self.assertEqual(again.options, options)
                    again.close()
                    kept = json.loads(json.dumps(options))  # enums as numbers
                    self.assertEqual(self.runtime_of(kept).options, options)

    def runtime_of(self, options):
        runtime = vattn.Runtime(**options)
        self.addCleanup(runtime.close)
        return runtime

    def test_options_are_the_callers_own_copy(self):
        runtime = self.runtime(num_layers=2)
        runtime.options["layer_kv_heads"].clear()
        runtime.options.clear()
        self.assertEqual(runtime.kv_heads(1), 2)
        self.assertEqual(runtime.options["num_layers"], 2)

    def test_enumerations_by_member_name_and_number(self):
        for name, kind in (
            ("policy", vattn.Policy),
            ("norm", vattn.Norm),
            ("on_unverified", vattn.OnUnverified),
            ("bound", vattn.Bound),
            ("target", vattn.Target),
            ("admission", vattn.Admission),
            ("dtype", vattn.DType),
        ):
            for member in kind:
                for given in (member, member.name.lower(), int(member), copy.deepcopy(member)):
                    self.assertIs(self.runtime(**{name: given}).options[name], member)
        runtime = self.runtime(index=vattn.Index.EXACT, io_engine=vattn.Io.PREAD)
        self.assertEqual(runtime.options["index"], vattn.Index.EXACT)
        self.assertEqual(runtime.options["io_engine"], vattn.Io.PREAD)

    def test_element_types_of_numpy_and_by_their_long_names(self):
        for given, kind in (
            (np.float32, "F32"),
            (np.dtype("f2"), "F16"),
            ("float16", "F16"),
            ("bfloat16", "BF16"),
        ):
            self.assertEqual(self.runtime(dtype=given).options["dtype"].name, kind)

    def test_numbers_of_numpy(self):
        options = self.runtime(
            num_layers=np.int64(2),
            layer_kv_heads=np.array([2, 1]),
            epsilon=np.float32(0.25),
            delta=np.float64(0.125),
            norm_floor=np.array(0.5),
            prefault=np.True_,
            huge_pages=False,
            seed=np.uint64(FIRST_64 - 1),
            host_bytes=Whole(64 << 20),
        ).options
        self.assertEqual(options["layer_kv_heads"], [2, 1])
        self.assertEqual((options["epsilon"], options["delta"]), (0.25, 0.125))
        self.assertEqual((options["prefault"], options["huge_pages"]), (1, 0))
        self.assertEqual(options["seed"], FIRST_64 - 1)
        for heads in ((2, 1), range(2, 0, -1), iter([2, 1])):
            options = self.runtime(num_layers=2, layer_kv_heads=heads).options
            self.assertEqual(options["layer_kv_heads"], [2, 1])

    def test_paths(self):
        nothing = self.runtime(profile=None, disk_path=None, sign_maps=None, layer_kv_heads=None)
        self.assertEqual(nothing.options["disk_path"], "")
        with tempfile.TemporaryDirectory() as folder:
            odd = os.fsencode(folder) + b"/not \xff UTF-8"
            for given in (
                pathlib.Path(folder) / "kv",
                os.fsencode(folder) + b"/kv",
                odd,
                os.fsdecode(odd),
            ):
                runtime = self.runtime(disk_path=given)
                self.assertEqual(os.fsencode(runtime.options["disk_path"]), os.fsencode(given))
                again = runtime.options
                runtime.close()
                with vattn.Runtime(**again) as same:
                    self.assertEqual(same.options, again)
            self.assertTrue(os.path.isdir(odd))
            runtime = self.runtime()
            sequence, _, _ = self.filled(runtime, 300)
            for given in (odd + b".kv", os.fsdecode(odd) + ".kv", pathlib.Path(folder) / "kv.file"):
                sequence.save(given)
                self.assertEqual(runtime.restore(given).length(), 300)
                sequence.hibernate(given)
                sequence.wake()

    def test_salts_of_any_bytes(self):
        runtime = self.runtime()
        sequence, _, _ = self.filled(runtime, 600)
        tokens = np.arange(600, dtype=np.int32)
        sequence.save_prefix(b"a\0b", tokens)
        for other in (b"a", b"a\0", b"a\0c"):
            with self.assertRaises(vattn.Error) as missing:
                runtime.restore_prefix(other, tokens)
            self.assertEqual(missing.exception.status, vattn.Status.NOT_FOUND)
            self.assertEqual(runtime.forget_prefixes(other), 0)
        for same in (bytearray(b"a\0b"), memoryview(b"a\0b")):
            self.assertEqual(runtime.restore_prefix(same, tokens, tier="memory")[1], 600)
        self.assertEqual(runtime.forget_prefixes(bytearray(b"a\0b")), 1)


class Refused(Fixture):
    def refused(self, text, call, *arguments, **options):
        with self.assertRaisesRegex(vattn.InvalidArgumentError, text):
            call(*arguments, **options)

    def test_options(self):
        for options, text in (
            ({"epsilon": float("nan")}, "epsilon is nan"),
            ({"delta": np.float32("inf")}, "delta is .*inf"),
            ({"hot_share": -float("inf")}, "hot_share is -inf"),
            ({"epsilon": 1e300}, r"epsilon is 1e\+300"),
            ({"softmax_scale": 1e-60}, "softmax_scale is 1e-60"),  # 0 there is the default
            ({"softmax_scale": 10**400}, "softmax_scale is 1000"),
            ({"epsilon": "0.1"}, "epsilon is '0.1', must be a number"),
            ({"epsilon": True}, "epsilon is True, must be a number"),
            ({"epsilon": None}, "epsilon is None, must be a number"),
            ({"epsilon": np.array([0.1])}, "epsilon is array"),
            ({"epsilon": 1 + 0j}, "epsilon is "),
            ({"host_bytes": 1e9}, "host_bytes is 1000000000.0, must be a whole number"),
            ({"host_bytes": None}, "host_bytes is None, must be a whole number"),
            ({"host_bytes": "4GiB"}, "host_bytes is '4GiB', must be a whole number"),
            ({"host_bytes": -1}, "host_bytes is -1, must be 0 to"),
            ({"host_bytes": FIRST_64 + (64 << 20)}, "host_bytes is 18446744073776660480, must be"),
            ({"num_layers": 2**32 + 1}, "num_layers is 4294967297, must be"),
            ({"window": -(2**31) - 1}, "window is -2147483649, must be"),
            ({"policy": "Dense"}, 'policy is \'Dense\', must be "verified", "topk", '),
            ({"policy": vattn.DType.F16}, "policy is <DType.F16: 1>, must be"),
            ({"policy": 9}, "policy is 9, must be"),
            ({"policy": True}, "policy is True, must be"),
            ({"policy": None}, "policy is None, must be"),
            ({"dtype": np.float64}, "dtype is .*float64"),
            ({"dtype": np.uint16}, "dtype is .*uint16"),
            ({"preset": "best"}, "preset is"),
            ({"preset": b"fast"}, "preset is b'fast', must be"),
            ({"epsilom": 0.1}, "option epsilom is unknown, is epsilon meant"),
            ({"struct_size": 8}, "option struct_size is unknown"),
            ({"layer_kv_heads": [2, 2]}, "layer_kv_heads has 2 entries, must have num_layers = 1"),
            ({"num_layers": 3, "layer_kv_heads": [2]}, "layer_kv_heads has 1 entries, .* = 3"),
            ({"layer_kv_heads": [2.0]}, r"layer_kv_heads\[0\] is 2.0"),
            (
                {"layer_kv_heads": [2**32 + 2]},
                r"layer_kv_heads\[0\] is 4294967298, must be 0 to 1024",
            ),
            ({"layer_kv_heads": "2"}, "layer_kv_heads is '2'"),
            ({"layer_kv_heads": 2}, "layer_kv_heads is 2"),
            ({"disk_path": "kv\0cut"}, "disk_path is .*, must have no zero byte"),
            ({"profile": b"\0"}, "profile is .*, must have no zero byte"),
            ({"sign_maps": 3}, "sign_maps is 3, must be a str, bytes or os.PathLike"),
            ({"disk_path": "\ud800"}, "disk_path is .*, must be a str, bytes or os.PathLike"),
            ({"log": 3}, "log is 3, must be a function"),
        ):
            with self.subTest(options=options):
                self.refused(text, vattn.Runtime, **OPTIONS | options)

    def test_no_whole_number_wraps(self):
        """Each argument of each call, off a legal value by 2^32 or 2^64, and of other types."""
        runtime = self.runtime()
        sequence, k, v = self.filled(runtime, 600)
        batch = runtime.batch(1)
        tokens = np.arange(600, dtype=np.int32)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/kv"
            sequence.save(path)
            calls = [
                ("slots", 2**32, runtime.batch),
                ("slot", 2**32, lambda x: batch.set(x, sequence)),
                ("slot", 2**32, batch.clear),
                ("new_tokens", 2**32, batch.begin_step),
                ("layer", 2**32, lambda x: sequence.append(x, k, v)),
                ("layer", 2**32, sequence.length),
                ("layer", 2**32, runtime.kv_heads),
                ("layer", 2**32, lambda x: batch.report(x, k)),
                ("layer", 2**32, lambda x: batch.attend(x, k)),
                ("capacity", 2**32, lambda x: batch.selection(0, k, x)),
                ("tokens", FIRST_64, sequence.truncate),
                ("tokens", FIRST_64, sequence.reserve),
                ("id", FIRST_64, sequence.fork),
                ("tenant", FIRST_64, runtime.tenant_use),
                ("tenant", FIRST_64, lambda x: runtime.limit_tenant(x, 1 << 20)),
                ("host_bytes", FIRST_64, lambda x: runtime.limit_tenant(7, x)),
                ("stream", FIRST_64, lambda x: batch.attend(0, k[:1, :1].repeat(6, 1), stream=x)),
            ]
            for name in ("id", "reserve_tokens", "tenant"):
                for call in (
                    runtime.sequence,
                    lambda **given: runtime.restore(path, **given),
                    lambda **given: runtime.restore_prefix(b"salt", tokens, **given),
                ):
                    calls.append((name, FIRST_64, lambda x, n=name, c=call: c(**{n: x})))
            for name, unit, call in calls:
                for given in (unit, unit + 1, -unit, 3 * unit + 1):
                    self.refused(f"{name} is {given}, must be ", call, given)
                for given in (0.0, "0", None, [0]):
                    if name != "stream":
                        self.refused(f"{name} is .*, must be a whole number", call, given)
                if name in ("tokens", "reserve_tokens"):  # narrower than their type, by one text
                    for given in (-1, 2**31 + 1, 2**63 - 1, 2**63, 2**200):
                        self.refused(f"{name} is {given}, must be 0 to {2**31}$", call, given)
        self.assertEqual((sequence.length(), runtime.stats().sequences), (600, 1))

    def test_texts_with_a_zero_byte(self):
        runtime = self.runtime()
        sequence, _, _ = self.filled(runtime, 300)
        with tempfile.TemporaryDirectory() as folder:
            for path in (f"{folder}/kv\0.old", os.fsencode(folder) + b"/kv\0"):
                for call in (sequence.save, sequence.hibernate, runtime.restore):
                    self.refused("path is .*, must have no zero byte", call, path)
            for path in (3, None, "\ud800"):
                for call in (sequence.save, sequence.hibernate, runtime.restore):
                    self.refused("path is .*, must be a str, bytes or os.PathLike", call, path)
            self.assertEqual(os.listdir(folder), [])

    def test_arguments_of_other_kinds(self):
        runtime = self.runtime()
        sequence, k, _ = self.filled(runtime, 300)
        batch = runtime.batch(1)
        tokens = np.arange(300, dtype=np.int32)
        for salt in ("model", 5, None, ""):
            self.refused("salt is .*, must be bytes", sequence.save_prefix, salt, tokens)
            self.refused("salt is .*, must be bytes", runtime.restore_prefix, salt, tokens)
            self.refused("salt is .*, must be bytes", runtime.forget_prefixes, salt)
        self.refused("salt_bytes is 0", sequence.save_prefix, b"", tokens)
        for tier in ("Disk", 3, vattn.Policy.TOPK, None):
            self.refused("tier is .*, must be", sequence.save_prefix, b"a", tokens, tier)
            self.refused("tier is .*, must be", runtime.restore_prefix, b"a", tokens, tier=tier)
        for other in (None, runtime, 1):
            self.refused("sequence is .*, must be a Sequence", batch.set, 0, other)
        self.refused("report has no 'errors', must be one of lse", batch.report, 0, k, "errors")
        step = {"q": k[:1, :1].repeat(6, 1), "k_new": k[:1], "v_new": k[:1]}
        for other in ("lse", ["lse"], {"lse": k}, 1):
            self.refused("report is .*, must be a Report", batch.attend, 0, **step, report=other)
            for call in (batch.select, batch.attend_selected):
                self.refused(
                    "selection is .*, must be a Selection", call, 0, **step, selection=other
                )


if __name__ == "__main__":
    import unittest

    unittest.main()
