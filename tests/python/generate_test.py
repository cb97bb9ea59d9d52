"""examples/generate.py answers about a file, goes on talking, and refuses bad arguments."""

import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "generate.py"
MOVED = re.compile(
    r"\[(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) GB moved of ([\d.]+), verified 100.00 %\]"
)


def run(*arguments, questions=""):
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], input=questions, capture_output=True, text=True
    )


class Generate(unittest.TestCase):
    def test_conversation(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write((ROOT / "LICENSE").read_text())
            file.flush()
            done = run(
                "--file",
                file.name,
                "--tokens",
                "1400",
                "--max-new-tokens",
                "12",
                questions="What is the name of this license?\n\nAnd who wrote it?\n",
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("the first 1400 are used", done.stderr)
        self.assertIn("license", done.stdout)
        lines = MOVED.findall(done.stderr)
        self.assertEqual(len(lines), 2, done.stderr)
        for tokens, moved, dense in lines:
            self.assertLessEqual(int(tokens), 12)
            self.assertLess(float(moved), float(dense))

    def test_refusals(self):
        for arguments, text in (
            (["--model", "nowhere.gguf"], "--model nowhere.gguf: no such file"),
            (["--model", "no-such-package"], "is not installed: pip install"),
            ([], "--file nowhere.txt: no such file"),
        ):
            done = run("--file", "nowhere.txt", *arguments)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(text, done.stderr)


if __name__ == "__main__":
    unittest.main()
