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
BLOCK = 32  # steps of a text that are taken together: their errors are alike
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
    steps: int  # tokens of a text that are predicted, a multiple of BLOCK
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
    """A record for each text: by policy, means over blocks of BLOCK steps of: does the most likely
    token agree with dense attention; the KL divergence from its distribution; the excess of the
    text's negative log-likelihood over its, in nats. The texts are the rows of one batch."""
    rows, following, records = [], [], []
    for number in range(plan.texts):
        if clock.over():
            break
        seed = plan.seed + 1000 + number
        kind = text.KINDS[seed % 2]
        ids = _long(model, kind, seed, plan.tokens + plan.steps)
        context = decode.Context(model.model, ids[: plan.tokens - 64])
        rows.append(decode.Row(context, context.extend(ids[plan.tokens - 64 : plan.tokens])))
        following.append(ids[plan.tokens :])
        records.append({"seed": seed, "kind": kind, "policies": {}})
        clock.say(f"text {seed}: {kind}, {plan.tokens} tokens")
    if not rows:
        return
    targets = torch.tensor(following, device=model.model.device)
    budgets.find(rows, targets[:, : min(plan.steps, 32)])
    with decode.Decoder(rows, budgets.options[policies.BASELINE], plan.steps) as decoder:
        dense = [logits.log_softmax(1) for logits in decode.forced(decoder, targets)]
    dense_nll = torch.stack([_nll(log, targets[:, i]) for i, log in enumerate(dense)], 1)
    for record, nll in zip(records, dense_nll.mean(1).tolist()):
        record["nll"] = round(nll, 5)
    for name in (STOCK, *plan.policies):
        if name == policies.BASELINE:
            continue
        options = None if name == STOCK else budgets.options[name]
        figures: dict[str, list[torch.Tensor]] = {"agree": [], "kl": [], "excess": []}
        with decode.Decoder(rows, options, plan.steps) as decoder:
            for i, (want, logits) in enumerate(zip(dense, decode.forced(decoder, targets))):
                log = logits.log_softmax(1)
                figures["agree"].append((log.argmax(1) == want.argmax(1)).float())
                figures["kl"].append((want.exp() * (want - log)).sum(1).clamp(min=0))
                figures["excess"].append(_nll(log, targets[:, i]) - dense_nll[:, i])
            read = {} if options is None else _rounded(policies.shares(decoder.stats()))
        by_text = {
            key: torch.stack(steps, 1).view(len(rows), -1, BLOCK).mean(2).tolist()
            for key, steps in figures.items()
        }
        for row, record in enumerate(records):
            record["policies"][name] = read | {
                key: [float(f"{x:.4g}") for x in values[row]] for key, values in by_text.items()
            }
        clock.say(f"  {name}: KL {torch.stack(figures['kl']).mean():.6f}")
    yield from records


def _nll(log: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of targets [rows] under log-probabilities [rows, words]."""
    return -log.gather(1, targets[:, None])[:, 0]


def _long(model: Loaded, kind: str, seed: int, tokens: int) -> list[int]:
    """The first tokens of a text."""
    ids: list[int] = []
    for passage in text.passages(kind, seed):
        ids += _encode(model, passage + "\n\n")
        if len(ids) >= tokens:
            break
    return ids[:tokens]
