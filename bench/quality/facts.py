"""Questions that a text answers without anything planted."""

import ast
import random
import re

Fact = tuple[str, str, tuple[str, ...]]  # question, how the answer begins, what it must have

_CLASS = re.compile(r"^class (\w+)\(([\w.]{4,})\):", re.M)
_CONSTANT = re.compile(r"^([A-Z][A-Z_]{4,}) *= *(\d{2,}|0x[0-9a-fA-F]{2,})\s*$", re.M)
_FUNCTION = re.compile(r"^ *def ([a-z]\w{3,})(\([^()\n]*=[^()\n]*\)):", re.M)
_SENTENCE = re.compile(r"\b[A-Z][a-z]*(?:[ \n]+[^\s.;:#\"]+){9,40}\.(?=\s)")


def find(kind: str, body: list[str], rng: random.Random, each: int) -> list[Fact]:
    """`each` facts of a text, given by its lines; of source code those about names come first."""
    whole = "".join(body)
    found = _about_names(whole) if kind == "source" else []
    rng.shuffle(found)
    sentences = _endings(whole)
    rng.shuffle(sentences)
    chosen = (found + sentences)[:each]
    if len(chosen) < each:
        raise ValueError(
            f"a text of {len(whole)} characters has {len(chosen)} facts to ask about, "
            f"must have {each}"
        )
    return chosen


def _about_names(whole: str) -> list[Fact]:
    """Base classes, defaults of parameters and constants whose names the text defines once."""
    found: list[Fact] = []

    def add(about: str, answer: str) -> None:
        found.append((f"What is the {about}?", f"The {about} is", (answer,)))

    for name, base in _unique(_CLASS, whole):
        if base != "object":
            add(f"base class of the class {name}", base)
    for name, value in _unique(_CONSTANT, whole):
        add(f"value of the constant {name}", value)
    for name, parameters in _unique(_FUNCTION, whole):
        try:
            arguments = ast.parse(f"def f{parameters}: pass").body[0].args
        except SyntaxError:
            continue
        for argument, default in zip(arguments.args[::-1], arguments.defaults[::-1]):
            value = getattr(default, "value", None)
            if isinstance(value, (int, str)) and len(str(value)) >= 3 and str(value).isalnum():
                about = f"default of the parameter {argument.arg} of the function {name}"
                add(about, str(value))
    return found


def _unique(pattern: re.Pattern[str], whole: str) -> list[tuple[str, str]]:
    """Matches (name, what it is) of names that match once."""
    matches: list[tuple[str, str]] = pattern.findall(whole)
    names = [name for name, _ in matches]
    return [(name, value) for name, value in matches if names.count(name) == 1]


def _endings(whole: str) -> list[Fact]:
    """Sentences to be finished: given all but the last four words, which must come."""
    found: list[Fact] = []
    plain = " ".join(whole.split())
    for match in _SENTENCE.finditer(whole):
        words = match.group().rstrip(".").split()
        given, want = " ".join(words[:-4]), " ".join(words[-4:])
        if plain.count(" ".join(words[:3])) == 1:
            question = f'How does the sentence of the text end that begins with "{given}"?'
            found.append((question, f'The sentence is: "{given}', (want,)))
    return found
