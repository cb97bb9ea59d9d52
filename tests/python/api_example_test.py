"""The example of an engine with a pool of its own runs, and its answers are verified."""

import pathlib
import re
import subprocess
import sys
import unittest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "paged_engine.py"


class Example(unittest.TestCase):
    def test_paged_engine(self):
        done = subprocess.run(
            [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(re.findall(r"^step \d: .*\d+ verified", done.stdout, re.M)), 8)
        self.assertIn("125 shared", done.stdout)
        self.assertNotIn("best_effort", done.stdout)
        read = int(re.search(r"(\d+)% of the middle", done.stdout).group(1))
        self.assertLess(read, 50)


if __name__ == "__main__":
    unittest.main()
