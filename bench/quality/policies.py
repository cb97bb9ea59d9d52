"""The policies that are compared, and budgets with which they read as many rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]

BASELINE = "dense"
MATCHED = "verified .1"  # whose rows the policies without a promise get
_VERIFIED = {"policy": "verified", "delta": 0.1}
POLICIES: dict[str, Options] = {
    BASELINE: {"policy": "dense"},
    "verified .05": _VERIFIED | {"epsilon": 0.05},
    MATCHED: _VERIFIED | {"epsilon": 0.1},
    "verified .2": _VERIFIED | {"epsilon": 0.2},
    "verified .1 + 2-bit values": _VERIFIED | {"epsilon": 0.1, "value_bits": 2},
    "topk": {"policy": "topk"},
    "topk-uniform": {"policy": "topk_uniform", "delta": 0.1},
}
_WITHIN = 0.03  # a budget is found when its rows are so close to those of MATCHED
_TRIES = 8


@dataclass(frozen=True)
class Shares:
    """What a policy read."""

    selected: float  # rows read, of the middle
    fetched: float  # of them not in the hot set, of the middle
    whole: float  # query heads read whole because they could not be verified, of all not exact


def shares(stats: Any) -> Shares:
    """Of a runtime's counters."""
    middle = max(1, stats.rows_middle)
    sampled = stats.heads_verified + stats.heads_dense + stats.heads_best_effort
    return Shares(
        stats.rows_selected / middle,
        stats.rows_fetched / middle,
        stats.heads_dense / max(1, sampled),
    )


def match(target: float, measure: Callable[[Options], float]) -> dict[str, Options]:
    """Options of topk and topk-uniform with which they read `target` of the middle.

    measure(options) runs a policy on some prompts and gives its share. topk: its topk_share, which
    counts by query head, so that the union over a group is more. topk-uniform: two fifths of the
    rows are its top-k and one fifth its base sample; epsilon then sizes the rest of the sample.
    """
    top = POLICIES["topk"]
    share = _solve(
        target, target / 3, lambda x: measure(top | {"topk_share": x}), (1e-4, 1.0), rising=True
    )
    fixed = POLICIES["topk-uniform"] | {"topk_share": 0.4 * share, "base_share": 0.2 * target}
    epsilon = _solve(
        target, 0.3, lambda x: measure(fixed | {"epsilon": x}), (0.01, 10.0), rising=False
    )
    return {"topk": top | {"topk_share": share}, "topk-uniform": fixed | {"epsilon": epsilon}}


def _solve(
    target: float,
    start: float,
    measure: Callable[[float], float],
    limits: tuple[float, float],
    rising: bool,
) -> float:
    """x within limits where measure(x), rising or falling with x, is target; of the x tried the one
    that came closest. Interpolates between logarithms, once there are two sides to do so."""
    bottom, top = math.log(limits[0]), math.log(limits[1])
    at, best = math.log(start), (math.inf, math.log(start))
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    for _ in range(_TRIES):
        at = min(max(at, bottom), top)
        off = math.log(max(measure(math.exp(at)), 1e-9) / target)
        best = min(best, (abs(off), at))
        off = off if rising else -off
        if abs(off) < _WITHIN or (off > 0 and at == bottom) or (off < 0 and at == top):
            break
        if off < 0:
            below = (at, off)
        else:
            above = (at, off)
        if below and above:
            part = below[1] / (below[1] - above[1])
            at = below[0] + min(max(part, 0.1), 0.9) * (above[0] - below[0])
        else:
            at -= 1.3 * off
    return math.exp(best[1])
