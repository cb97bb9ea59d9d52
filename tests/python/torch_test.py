"""The package over tensors of torch: the same memory, the current stream, the CPU and CUDA."""

import unittest
import warnings

import numpy as np
import torch
import vattn
from fixture import DIM, OPTIONS, Q_HEADS, attend, queries, relative_error, rows

HAS_CUDA = torch.cuda.is_available() and bool(vattn.devices())


class Tensors:
    """The tests; `device` is set below."""

    device = ""

    def setUp(self):
        self.runtime = vattn.Runtime(**OPTIONS | {"backend": self.device, "policy": "dense"})
        self.addCleanup(self.runtime.close)
        self.k, self.v = rows(1500, 1)
        self.new_k, self.new_v = rows(1, 2)
        self.q = queries(1, 3)
        self.want = attend(
            self.q[0], np.concatenate([self.k, self.new_k]), np.concatenate([self.v, self.new_v])
        )

    def tensor(self, array):
        return torch.from_numpy(array).to(self.device)

    def batch(self):
        sequence = self.runtime.sequence()
        # By head, as models keep them: [heads, tokens, dim] seen as [tokens, heads, dim].
        by_head = [
            self.tensor(x).transpose(0, 1).contiguous().transpose(0, 1) for x in (self.k, self.v)
        ]
        sequence.append(0, *by_head, q=self.tensor(queries(100, 4)))
        batch = self.runtime.batch(1)
        batch.set(0, sequence)
        return batch

    def test_attend(self):
        batch = self.batch()
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        report = batch.report(0, q)
        batch.begin_step()
        out = batch.attend(0, q, k, v, report=report)
        self.assertEqual(
            (out.device.type, out.dtype, out.shape), (self.device, torch.float32, q.shape)
        )
        self.assertLess(relative_error(out[0].cpu().numpy(), self.want), 1e-5)
        self.assertEqual(report.verdict.tolist(), [[vattn.Verdict.EXACT] * Q_HEADS])
        self.assertEqual(report.error.count_nonzero(), 0)

    def test_a_dimension_of_one_and_an_output_of_the_caller(self):
        batch = self.batch()
        q, k, v = (self.tensor(x)[:, None] for x in (self.q, self.new_k, self.new_v))
        out = torch.empty(1, 1, Q_HEADS, DIM, dtype=torch.bfloat16, device=self.device)
        batch.begin_step()
        self.assertIs(batch.attend(0, q, k, v, out=out), out)
        self.assertLess(relative_error(out[0, 0].float().cpu().numpy(), self.want), 1e-2)

    def test_bfloat16(self):
        runtime = vattn.Runtime(
            **OPTIONS | {"backend": self.device, "policy": "dense", "dtype": "bf16"}
        )
        self.addCleanup(runtime.close)
        sequence = runtime.sequence()
        sequence.append(0, *(self.tensor(x).bfloat16() for x in (self.k, self.v)))
        batch = runtime.batch(1)
        batch.set(0, sequence)
        batch.begin_step()
        out = batch.attend(
            0, *(self.tensor(x).bfloat16() for x in (self.q, self.new_k, self.new_v))
        )
        self.assertEqual(out.dtype, torch.bfloat16)
        self.assertLess(relative_error(out[0].float().cpu().numpy(), self.want), 4e-2)

    def test_other_types_are_refused(self):
        batch = self.batch()
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "q has elements of torch.float64"):
            batch.attend(0, self.tensor(self.q).double())
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "q is on device meta"):
            batch.attend(0, torch.empty(1, Q_HEADS, DIM, device="meta"))

    def test_expanded_tensors_count_as_torch_reads_them(self):
        k, v, new_k, new_v = map(self.tensor, (self.k, self.v, self.new_k, self.new_v))
        for given in (
            (k[:, :1].expand_as(k), v),
            (k, v[:, :1].expand_as(v)),
            (k[:1].expand_as(k), v[:1, :1].expand_as(v)),
            (k[::2], v[:1].expand_as(v[::2])),
        ):
            sequence = self.runtime.sequence()
            sequence.append(0, *given, q=self.tensor(queries(9, 4)[:, :1]).expand(9, Q_HEADS, DIM))
            batch = self.runtime.batch(1)
            batch.set(0, sequence)
            batch.begin_step()
            out = batch.attend(0, self.tensor(self.q), new_k, new_v)
            seen = [torch.cat([x, y]).cpu().numpy() for x, y in zip(given, (new_k, new_v))]
            self.assertLess(relative_error(out[0].cpu().numpy(), attend(self.q[0], *seen)), 1e-4)
        batch.begin_step()
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "k_new .* must be contiguous"):
            batch.attend(0, self.tensor(self.q), new_k[:, :1].expand_as(new_k), new_v)

    def test_what_requires_grad_is_refused(self):
        """There is no gradient through the library: as numpy, it does not drop one silently."""
        batch, sequence = self.batch(), self.runtime.sequence()
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        weight = torch.ones((), device=self.device, requires_grad=True)
        batch.begin_step()
        for name, given in (
            ("q", (q * weight, k, v)),
            ("k_new", (q, k * weight, v)),
            ("v_new", (q, k, torch.nn.Parameter(v))),
        ):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, f"{name} requires grad"):
                batch.attend(0, *given)
        with self.assertRaisesRegex(vattn.InvalidArgumentError, "k requires grad.*detach"):
            sequence.append(0, k * weight, v)
        with torch.no_grad():  # whoever says so wants none
            sequence.append(0, torch.nn.Parameter(k), v)
            out = batch.attend(0, q * weight, torch.nn.Parameter(k), v)
        self.assertLess(relative_error(out[0].cpu().numpy(), self.want), 1e-5)

    def test_tensors_that_mean_more_than_their_memory_are_refused(self):
        batch = self.batch()
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        lazy = torch._neg_view(q)
        self.assertTrue(lazy.is_neg())
        with warnings.catch_warnings(action="ignore"):  # that masked tensors are a prototype
            masked = torch.masked.masked_tensor(q, q > 0)
        batch.begin_step()
        for tensor, text in (
            (lazy, "q is a negated view"),
            (q.to_sparse(), "q is a torch.sparse_coo"),
            (masked, "q is a masked tensor"),
        ):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, text):
                batch.attend(0, tensor, k, v)

    def paged(self):
        """A pool of 100 blocks in host memory, where a device can read it."""
        pool = torch.zeros(2, 100, 16, *self.k.shape[1:], pin_memory=self.device == "cuda")
        return self.runtime.paged(
            pool[:1], pool[1:], max_tokens=1600, max_requests=2, max_query_tokens=2
        )

    def paged_step(self, length):
        """Arrays of begin_step: a request in blocks 99, 98, ... whose last token asks, and none."""
        table = torch.arange(99, -1, -1, dtype=torch.int32).repeat(2, 1)
        numbers = ([length, 0], [0, 1, 1], [1, -1])
        arrays = [table, *(torch.tensor(n, dtype=torch.int32) for n in numbers)]
        return [array.to(self.device) for array in arrays]

    def paged_slots(self, first, end):
        places = torch.arange(first, end)
        return ((99 - places // 16) * 16 + places % 16).to(self.device)

    def test_paged(self):
        paged = self.paged()
        q, *new = map(self.tensor, (self.q, self.new_k, self.new_v))
        paged.write(0, self.paged_slots(0, 1500), *map(self.tensor, (self.k, self.v)))
        paged.write(0, self.paged_slots(1500, 1501), *new)
        paged.begin_step(*self.paged_step(1501), num_query_tokens=1)
        report = paged.report(0, q)
        out = paged.attend(0, q, report=report)
        self.assertEqual(out.device.type, self.device)
        self.assertLess(relative_error(out[0].cpu().numpy(), self.want), 1e-5)
        self.assertEqual(report.verdict.tolist(), [[vattn.Verdict.EXACT] * Q_HEADS])

    def test_options_of_torch(self):
        for dtype, kind in (
            (torch.float32, vattn.DType.F32),
            (torch.float16, vattn.DType.F16),
            (torch.bfloat16, vattn.DType.BF16),
        ):
            options = OPTIONS | {
                "backend": self.device,
                "dtype": dtype,
                "num_layers": torch.tensor(2),
                "layer_kv_heads": torch.tensor([2, 1]),
                "epsilon": torch.tensor(0.25),
                "prefault": torch.tensor(True),
            }
            with vattn.Runtime(**options) as runtime:
                kept = runtime.options
            self.assertEqual((kept["dtype"], kept["layer_kv_heads"]), (kind, [2, 1]))
            self.assertEqual((kept["epsilon"], kept["prefault"]), (0.25, 1))
        for wrong in ({"dtype": torch.float64}, {"num_layers": torch.tensor([1, 2])}):
            with self.assertRaisesRegex(vattn.InvalidArgumentError, f"{[*wrong][0]} is "):
                vattn.Runtime(**OPTIONS | wrong)


class OnCpu(Tensors, unittest.TestCase):
    device = "cpu"


@unittest.skipUnless(HAS_CUDA, "no CUDA device, or a build without CUDA")
class OnCuda(Tensors, unittest.TestCase):
    device = "cuda"

    def test_streams(self):
        batch, stream = self.batch(), torch.cuda.Stream()
        waiting = torch.cuda.Stream()
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # the current stream is taken
            torch.cuda._sleep(100_000_000)
            late = q * 1
            batch.begin_step()
            out = batch.attend(0, late, k, v)
        waiting.wait_stream(stream)
        with torch.cuda.stream(waiting):
            copied = out.cpu()
        self.assertLess(relative_error(copied[0].numpy(), self.want), 1e-5)

    def test_a_captured_step_of_a_pool(self):
        paged, stream = self.paged(), torch.cuda.Stream()
        paged.write(0, self.paged_slots(0, 1500), *map(self.tensor, (self.k, self.v)))
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        arrays, slots, out = self.paged_step(1), self.paged_slots(0, 1) - 1600, torch.zeros_like(q)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            paged.begin_step(*arrays, num_query_tokens=1)
            paged.write(0, slots, k, v)
            paged.attend(0, q, out=out)
        slots.copy_(self.paged_slots(1500, 1501))
        for length in (700, 1501):  # the token that is written is seen by the longer one alone
            arrays[1].copy_(torch.tensor([length, 0], dtype=torch.int32))
            graph.replay()
            torch.cuda.synchronize()
            pairs = (self.k, self.new_k), (self.v, self.new_v)
            want = attend(self.q[0], *(np.concatenate(pair)[:length] for pair in pairs))
            self.assertLess(relative_error(out[0].cpu().numpy(), want), 1e-5)
        paged.close()

    def test_host_arrays_on_a_cuda_runtime(self):
        batch = self.batch()
        batch.begin_step()
        out = batch.attend(0, self.q, self.new_k, self.new_v)
        self.assertIsInstance(out, np.ndarray)
        self.assertLess(relative_error(out[0], self.want), 1e-5)

    def test_arrays_in_two_places_are_refused(self):
        batch = self.batch()
        batch.begin_step()
        with self.assertRaisesRegex(
            vattn.InvalidArgumentError, "k_new is in host memory, must be where q is"
        ):
            batch.attend(0, self.tensor(self.q), self.new_k, self.new_v)

    def test_cuda_array_interface(self):
        class Other:
            def __init__(self, tensor):
                self.__cuda_array_interface__ = tensor.__cuda_array_interface__ | {"stream": 1}
                self.tensor = tensor

        batch = self.batch()
        q, k, v = map(self.tensor, (self.q, self.new_k, self.new_v))
        out = torch.empty_like(q)
        torch.cuda.synchronize()
        batch.begin_step()
        batch.attend(0, *map(Other, (q, k, v)), out=Other(out))
        self.assertLess(relative_error(out[0].cpu().numpy(), self.want), 1e-5)


if __name__ == "__main__":
    unittest.main()
