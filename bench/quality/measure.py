"""The two measurements: scores of tasks, and agreement with dense attention on long text."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import decode, policies, tasks, text
from .models import Loaded

_MARK = "\0"
_TASK = "Answer with what is asked for and nothing else."
STOCK = "stock"  # transformers' own attention: what rounding alone changes


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    tokens: int  # of a prompt
    seed: int
    documents: int
    each: int  # questions of each task and document
    new_tokens: int  # of an answer, at most
    texts: int
    steps: int  # tokens of a text that are predicted
    policies: tuple[str, ...]
    options: policies.Options = field(default_factory=dict)  # of every policy
    minutes: float = math.inf  # no new document or text is begun after so many


class Clock:
    """Says on stderr what goes on, and when the plan's minutes are over."""

    def __init__(self, minutes: float) -> None:
        self._begin, self._minutes = time.monotonic(), minutes

    def say(self, what: str) -> None:
        """A line with the minutes that have passed."""
        passed = (time.monotonic() - self._begin) / 60
        print(f"[{passed:6.1f} min] {what}", file=sys.stderr, flush=True)

    def over(self) -> bool:
        """Are the minutes over?"""
        return time.monotonic() - self._begin > 60 * self._minutes


class Budgets:
    """The options of each policy; those of the matched ones are found on the first rows seen."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self._plan, self._clock = plan, clock
        self.options = {name: policies.POLICIES[name] | plan.options for name in plan.policies}
        self._open = [name for name in plan.policies if name.startswith("topk")]

    def find(self, rows: list[decode.Row], ids: torch.Tensor) -> None:
        """Matches the budgets over the steps ids [rows, steps], unless that has been done."""
        if not self._open:
            return

        def measure(options: policies.Options) -> float:
            with decode.Decoder(rows, options | self._plan.options, ids.shape[1]) as decoder:
                for _ in decode.forced(decoder, ids):
                    pass
                return policies.shares(decoder.stats()).selected

        target = measure(policies.POLICIES[policies.MATCHED])
        self._clock.say(f"{policies.MATCHED} reads {target:.2%} of the middle")
        found = policies.match(target, measure)
        for name in self._open:
            self.options[name] = found[name] | self._plan.options
            self._clock.say(f"{name}: {found[name]}")
        self._open = []


def _encode(model: Loaded, what: str) -> list[int]:
    ids: list[int] = model.tokenizer(what, add_special_tokens=False).input_ids
    return ids


def _prompt(model: Loaded, question: tasks.Question) -> tuple[str, str]:
    """What a chat's prompt has before the document, and after it: question and begun answer."""
    asked = f"{_MARK}\n\n{question.text} {_TASK}"
    whole = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    before, after = (whole + question.lead).split(_MARK)
    return before, after


