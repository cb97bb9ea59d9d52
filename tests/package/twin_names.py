"""Names of twins: every kernels/cuda/X.cu or X.cuh has a kernels/cpu/X.cc or X.h.

  twin_names.py ROOT

A CUDA file without a twin stands in the table under "CUDA files without a twin" of kernels/METHOD.md,
with the reason. A row whose file is not there, or has a twin, is a fault too.
"""
import pathlib
import re
import sys

HEADING = "### CUDA files without a twin"


def listed(page):
    """The files of the table under HEADING, with their reasons."""
    lines = page.read_text().split("\n")
    if HEADING not in lines:
        sys.exit(f"{page}: no heading '{HEADING}'")
    rows = {}
    for line in lines[lines.index(HEADING) + 1:]:
        if line.startswith("#"):
            break
        row = re.fullmatch(r"\| (`[^|]+`) \| ([^|]*) \|", line.rstrip())
        if row:
            for name in re.findall(r"`([^`]+)`", row[1]):
                rows[name] = row[2].strip()
    return rows


def main(root):
    cpu = {path.stem for path in (root / "kernels/cpu").glob("*.*")}
    cuda = [path for path in sorted((root / "kernels/cuda").iterdir()) if path.suffix in (".cu", ".cuh")]
    page = root / "kernels/METHOD.md"
    if not cpu or not cuda:
        sys.exit(f"{root}: kernels/cpu or kernels/cuda is empty")
    rows, faults = listed(page), []
    for path in cuda:
        if path.stem not in cpu and path.name not in rows:
            faults.append(f"{path.relative_to(root)}: no kernels/cpu/{path.stem}.cc or .h, and no row "
                          f"under '{HEADING}' of kernels/METHOD.md")
        if path.stem in cpu and path.name in rows:
            faults.append(f"kernels/METHOD.md: {path.name} has a twin and needs no row")
    for name, reason in rows.items():
        if not (root / "kernels/cuda" / name).exists():
            faults.append(f"kernels/METHOD.md: kernels/cuda/{name} is not there")
        if not reason:
            faults.append(f"kernels/METHOD.md: {name} has no reason")
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
