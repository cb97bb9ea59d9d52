"""Counters, from the workers that have them to the process whose /metrics shows them."""

import atexit
import os
import pathlib
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._pool import Pool

_FOLDER = "VATTN_VLLM_COUNTERS"  # inherited by the processes that vLLM starts
_SECONDS = 0.5  # between two looks at the counters

_collecting = False
_publishers: dict[int, "_Publisher"] = {}


def collect_here() -> None:
    """Names the folder for counters, and shows what is in it: in vLLM's first process."""
    global _collecting
    if _collecting or _FOLDER in os.environ:
        return
    _collecting = True
    folder = pathlib.Path(tempfile.gettempdir()) / f"vattn-vllm-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    os.environ[_FOLDER] = str(folder)
    owner = os.getpid()
    atexit.register(lambda: owner == os.getpid() and shutil.rmtree(folder, ignore_errors=True))
    from prometheus_client import REGISTRY

    REGISTRY.register(_Collector())


def counters() -> dict[str, float]:
    """The counters of this process' engine by name, over all of its workers."""
    sums: dict[str, float] = {}
    for _, _, _, name, value in _read():
        sums[name] = sums.get(name, 0.0) + value
    return sums


def publish(pool: "Pool", rank: int) -> None:
    """Writes a pool's counters for the first process to read, as long as this process lives."""
    _publishers[id(pool)] = _Publisher(pool, rank, len(_publishers))


def withdraw(pool: "Pool") -> None:
    """Stops it, before the pool is closed."""
    publisher = _publishers.pop(id(pool), None)
    if publisher is not None:
        publisher.stop()


class _Publisher:
    """A thread that writes a file whenever counters have changed."""

    def __init__(self, pool: "Pool", rank: int, number: int) -> None:
        folder = os.environ.get(_FOLDER)
        self._pool, self._stopped = pool, threading.Event()
        self._file = None if folder is None else pathlib.Path(folder) / f"{rank}-{number}"
        self._thread = threading.Thread(target=self._run, name="vattn counters", daemon=True)
        if self._file is not None:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(self._text())
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and removes the file."""
        self._stopped.set()
        if self._file is not None:
            self._thread.join()
            self._file.unlink(missing_ok=True)

    def _run(self) -> None:
        last = ""
        while not self._stopped.wait(_SECONDS):
            text = self._text()
            if text != last:
                try:
                    self._write(text)
                except FileNotFoundError:
                    return  # the first process has ended, and nobody reads any more
                last = text

    def _text(self) -> str:
        lines = [self._pool.runtime.prometheus()]
        for name, (kind, text, value) in self._pool.counters().items():
            lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n")
        return "".join(lines)

    def _write(self, text: str) -> None:
        assert self._file is not None
        new = self._file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(self._file)


def _read() -> Iterable[tuple[str, str, str, str, float]]:
    """Yields (rank, kind, text, name, value)."""
    from prometheus_client.parser import text_string_to_metric_families

    folder = os.environ.get(_FOLDER)
    if folder is None:
        return
    for file in sorted(pathlib.Path(folder).glob("*-*")):
        if file.suffix == ".new":
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        rank = file.name.split("-")[0]
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield rank, family.type, family.documentation, sample.name, sample.value


class _Collector:
    """What prometheus_client asks when /metrics is read."""

    def describe(self) -> list[Any]:
        """Names are not known before there is a worker."""
        return []

    def collect(self) -> Iterable[Any]:
        """The counters of all workers, with their ranks."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for rank, kind, text, name, value in _read():
            if name not in families:
                make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                families[name] = make(name, text, labels=["rank"])
            families[name].add_metric([rank], value)
        return families.values()
