"""The logic of bench/quality.py: tasks, scores, intervals, budgets, tables; then a tiny model."""

import contextlib
import io
import json
import math
import pathlib
import sys
import tempfile
import unittest
from unittest import mock

import numpy as np
import torch
from small_models import CUDA, llama, make

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "bench"))

import decode_speed
import quality as _package  # noqa: F401  the folder, whose modules follow
from quality import decode, measure, models, policies, report, statistics, tasks


def words(what):
    return len(what.split())


class Tasks(unittest.TestCase):
    def test_document_follows_from_seed(self):
        for seed in (4, 7):
            one, same, other = (tasks.document(s, 2000, 2, words) for s in (seed, seed, seed + 2))
            self.assertEqual(one, same)
            self.assertNotEqual(one.text, other.text)
            self.assertLessEqual(words(one.text), 2000)
            self.assertGreater(words(one.text), 1800)
        self.assertEqual(
            [tasks.document(s, 2000, 1, words).kind for s in (2, 3)], ["source", "prose"]
        )

    def test_every_answer_is_in_the_text_and_every_task_is_asked(self):
        for seed in range(8):
            document = tasks.document(seed, 2500, 2, words)
            asked = [question.task for question in document.questions]
            self.assertEqual(set(asked), set(tasks.TASKS))
            for task in tasks.TASKS:
                self.assertEqual(asked.count(task), 1 if task == "frequent" else 2)
            for question in document.questions:
                self.assertEqual(tasks.score(document.text, question.expected), 1, question)

    def test_answers_cannot_be_read_off_the_question(self):
        for seed in range(8):
            for question in tasks.document(seed, 2500, 2, words).questions:
                self.assertEqual(tasks.score(question.text, question.expected), 0, question)
                self.assertEqual(tasks.score(question.lead, question.expected), 0, question)

    def test_chains_stand_in_order(self):
        document = tasks.document(5, 2500, 2, words)
        for question in document.questions:
            if question.task == "variables":
                first, second, third = question.expected
                places = [
                    document.text.index(line)
                    for line in (f"{first} = ", f"{second} = {first}", f"{third} = {second}")
                ]
                self.assertEqual(places, sorted(places))

    def test_scores(self):
        for answer, expected, want in (
            ("It is 12345.", ("12345",), 1),
            ("It is 123456.", ("12345",), 0),
            ("12345, 67890", ("12345", "67890", "11111"), 2 / 3),
            ("ends  IN\nthree words!", ("in three words",), 1),
            ("VAR_AB1", ("VAR_AB",), 0),
            ("", ("x",), 0),
        ):
            self.assertAlmostEqual(tasks.score(answer, expected), want, msg=answer)

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "each task are 4, must be 1 to 3"):
            tasks.document(0, 2000, 4, words)
        with self.assertRaisesRegex(ValueError, "are 999, must be 1000"):
            tasks.document(0, 999, 1, words)


class Statistics(unittest.TestCase):
    def test_interval_covers_the_mean(self):
        rng = np.random.default_rng(1)
        covered = 0
        for trial in range(100):
            groups = rng.normal(3, 1, (20, 1)) + rng.normal(0, 0.1, (20, 4))
            found = statistics.bootstrap(groups.tolist(), trial)
            self.assertAlmostEqual(found.mean, groups.mean())
            covered += found.low <= 3 <= found.high
            self.assertLess(found.high - found.low, 1.5)
        self.assertGreaterEqual(covered, 85)  # were groups taken apart, about 60

    def test_pairs_share_what_is_hard(self):
        rng = np.random.default_rng(2)
        base = rng.normal(0, 10, (30, 3))
        better = base + 0.5 + rng.normal(0, 0.1, (30, 3))
        found = statistics.difference(better.tolist(), base.tolist())
        self.assertAlmostEqual(found.mean, 0.5, delta=0.05)
        self.assertLess(found.high - found.low, 0.1)
        with self.assertRaisesRegex(ValueError, "same observations"):
            statistics.difference([[1.0, 2.0]], [[1.0]])

    def test_few_observations(self):
        one = statistics.bootstrap([[1.0, 0.0]])
        self.assertEqual((one.mean, one.low, one.high), (0.5, -math.inf, math.inf))
        with self.assertRaisesRegex(ValueError, "no observations"):
            statistics.bootstrap([[], []])


class Budgets(unittest.TestCase):
    def test_match_finds_equal_shares(self):
        def share(options):
            if options["policy"] == "topk":
                return min(1, 2.5 * options["topk_share"] ** 0.9)
            fixed = 2.5 * options["topk_share"] ** 0.9 + options["base_share"]
            return min(1, fixed + 0.001 / options["epsilon"] ** 2)

        for target in (0.01, 0.03, 0.2):
            for options in policies.match(target, share).values():
                self.assertAlmostEqual(share(options) / target, 1, delta=0.04)


class Words:
    """A tokenizer of 80 words' hashes, without a chat's frame."""

    eos_token_id = 0

    def __call__(self, what, add_special_tokens):
        return mock.Mock(input_ids=[1 + sum(map(ord, word)) % 80 for word in what.split()])

    def decode(self, ids):
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "question : " + messages[0]["content"]


