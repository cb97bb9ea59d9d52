"""Options, from vLLM's --additional-config."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Options of vattn.Runtime that may be set; the others follow from the model and from vLLM.
_RUNTIME = (
    "preset",
    "policy",
    "epsilon",
    "delta",
    "norm",
    "norm_floor",
    "bound",
    "on_unverified",
    "max_looks",
    "max_selected_share",
    "sinks",
    "window",
    "exact_below",
    "index_bytes",
    "seed",
    "refresh",
    "min_selected",
    "pilot",
    "num_threads",
)
_OWN = ("tables", "rows", "hot_bytes", "host_bytes")
_ROWS = ("auto", "page", "pool")


@dataclass(frozen=True)
class Options:
    """What the user asks of this backend."""

    # File of `python -m vattn.tables`; None: MODEL_FOLDER/vattn.tables if that is there.
    tables: str | None = None
    # Where rows are: in vLLM's pages beside their codes, or in host memory of ours while pages have
    # codes alone. auto: in the pages on the CPU, where these are in host memory as well.
    rows: str = "auto"
    hot_bytes: int = 0  # CUDA: device memory for rows that are read again and again
    host_bytes: int = 0  # most bytes of rows of a worker, 0: what vLLM's number of blocks needs
    runtime: Mapping[str, Any] = field(default_factory=dict)  # for vattn.Runtime

    @property
    def dense(self) -> bool:
        """Whether each row is read in each step, so that there are no codes."""
        return str(self.runtime.get("policy", "verified")).lower() == "dense"


def parse(config: Any) -> Options:
    """Options of a VllmConfig: those under "vattn" in its additional_config."""
    additional = config.additional_config
    given = additional.get("vattn", {}) if isinstance(additional, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ValueError(f"additional_config.vattn is {given!r}, must be an object of options")
    known = (*_OWN, *_RUNTIME)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"additional_config.vattn has no option {name!r}{hint}")
    own = {name: given[name] for name in _OWN if name in given}
    for name in ("hot_bytes", "host_bytes"):
        value = own.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"additional_config.vattn.{name} is {value!r}, must be 0 or more bytes")
    if own.get("rows", "auto") not in _ROWS:
        raise ValueError(
            f"additional_config.vattn.rows is {own['rows']!r}, must be one of {', '.join(_ROWS)}"
        )
    tables = own.get("tables")
    if tables is not None:
        if not isinstance(tables, str):
            raise ValueError(f"additional_config.vattn.tables is {tables!r}, must be a path")
        own["tables"] = os.path.expanduser(tables)
    return Options(**own, runtime={name: given[name] for name in _RUNTIME if name in given})


_last: Options | None = None


def active() -> Options:
    """Options of the configuration that vLLM is starting with, or last started with here.

    vLLM asks a backend for its page before and after it has a configuration at hand.
    """
    from vllm.config import get_current_vllm_config_or_none

    global _last
    config = get_current_vllm_config_or_none()
    if config is not None:
        _last = parse(config)
    if _last is None:
        raise RuntimeError("vattn's options are asked for before vLLM has a configuration")
    return _last
