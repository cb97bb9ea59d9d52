"""Fit the linear maps of a sign index on recorded attention (vattn-trace-1), as HashAttention does.

    pip install numpy torch
    python train_sign_index.py --trace notes.safetensors --bytes 4 --out notes.maps
    vattn zoo --trace notes.safetensors --sign-maps notes.maps

For every recorded layer and KV head two maps of 8 * bytes rows are fitted: bit j of a key k is
[key_j . (k - mean key) >= 0], of a query q [query_j . q >= 0], and a key's score grows with the
number of equal bits. HashAttention (Desai et al., ICML 2025) trains through tanh in place of signs,
with binary cross-entropy on whether a key is among the --top largest scores of a query, positives
weighted 20 times. It has small networks where this has linear maps, which cost nothing to scan.

Fitted on the recorded queries of the prompt, so that the decode steps stay unseen: recall on both
is printed. The file is safetensors: F32 key and query [layers, kv_heads, bits, head_dim], metadata
format "vattn-sign-1"; vattn_options.sign_maps reads it for a runtime with these layers.
"""
import argparse
import json
import pathlib
import struct

import numpy as np
import torch

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
POSITIVE_WEIGHT = 20.0


def read_trace(path):
    """Tensors as float32 arrays, and metadata."""
    data = pathlib.Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + begin:8 + length + end], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = raw.astype(np.float32).reshape(entry["shape"])
    return tensors, metadata


def write_maps(path, key, query):
    header = {"__metadata__": {"format": "vattn-sign-1"}}
    at = 0
    for name, tensor in (("key", key), ("query", query)):
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + key.tobytes() + query.tobytes())


def recall(keys, queries, key_map, query_map, share=0.01):
    """Of the `share` of keys with the largest scores, how many the signs find."""
    count = max(1, round(share * len(keys)))
    exact = (queries @ keys.T).topk(count, dim=1).indices
    matches = torch.sign(queries @ query_map.T) @ torch.sign(keys @ key_map.T).T
    found = (matches + torch.rand_like(matches)).topk(count, dim=1).indices  # ties at random
    hits = [len(np.intersect1d(a, b)) for a, b in zip(exact.numpy(), found.numpy())]
    return float(np.mean(hits)) / count


def fit(keys, queries, bits, arguments, generator):
    """Where both maps start, and the maps of centred keys [n, dim] and queries [m, dim]: [bits, dim]."""
    keys, queries = keys / keys.std(), queries / queries.std()  # signs do not see scales
    start = torch.randn(bits, keys.shape[1], generator=generator)
    key_map = (start / (keys @ start.T).std()).requires_grad_()
    query_map = (start / (queries @ start.T).std()).requires_grad_()
    scale = torch.tensor(4.0 / bits**0.5, requires_grad=True)
    threshold = torch.tensor(2.0, requires_grad=True)
    top = (queries @ keys.T).topk(arguments.top, dim=1).indices
    optimizer = torch.optim.Adam([key_map, query_map, scale, threshold], lr=arguments.rate)
    loss_of = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(POSITIVE_WEIGHT))
    for _ in range(arguments.rounds):
        chosen = torch.randint(len(queries), (arguments.batch,), generator=generator)
        others = torch.randint(len(keys), (arguments.others,), generator=generator)
        seen, places = torch.cat([top[chosen].flatten(), others]).unique(return_inverse=True)
        wanted = torch.zeros(arguments.batch, len(seen))
        rows = torch.arange(arguments.batch).repeat_interleave(arguments.top)
        wanted[rows, places[:len(rows)]] = 1
        of_queries = torch.tanh(queries[chosen] @ query_map.T)
        of_keys = torch.tanh(keys[seen] @ key_map.T)
        loss = loss_of(scale * (of_queries @ of_keys.T) - threshold, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return start, key_map.detach(), query_map.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trace", required=True, help="recording with q_prompt")
    parser.add_argument("--out", required=True)
    parser.add_argument("--bytes", type=int, default=4, choices=(4, 8, 16, 32),
                        help="vattn_options.index_bytes")
    parser.add_argument("--layers", help="places in the file, as 0,2 (all)")
    parser.add_argument("--top", type=int, default=32, help="keys that a query should find")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="queries in a round")
    parser.add_argument("--others", type=int, default=2048, help="random keys in a round")
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    tensors, metadata = read_trace(arguments.trace)
    if "q_prompt" not in tensors:
        parser.error(f"--trace: {arguments.trace} has no q_prompt to fit on")
    k, q, q_prompt = tensors["k"], tensors["q"], tensors["q_prompt"]
    layers = [int(x) for x in arguments.layers.split(",")] if arguments.layers else range(len(k))
    kv_heads, dim = k.shape[1], k.shape[3]
    group, bits = q.shape[1] // kv_heads, 8 * arguments.bytes
    prompt = int(metadata["prompt_tokens"])
    generator = torch.Generator().manual_seed(arguments.seed)
    key = np.zeros((len(layers), kv_heads, bits, dim), np.float32)
    query = np.zeros_like(key)
    print("| layer | KV head | recall, random | learned, prompt | learned, unseen steps |")
    print("|---|---|---|---|---|")
    for i, layer in enumerate(layers):
        for head in range(kv_heads):
            keys = torch.from_numpy(k[layer, head, 16:prompt - 128].copy())
            keys -= keys.mean(0)
            heads = slice(head * group, (head + 1) * group)
            known = torch.from_numpy(q_prompt[layer, heads].reshape(-1, dim).copy())
            unseen = torch.from_numpy(q[layer, heads, ::8].reshape(-1, dim).copy())
            start, key_map, query_map = fit(keys, known, bits, arguments, generator)
            print(f"| {layer} | {head} | {recall(keys, unseen, start, start):.3f} "
                  f"| {recall(keys, known[::8], key_map, query_map):.3f} "
                  f"| {recall(keys, unseen, key_map, query_map):.3f} |", flush=True)
            key[i, head], query[i, head] = key_map.numpy(), query_map.numpy()
    write_maps(arguments.out, key, query)


if __name__ == "__main__":
    main()