class SmallModel:
    """The tests; `device` is set below."""

    device = ""

    def setUp(self):
        model = make(llama, torch.device(self.device))
        self.model = models.Loaded("small", model, Words())
        self.options = {"exact_below": 64, "sinks": 16, "window": 16, "num_threads": 1}

    def row(self, tokens=300, seed=3):
        ids = torch.randint(
            1, 89, (tokens,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        context = decode.Context(self.model.model, ids[:-20])
        return decode.Row(context, context.extend(ids[-20:])), ids

    def test_every_cache_continues_as_the_stock_model(self):
        """Rows of unequal length from one context, prefilled in two parts."""
        row, ids = self.row()
        other = decode.Row(row.context, row.context.extend(ids[-12:]))
        want = []
        for tail in (ids[-20:], ids[-12:]):
            whole = torch.tensor([ids[:-20] + tail], device=self.device)
            out = self.model.model.generate(
                whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=12
            )
            want.append(out[0, whole.shape[1] :].tolist())
        with decode.Decoder([row, other], self.options | {"policy": "dense"}, 12) as decoder:
            self.assertEqual(decode.greedy(decoder, 12, {0}), want)
            self.assertEqual(policies.shares(decoder.stats()).selected, 1)
        with decode.Decoder([row], None, 12) as decoder:
            self.assertEqual(decode.greedy(decoder, 12, {0}), want[:1])

    def test_answers_end(self):
        row, _ = self.row()
        with decode.Decoder([row], None, 12) as decoder:
            whole = decode.greedy(decoder, 12, {0})[0]
        with decode.Decoder([row], None, 12) as decoder:
            end = whole[4]
            self.assertEqual(decode.greedy(decoder, 12, {end})[0], whole[: whole.index(end)])

    def test_run_and_tables(self):
        names = ("dense", policies.MATCHED, "topk", "topk-uniform")
        plan = measure.Plan(1300, 1, 2, 1, 4, 2, 64, names, self.options)
        clock = measure.Clock(plan.minutes)
        with contextlib.redirect_stderr(io.StringIO()):
            budgets, others = (measure.Budgets(plan, clock) for _ in range(2))
            found = list(measure.run_tasks(self.model, plan, budgets, clock))
            texts = list(measure.run_agreement(self.model, plan, others, clock))
        self.assertEqual([record["kind"] for record in found], ["prose", "source"])
        for record in found:
            shares = [record["policies"][name]["selected"] for name in names]
            self.assertEqual(shares[0], 1)
            self.assertLess(max(shares[1:]), 1)
            self.assertEqual(record["policies"]["dense"]["same"], [1] * 7)
        for name in (measure.STOCK, policies.MATCHED):
            figures = texts[0]["policies"][name]
            self.assertEqual(len(figures["kl"]), 2)
            self.assertLess(np.mean(figures["kl"]), 1e-5 if name == measure.STOCK else 1)
        result = {
            "model": "small", "dtype": "float32", "device": self.device, "tokens": 1300, "seed": 1,
            "head_dim": 32, "row_bytes": 256, "policies": names,
            "options": {"documents": budgets.options, "texts": others.options},
            "documents": found, "texts": texts,
        }  # fmt: skip
        printed = report.tables(json.loads(json.dumps(result)))
        for line in (
            "| multi-value | 2 |",
            "| all | 14 |",
            "128 tokens of 2 texts",
            "| stock | 100.0",
        ):
            self.assertIn(line, printed)

    def test_minutes_end_a_run(self):
        plan = measure.Plan(1300, 1, 2, 1, 4, 1, 64, ("dense",), self.options, minutes=0)
        clock = measure.Clock(plan.minutes)
        self.assertEqual(list(measure.run_tasks(self.model, plan, mock.Mock(), clock)), [])

    def test_decode_speed(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "speed.json")
            arguments = (
                f"--shape small --device {self.device} --dtype float32 --tokens 1500 --steps 2 "
                "--rounds 2 --threads 1 --json"
            )
            printed = io.StringIO()
            with (
                mock.patch.object(sys, "argv", ["decode_speed.py", *arguments.split(), str(path)]),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                decode_speed.main()
            rows = json.loads(path.read_text())["rows"]
        self.assertEqual(rows[0]["name"], decode_speed.ON_DEVICE)
        self.assertEqual(len(rows), 4 if self.device == "cpu" else 5)
        for row in rows:
            self.assertGreater(row["ms_a_token"], 0)
            self.assertIn(f"| {row['name']} |", printed.getvalue())
        self.assertEqual(rows[-1]["selected"], 1)


class OnCpu(SmallModel, unittest.TestCase):
    device = "cpu"

    def test_refusals(self):
        with mock.patch.object(torch.cuda, "is_available", return_value=False):
            with self.assertRaisesRegex(ValueError, "--device cuda: torch sees no CUDA device"):
                models.place("cuda", None)
        for name, text in (("none.gguf", "no such file"), ("no-such-package", "is not installed")):
            with self.assertRaisesRegex(ValueError, text):
                models.find(name)


@unittest.skipUnless(CUDA, "no CUDA device, or a build without CUDA")
class OnCuda(SmallModel, unittest.TestCase):
    device = "cuda"


if __name__ == "__main__":
    unittest.main()
