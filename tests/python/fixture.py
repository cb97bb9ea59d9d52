"""Random rows and queries, attention over them in float64, and runtimes of one layer."""

import unittest

import numpy as np
import vattn

TOKENS = 3000

Q_HEADS, KV_HEADS, DIM = 6, 2, 32
OPTIONS = {
    "num_q_heads": Q_HEADS,
    "num_kv_heads": KV_HEADS,
    "head_dim_k": DIM,
    "head_dim_v": DIM,
    "dtype": "f32",
    "backend": "cpu",
    "host_bytes": 64 << 20,
}


def rows(tokens, seed):
    """k, v [tokens, KV_HEADS, DIM]; v has a mean, so that attention does not cancel."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((tokens, KV_HEADS, DIM), np.float32)
    v = rng.standard_normal((tokens, KV_HEADS, DIM), np.float32) + np.float32(1)
    return k, v


def queries(slots, seed):
    """[slots, Q_HEADS, DIM]."""
    return 3 * np.random.default_rng(seed).standard_normal((slots, Q_HEADS, DIM), np.float32)


def attend(q, k, v):
    """q [Q_HEADS, DIM], k and v [tokens, KV_HEADS, DIM] -> [Q_HEADS, DIM], exact."""
    out = np.empty((Q_HEADS, DIM))
    for head in range(Q_HEADS):
        shared = head // (Q_HEADS // KV_HEADS)
        s = k[:, shared].astype(np.float64) @ q[head] / np.sqrt(DIM)
        p = np.exp(s - s.max())
        out[head] = p @ v[:, shared].astype(np.float64) / p.sum()
    return out


def relative_error(got, want):
    """The largest relative error of a head; got and want [heads, DIM]."""
    return float((np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)).max())


class Dlpack:
    """What a library that speaks DLPack alone hands over."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Fixture(unittest.TestCase):
    def runtime(self, **options):
        runtime = vattn.Runtime(**OPTIONS | options)
        self.addCleanup(runtime.close)
        return runtime

    def filled(self, runtime, tokens=TOKENS, seed=1):
        """A sequence with random rows, and these."""
        k, v = rows(tokens, seed)
        sequence = runtime.sequence()
        sequence.append(0, k, v)
        return sequence, k, v

    def step(self, batch, q, k, v, report=None, **arguments):
        """One decode step of layer 0 with new rows k, v [KV_HEADS, DIM] in every slot."""
        batch.begin_step()
        new = [np.repeat(x[None], batch.slots, 0) for x in (k, v)]
        return batch.attend(0, q, *new, report=report, **arguments)
