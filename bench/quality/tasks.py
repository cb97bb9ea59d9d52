"""Documents of real text with planted lines, and questions about them, after RULER.

One document serves every task: its lines are planted at random depths of the same text, and each
question is asked by itself. Everything follows from the seed (and from the version of Python, whose
own sources and documentation are the text).
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from . import facts, text

TASKS = {
    "single": "one planted line of its kind: its number",
    "multi-key": "one of 8 planted lines that differ in a name: its number",
    "multi-value": "three planted lines about one name: their numbers",
    "multi-query": "three of the 8 lines of multi-key: their numbers",
    "variables": "a variable and two that are set to one another: their names",
    "frequent": "made-up words: the two that occur most often",
    "question": "about the text itself: a base class, default or constant, or how a sentence ends",
}

_SINGLE = ("access code", "phone extension", "inventory count")
_PLACES = (
    "archive cellar harbour library lighthouse museum observatory station theatre vault".split()
)
_FIRST = "amber brave calm distant eager fabled gentle hollow iron jolly keen lively".split()
_SECOND = (
    "anchor badger canyon dolphin ember falcon glacier heron island jasmine kettle lantern".split()
)
_PEOPLE = "Amara Bruno Chidi Daria Emeka Farah Goran Hanne Ilias Jonas Katya Leila".split()
_SYLLABLES = "ba de fi go ku la me ni po ru sa to vu xi ze".split()


@dataclass(frozen=True)
class Question:
    """One sample. The answer begins with `lead`, and is scored by `score`."""

    task: str
    text: str
    lead: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text of at most the tokens asked for, and the questions about it."""

    kind: str
    text: str
    questions: tuple[Question, ...]


def score(answer: str, expected: tuple[str, ...]) -> float:
    """The share of the expected strings that the answer has as words of their own; case and the
    kind of white space do not count."""
    said = " ".join(answer.lower().split())
    found = 0
    for want in expected:
        found += bool(re.search(rf"(?<!\w){re.escape(' '.join(want.lower().split()))}(?!\w)", said))
    return found / len(expected)


def document(seed: int, tokens: int, each: int, count: Callable[[str], int]) -> Document:
    """A document of at most `tokens` tokens as `count` has them, `each` questions of each task.

    Even seeds give source code, odd ones prose. each is 1 to 3.
    """
    if not 1 <= each <= 3:
        raise ValueError(f"questions of each task are {each}, must be 1 to 3")
    if tokens < 1000:
        raise ValueError(f"tokens of a document are {tokens}, must be 1000 or more")
    kind = text.KINDS[seed % 2]
    rng = random.Random(f"document {seed}")
    planted, questions = _plant(rng, each)
    comment = "# " if kind == "source" else ""
    room = tokens - sum(count(comment + line + "\n") for group in planted for line in group)
    body: list[str] = []
    for line in text.lines(kind, seed):
        room -= count(line)
        if room < 0:
            break
        body.append(line)
    asked = [
        Question("question", *fact) for fact in facts.find(kind, body, random.Random(seed), each)
    ]
    whole = _insert(rng, body, [[comment + line for line in group] for group in planted])
    return Document(kind, whole, tuple(questions + asked))


def _insert(rng: random.Random, body: list[str], planted: list[list[str]]) -> str:
    """The text with every planted line after an empty one (sentences and statements stay whole),
    from about 2 to 96 % of it, groups in their order."""
    gaps = [i + 1 for i, line in enumerate(body) if not line.strip()] or list(range(len(body)))
    places: list[tuple[int, int, str]] = []
    for group in planted:
        depths = sorted(rng.uniform(0.02, 0.96) for _ in group)
        places += [
            (gaps[int(depth * len(gaps))], len(places) + i, line)
            for i, (depth, line) in enumerate(zip(depths, group))
        ]
    parts = list(body)
    for place, _, line in sorted(places, reverse=True):
        parts.insert(place, line + "\n")
    return "".join(parts)


def _plant(rng: random.Random, each: int) -> tuple[list[list[str]], list[Question]]:
    """Groups of lines to plant, and the questions about them."""
    numbers = [str(n) for n in rng.sample(range(10000, 100000), 64)]
    planted, questions = [], []

    for what, place in zip(rng.sample(_SINGLE, each), rng.sample(_PLACES, each)):
        number, about = numbers.pop(), f"{what} of the {place}"
        planted.append([f"The {about} is {number}."])
        questions.append(Question("single", f"What is the {about}?", f"The {about} is", (number,)))

    names = [f"{a}-{b}" for a, b in zip(rng.sample(_FIRST, 8), rng.sample(_SECOND, 8))]
    magic = {name: numbers.pop() for name in names}
    planted += [[f"The magic number of {name} is {magic[name]}."] for name in names]
    for name in rng.sample(names, each):
        about = f"magic number of {name}"
        questions.append(
            Question("multi-key", f"What is the {about}?", f"The {about} is", (magic[name],))
        )
    for _ in range(each):
        three = rng.sample(names, 3)
        about = f"magic numbers of {three[0]}, {three[1]} and {three[2]}"
        questions.append(
            Question(
                "multi-query",
                f"What are the {about}, in this order?",
                f"The {about} are",
                tuple(magic[name] for name in three),
            )
        )

    for person in rng.sample(_PEOPLE, each):
        values = [numbers.pop() for _ in range(3)]
        planted.append([f"One of the lucky numbers of {person} is {value}." for value in values])
        about = f"three lucky numbers of {person}"
        questions.append(
            Question("multi-value", f"What are the {about}?", f"The {about} are", tuple(values))
        )

    letters = rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 9)
    for _ in range(each):
        number = numbers.pop()
        chain = ["VAR_" + letters.pop() + rng.choice("AEIOU") for _ in range(3)]
        planted.append(
            [f"{chain[0]} = {number}", f"{chain[1]} = {chain[0]}", f"{chain[2]} = {chain[1]}"]
        )
        questions.append(
            Question(
                "variables",
                f"Which three variables have the value {number}, directly or through another one?",
                f"The three variables with the value {number} are",
                tuple(chain),
            )
        )
    planted.append(_words(rng, questions))
    return planted, questions


def _words(rng: random.Random, questions: list[Question]) -> list[str]:
    """Lines with made-up words: two occur 14 and 10 times, six others twice."""
    words = set()
    while len(words) < 8:
        words.add("".join(rng.choice(_SYLLABLES) for _ in range(3)))
    ordered = sorted(words)
    rng.shuffle(ordered)
    said = [ordered[0]] * 14 + [ordered[1]] * 10 + ordered[2:] * 2
    rng.shuffle(said)
    questions.append(
        Question(
            "frequent",
            'Some lines begin with "heard:". Which two words occur most often in them?',
            "The two words heard most often are",
            tuple(ordered[:2]),
        )
    )
    return ["heard: " + " ".join(said[i : i + 4]) for i in range(0, len(said), 4)]