def run_tasks(
    model: Loaded, plan: Plan, budgets: Budgets, clock: Clock
) -> Iterator[dict[str, Any]]:
    """A record for each document: scores by policy and question, and what each policy read."""
    ends = {model.tokenizer.eos_token_id}
    for number in range(plan.documents):
        if clock.over():
            return
        seed = plan.seed + number
        room = plan.tokens - 256  # for the chat's frame, the question and the answer
        document = tasks.document(seed, room, plan.each, lambda s: len(_encode(model, s)))
        prompts = [_prompt(model, question) for question in document.questions]
        context = decode.Context(
            model.model, _encode(model, prompts[0][0]) + _encode(model, document.text)
        )
        rows = [decode.Row(context, context.extend(_encode(model, after))) for _, after in prompts]
        clock.say(
            f"document {seed}: {document.kind}, {context.tokens} tokens, {len(rows)} questions"
        )
        record: dict[str, Any] = {
            "seed": seed,
            "kind": document.kind,
            "tasks": [question.task for question in document.questions],
            "tokens": [row.tokens + 1 for row in rows],
            "policies": {},
        }
        dense: list[list[int]] = []
        for name in plan.policies:
            with decode.Decoder(rows, budgets.options[name], plan.new_tokens) as decoder:
                answers = decode.greedy(decoder, plan.new_tokens, ends)
                read = policies.shares(decoder.stats())
            if name == policies.BASELINE:
                dense = answers
                some = slice(None, None, -(-len(rows) // 4))
                budgets.find(rows[some], _padded(answers[some], 12, model))
            said = [model.tokenizer.decode(answer) for answer in answers]
            record["policies"][name] = {
                "scores": [
                    round(tasks.score(answer, question.expected), 4)
                    for answer, question in zip(said, document.questions)
                ],
                "same": [int(a == b) for a, b in zip(answers, dense)],
            } | _rounded(read)
            mean = sum(record["policies"][name]["scores"]) / len(rows)
            clock.say(f"  {name}: {mean:.3f}, {read.selected:.2%} of the middle")
        yield record


def _padded(answers: list[list[int]], steps: int, model: Loaded) -> torch.Tensor:
    """The first tokens of answers, filled up with end tokens, [rows, steps]."""
    end = [model.tokenizer.eos_token_id] * steps
    return torch.tensor([(answer + end)[:steps] for answer in answers], device=model.model.device)


def _rounded(read: policies.Shares) -> dict[str, float]:
    """For a record."""
    return {name: round(value, 5) for name, value in asdict(read).items()}


def run_agreement(
    model: Loaded, plan: Plan, budgets: Budgets, clock: Clock
) -> Iterator[dict[str, Any]]:
    """A record for each text: by policy and step, does the most likely token agree with dense
    attention, the KL divergence from its distribution, and the excess of the text's negative
    log-likelihood over its, in nats."""
    for number in range(plan.texts):
        if clock.over():
            return
        seed = plan.seed + 1000 + number
        kind = text.KINDS[seed % 2]
        ids = _long(model, kind, seed, plan.tokens + plan.steps)
        context = decode.Context(model.model, ids[: plan.tokens - 64])
        row = decode.Row(context, context.extend(ids[plan.tokens - 64 : plan.tokens]))
        clock.say(f"text {seed}: {kind}, {plan.tokens} tokens, then {plan.steps}")
        targets = torch.tensor([ids[plan.tokens :]], device=model.model.device)
        budgets.find([row], targets[:, :48])
        record: dict[str, Any] = {"seed": seed, "kind": kind, "policies": {}}
        dense = _Distributions(row, budgets.options[policies.BASELINE], targets)
        record["nll"] = round(float(dense.nll.mean()), 5)
        for name in (STOCK, *plan.policies):
            if name != policies.BASELINE:
                options = None if name == STOCK else budgets.options[name]
                record["policies"][name] = _compare(row, options, targets, dense)
                kl = sum(record["policies"][name]["kl"]) / plan.steps
                clock.say(f"  {name}: KL {kl:.6f}")
        yield record


class _Distributions:
    """What a policy predicts along a text: log-probabilities [steps, words]."""

    def __init__(
        self, row: decode.Row, options: policies.Options | None, targets: torch.Tensor
    ) -> None:
        with decode.Decoder([row], options, targets.shape[1]) as decoder:
            steps = [logits[0].log_softmax(0) for logits in decode.forced(decoder, targets)]
            self.read = None if options is None else policies.shares(decoder.stats())
        self.log = torch.stack(steps)
        self.nll = -self.log.gather(1, targets.T)[:, 0]


def _compare(
    row: decode.Row,
    options: policies.Options | None,
    targets: torch.Tensor,
    dense: _Distributions,
) -> dict[str, Any]:
    found = _Distributions(row, options, targets)
    kl = (dense.log.exp() * (dense.log - found.log)).sum(1).clamp(min=0)
    figures = {
        "agree": (found.log.argmax(1) == dense.log.argmax(1)).int().tolist(),
        "kl": [float(f"{x:.4g}") for x in kl.tolist()],
        "excess": [float(f"{x:.4g}") for x in (found.nll - dense.nll).tolist()],
    }
    return figures | (_rounded(found.read) if found.read else {})


def _long(model: Loaded, kind: str, seed: int, tokens: int) -> list[int]:
    """The first tokens of a text."""
    ids: list[int] = []
    for passage in text.passages(kind, seed):
        ids += _encode(model, passage + "\n\n")
        if len(ids) >= tokens:
            break
    return ids[:tokens]
