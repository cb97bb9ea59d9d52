"""The documents of capture_trace.py --content turns: text of many kinds, each a function of a seed or
of a file, so that anyone can make the same again.

    code     modules of Python's standard library
    topics   the language reference that comes with Python: prose with examples
    json     records of an order book
    csv      the same, as a table
    hex      a dump of random bytes
    base64   random bytes
    notice   one short notice again and again
    blank    runs of blanks and of one letter
Any other name takes a file: german=FILE.
"""
import base64
import json
import pathlib
import random

import prompt_text

NOTICE = ("Notice: this message was generated automatically. Please do not reply to it. If you have "
          "questions, contact the service desk between 9:00 and 17:00.\n")
ASKED = {"code": "Please review the following Python modules.",
         "topics": "Explain the Python language to me, with examples, as completely as you can.",
         "json": "Here is an export of our orders as JSON. Which of them are overdue?",
         "csv": "The same as a table. Which customer ordered most?",
         "hex": "What is in this memory dump?", "base64": "Decode this attachment.",
         "notice": "This is what our mailbox received over night. Is any of it important?",
         "blank": "This file looks empty. Is it?",
         "german": "Worum geht es in dem folgenden Text? Fasse ihn bitte auf Deutsch zusammen.",
         "french": "De quoi parle le texte suivant ? Résume-le en français, s'il te plaît."}
NAMES = ("Ada Brook", "Jonas Weber", "Marie Laurent", "Li Wei", "Olga Petrova", "Sam Taylor",
         "Ines Duarte", "Tomasz Nowak", "Aiko Mori", "Noor Haddad")
GOODS = ("valve", "bearing", "gasket", "pump", "filter", "sensor", "cable", "bracket", "hinge", "motor")


def orders(numbers):
    """Yields records without end."""
    number = 20000
    while True:
        number += numbers.randrange(1, 40)
        yield {"order": number, "customer": numbers.choice(NAMES),
               "date": f"2025-{numbers.randrange(1, 13):02d}-{numbers.randrange(1, 29):02d}",
               "lines": [{"item": numbers.choice(GOODS), "quantity": numbers.randrange(1, 50),
                          "price": round(numbers.uniform(1, 400), 2)}
                         for _ in range(numbers.randrange(1, 4))],
               "paid": numbers.random() < 0.6}


def pieces(kind, file, seed):
    """Yields text of a kind, piece by piece, for ever or until it is used up."""
    numbers = random.Random(f"{seed}/{kind}")
    if file:
        path = pathlib.Path(file)
        if not path.is_file():
            raise ValueError(f"--parts {kind}={file}: no such file")
        yield path.read_text(encoding="utf-8", errors="replace")
    elif kind == "code":
        for path in prompt_text.library_modules(seed):
            yield f"# File: {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n"
    elif kind == "topics":
        from pydoc_data.topics import topics
        names = sorted(topics)
        numbers.shuffle(names)
        for name in names:
            yield f"{topics[name].strip()}\n\n"
    elif kind == "json":
        for order in orders(numbers):
            yield json.dumps(order, indent=2) + ",\n"
    elif kind == "csv":
        yield "order,customer,date,item,quantity,price,paid\n"
        for order in orders(numbers):
            for line in order["lines"]:
                yield (f"{order['order']},{order['customer']},{order['date']},{line['item']},"
                       f"{line['quantity']},{line['price']},{order['paid']}\n")
    elif kind == "hex":
        at = 0
        while True:
            row = numbers.randbytes(16)
            yield f"{at:08x}  {row.hex(' ')}\n"
            at += 16
    elif kind == "base64":
        while True:
            yield base64.b64encode(numbers.randbytes(57)).decode() + "\n"
    elif kind == "notice":
        while True:
            yield NOTICE
    elif kind == "blank":
        while True:
            yield numbers.choice((" ", "\n", "\t", "x")) * numbers.randrange(8, 200)
    else:
        raise ValueError(f"--parts {kind}: none of {', '.join(list(ASKED)[:8])}, and no file was given")


def document(tokenizer, kind, file, seed, count):
    """`count` token ids of a kind."""
    ids = []
    for piece in pieces(kind, file, seed):
        ids += tokenizer.encode(piece, count - len(ids))
        if len(ids) >= count:
            return ids
    raise ValueError(f"--parts {kind}: the text has {len(ids)} tokens, and {count} are needed")
