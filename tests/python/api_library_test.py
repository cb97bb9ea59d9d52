"""Which library the package loads, and what it says of one that is not its own."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import vattn


class Library(unittest.TestCase):
    def imported(self, library):
        """The last line of an import with VATTN_LIBRARY=library."""
        package = str(pathlib.Path(vattn.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", "import vattn; print('imported')"],
            env=os.environ | {"VATTN_LIBRARY": str(library), "PYTHONPATH": package},
            capture_output=True,
            text=True,
        )
        return (done.stdout + done.stderr).strip().splitlines()[-1]

    def test_of_another_library(self):
        for name in ("libc.so.6", "libm.so.6"):
            said = self.imported(name)
            self.assertIn(f"ImportError: {name} is not the libvattn of this package", said)
            self.assertIn("it has no vattn_version", said)
            self.assertIn("VATTN_LIBRARY", said)

    def test_of_no_library(self):
        with tempfile.TemporaryDirectory() as folder:
            text = pathlib.Path(folder) / "libvattn.so"
            text.write_text("not a library")
            for path in (text, folder, f"{folder}/missing.so"):
                said = self.imported(path)
                self.assertIn("ImportError: libvattn cannot be loaded: ", said)
                self.assertIn(str(path), said)

    def test_of_another_build(self):
        """A library that has the version, and lacks what the package needs."""
        source = 'const char* vattn_version(void) { return "%s"; }'
        with tempfile.TemporaryDirectory() as folder:
            for version, text in (
                (vattn.__version__, "it has no vattn_last_error"),
                ("7.1.0", "is vattn 7.1.0; this package needs "),
            ):
                library = f"{folder}/libold-{version}.so"
                made = subprocess.run(
                    ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library],
                    input=source % version,
                    text=True,
                    capture_output=True,
                )
                if made.returncode != 0:
                    self.skipTest(f"no C compiler: {made.stderr}")
                said = self.imported(library)
                self.assertIn(f"ImportError: {library} is", said)
                self.assertIn(text, said)


if __name__ == "__main__":
    unittest.main()
