"""Random rows and queries, and attention over them in float64."""
import numpy as np

Q_HEADS, KV_HEADS, DIM = 6, 2, 32
OPTIONS = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim_k": DIM, "head_dim_v": DIM,
           "dtype": "f32", "backend": "cpu", "host_bytes": 64 << 20}


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
