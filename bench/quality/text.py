"""Real text that comes with Python: sources of the standard library, and prose about it."""

import pathlib
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator

KINDS = ("source", "prose")
_SKIPPED = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def passages(kind: str, seed: int) -> Iterator[str]:
    """The texts of one kind without end, in an order that the seed gives.

    source: modules of the standard library, of 4 to 80 KB. prose: chapters of the language
    reference as `help()` shows them, of 2 KB or more.
    """
    if kind == "source":
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            path
            for path in library.rglob("*.py")
            if not _SKIPPED & set(path.relative_to(library).parts)
            and 4000 <= path.stat().st_size <= 80000
        )
        texts = [(path.read_text, {"encoding": "utf-8", "errors": "replace"}) for path in files]
    elif kind == "prose":
        chapters = pydoc_data.topics.topics
        texts = [
            (chapters[name].__str__, {}) for name in sorted(chapters) if len(chapters[name]) >= 2000
        ]
    else:
        raise ValueError(f"kind is {kind}, must be one of {', '.join(KINDS)}")
    random.Random(f"{kind} {seed}").shuffle(texts)
    while True:
        for read, arguments in texts:
            yield read(**arguments)


def lines(kind: str, seed: int) -> Iterator[str]:
    """The lines of `passages`, each with its end; runs of empty ones become one."""
    empty = True
    for passage in passages(kind, seed):
        for line in passage.splitlines():
            if line.strip() or not empty:
                yield line.rstrip() + "\n"
            empty = not line.strip()
