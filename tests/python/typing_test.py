"""What mypy says to users of the package: right calls pass, wrong ones do not."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import vattn

# Lines that end in "# wrong" must be refused, no others.
USE = """
import copy
import pathlib

import numpy
import vattn

runtime = vattn.Runtime(num_layers=2, epsilon=0.1, policy="verified", profile=None)
vattn.Runtime(**runtime.options)
vattn.Runtime(policy=vattn.Policy.DENSE, dtype=vattn.DType.BF16, disk_path=pathlib.Path("kv"))
vattn.Runtime(num_layers=numpy.int64(2), epsilon=numpy.float32(0.1), layer_kv_heads=(2, 0))
vattn.Runtime(dtype=numpy.float16, prefault=True, log=lambda level, text: print(level.name, text))
vattn.Runtime(dtype=numpy.dtype("float16"), layer_kv_heads=range(3))
given: vattn.Options = {"epsilon": 0.1}
vattn.Runtime(**given)
vattn.Runtime(epsilom=1)  # wrong
vattn.Runtime(epsilon="0.1")  # wrong
vattn.Runtime(num_layers=1.5)  # wrong
vattn.Runtime(num_layers=None)  # wrong
vattn.Runtime(policy="Dense")  # wrong
vattn.Runtime(policy=vattn.DType.F16)  # wrong
vattn.Runtime(dtype="float64")  # wrong
vattn.Runtime(disk_path=3)  # wrong
vattn.Runtime(log=3)  # wrong
other: vattn.Options = {"epsilom": 0.1}  # wrong
layers: int = runtime.options["num_layers"]
policy: vattn.Policy = runtime.options["policy"]
runtime.options["epsilom"]  # wrong
sequence: vattn.Sequence = copy.deepcopy(runtime.sequence(id=3))
again: vattn.Sequence = sequence.fork()
sequence.truncate("3")  # wrong
sequence.save(b"path")
sequence.save(3)  # wrong
sequence.save_prefix("salt", numpy.zeros(3, numpy.int32))  # wrong
runtime.restore_prefix(b"salt", numpy.zeros(3, numpy.int32), tier="memory")
runtime.restore_prefix(b"salt", numpy.zeros(3, numpy.int32), tier="tape")  # wrong
batch: vattn.Batch = runtime.batch(1)
batch.set(0, runtime)  # wrong
pool = numpy.zeros((2, 10, 16, 2, 64))
paged: vattn.Paged = runtime.paged(pool, [pool[0], None], max_tokens=64, tables="file")
runtime.paged(pool, max_tokens="64")  # wrong
runtime.paged(pool)  # wrong
sequence.save_tables("file", model=3)  # wrong
paged.attend(0, pool, dense=True, report=paged.report(0, pool))
paged.attend(0, pool, report=pool is None)  # wrong
version: str = vattn.__version__
"""


class Typing(unittest.TestCase):
    def test_users_code(self):
        # What is on PYTHONPATH would count as installed, where mypy reports nothing.
        environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "use.py"
            file.write_text(USE)
            checked = subprocess.run(
                [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder, file.name],
                cwd=folder,
                env=environment | {"MYPYPATH": str(pathlib.Path(vattn.__file__).parents[1])},
                capture_output=True,
                text=True,
            )
        # The modules of the package are checked on the way, as strictly.
        errors = re.findall(r"^(\S+?):(\d+): error", checked.stdout, re.M)
        self.assertTrue(errors, checked.stdout + checked.stderr)
        self.assertEqual({name for name, _ in errors}, {"use.py"}, checked.stdout)
        wrong = [n for n, line in enumerate(USE.split("\n"), 1) if line.endswith("# wrong")]
        self.assertEqual(sorted({int(line) for _, line in errors}), wrong, checked.stdout)


if __name__ == "__main__":
    unittest.main()
