"""Prompts for capture_trace.py: files, a list of pairs to look up, a conversation.

All of them are functions of their arguments alone (pairs, chat and the default files also of a
seed), so that anyone can make the same recording again:
    files   the given files, or modules of Python's standard library in an order by seed
    pairs   lines "key-4711: value-58008" until the prompt is full, then a question for eight of
            them, which the answer has to look up one after the other
    chat    a conversation in the ChatML form: the user asks what functions of the standard library
            do, the assistant answers with their docstrings, and at last the user asks for an
            overview of all that was said
    turns   a conversation whose user passes a document of another kind in every turn (--parts), and
            whose assistant answers with a line and the document's beginning once more; it goes on
            through the decode steps
    answer  a question, and one long answer of the kind that --parts names, which goes on through
            the decode steps
"""
import ast
import pathlib
import platform
import random
import sysconfig
import zlib

import prompt_parts

ASKED_PAIRS = 8
CHAT_QUESTION = ("Give me an overview of everything that you explained to me above: which modules "
                 "did I ask about, and what is each of their functions for?")
SYSTEM = "You are a helpful assistant."


def build(args, tokenizer):
    """(prompt ids [args.tokens], ids to decode [args.steps] or None when the model chooses,
    description of the text, question).
    """
    make = {"files": from_files, "pairs": from_pairs, "chat": from_chat, "turns": from_turns,
            "answer": from_answer}[args.content]
    return make(args, tokenizer)


def room_for(args, fixed):
    """Tokens that are left of the prompt after `fixed` of them."""
    room = args.tokens - fixed
    if room < 1:
        raise ValueError(f"--tokens {args.tokens}: the question alone has {fixed} tokens")
    return room


def library_modules(seed):
    """Modules of the standard library, in an order by seed."""
    modules = pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")
    return sorted(modules, key=lambda path: zlib.crc32(f"{seed}/{path.name}".encode()))


def library_name():
    """How descriptions call the standard library."""
    return f"Python {platform.python_version()} standard library"


def text_files(args):
    """(paths, description) of --text, or of the standard library's modules."""
    if not args.text:
        return library_modules(args.seed), f"{library_name()} sources"
    paths = [pathlib.Path(name) for name in args.text]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"--text {path}: no such file")
    more = f" and {len(paths) - 4} more files" if len(paths) > 4 else ""
    return paths, ", ".join(path.name for path in paths[:4]) + more


def read_tokens(tokenizer, paths, count):
    """The first `count` token ids of the files, one after the other."""
    ids = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        ids += tokenizer.encode(f"# File: {path.name}\n{text}\n", count - len(ids))
        if len(ids) >= count:
            return ids
    raise ValueError(f"the text has {len(ids)} tokens; --tokens and --steps need {count} of it")


def from_files(args, tokenizer):
    """Files up to the question."""
    paths, description = text_files(args)
    question = tokenizer.encode(f"\n\n{args.question}\n") if args.question else []
    room = room_for(args, len(tokenizer.prefix) + len(question))
    text = read_tokens(tokenizer, paths, room + (args.steps if args.teacher_forced else 0))
    prompt = tokenizer.prefix + text[:room] + question
    return prompt, text[room:] if args.teacher_forced else None, description, args.question or ""


def from_pairs(args, tokenizer):
    """Random pairs up to a question for evenly spread ones."""
    numbers = random.Random(args.seed)
    keys = numbers.sample(range(1000, 10000), 9000)
    lines = [f"key-{key}: value-{numbers.randrange(10000, 100000)}\n" for key in keys]
    encoded = [tokenizer.encode(line) for line in lines]
    ids, question = [], []
    for count in range(ASKED_PAIRS, len(lines) + 1):
        # The question depends on how many pairs there are, and they on its length.
        asked = [keys[(2 * i + 1) * count // (2 * ASKED_PAIRS)] for i in range(ASKED_PAIRS)]
        text = args.question or ("Question: what are the values of "
                                 f"{', '.join(f'key-{key}' for key in asked)} in the list above?\n"
                                 "Answer:")
        new_question = tokenizer.encode(f"\n{text}")
        new_ids = [i for line in encoded[:count] for i in line]
        if len(tokenizer.prefix) + len(new_ids) + len(new_question) > args.tokens:
            break
        ids, question, shown = new_ids, new_question, text
    if not ids:
        raise ValueError(f"--tokens {args.tokens}: no room for {ASKED_PAIRS} pairs and the question")
    # What is left, less than a line, goes before the list.
    pad = tokenizer.encode("\n") * (args.tokens - len(tokenizer.prefix + ids + question))
    return (tokenizer.prefix + pad + ids + question, None, f"random pairs, seed {args.seed}",
            shown)


# The control tokens around a message, the line end between them left out, and the assistant's name.
CHAT_FORMS = (("<|im_start|>", "<|im_end|>", "assistant"), ("<start_of_turn>", "<end_of_turn>", "model"))


def begin_turn(tokenizer, role):
    """Token ids before the text of a message, in the form of the model's vocabulary: ChatML or Gemma's,
    which calls the assistant the model and has no system.
    """
    for start, _, assistant in CHAT_FORMS:
        if tokenizer.has_control(start):
            name = assistant if role == "assistant" else role
            return [tokenizer.control_id(start), *tokenizer.encode(f"{name}\n")]
    raise ValueError("the model's vocabulary has no control tokens of a conversation")


def end_turn(tokenizer):
    """Token ids behind the text of a message."""
    ends = [end for _, end, _ in CHAT_FORMS if tokenizer.has_control(end)]
    return [tokenizer.control_id(ends[0]), *tokenizer.encode("\n")]


def turn(tokenizer, role, text):
    """Token ids of one message."""
    start = begin_turn(tokenizer, role)
    return [*start[:1], *tokenizer.encode(f"{tokenizer.decode(start[1:])}{text}"), *end_turn(tokenizer)]


def docstrings(seed):
    """Yields (module, function, docstring) of the standard library."""
    for path in library_modules(seed):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text:
                    yield path.stem, node.name, text


def from_chat(args, tokenizer):
    """Questions about functions, answered by their docstrings, then one about all of them."""
    question = args.question or CHAT_QUESTION
    head = tokenizer.prefix + turn(tokenizer, "system", SYSTEM)
    tail = turn(tokenizer, "user", question) + begin_turn(tokenizer, "assistant")
    room = room_for(args, len(head) + len(tail))
    middle = []
    for module, name, text in docstrings(args.seed):
        middle += turn(tokenizer, "user", f"What does {module}.{name} do?")
        middle += turn(tokenizer, "assistant", text)
        if len(middle) >= room:
            break
    if len(middle) < room:
        raise ValueError(f"--tokens {args.tokens}: the docstrings have {len(middle)} tokens, "
                         f"and {room} are needed")
    # The first exchange is cut, as where a conversation outgrew its context.
    return (head + middle[-room:] + tail, None, f"{library_name()} docstrings as a conversation",
            question)


def split_parts(args):
    """[(kind, file or "")] of --parts."""
    if not args.parts:
        raise ValueError(f"--content {args.content} needs --parts")
    return [tuple(part.partition("=")[::2]) for part in args.parts]


def from_turns(args, tokenizer):
    """Documents of different kinds, one a turn; what does not fit the prompt is decoded."""
    parts, total = split_parts(args), args.tokens + args.steps
    ids, begins = list(tokenizer.prefix), []
    for i, (kind, file) in enumerate(parts):
        # What is said around a document comes on top, so that the last turn is long enough.
        room = total * (i + 1) // len(parts) - len(ids)
        quoted = room // 8
        text = prompt_parts.document(tokenizer, kind, file, f"{args.seed}/{i}", room - quoted)
        asked = prompt_parts.ASKED.get(kind, prompt_parts.ASKED["code"])
        begins.append(f"{kind}:{len(ids)}")
        ids += begin_turn(tokenizer, "user") + tokenizer.encode(f"{asked}\n\n") + text
        ids += end_turn(tokenizer) + begin_turn(tokenizer, "assistant")
        ids += tokenizer.encode("I have read all of it. It begins like this:\n\n") + text[:quoted]
        ids += end_turn(tokenizer)
    return (ids[:args.tokens], ids[args.tokens:total],
            f"conversation about documents, {' '.join(begins)}", "")


def from_answer(args, tokenizer):
    """One question and a long answer."""
    (kind, file), = split_parts(args)[:1]
    asked = prompt_parts.ASKED.get(kind, prompt_parts.ASKED["topics"])
    ids = tokenizer.prefix + turn(tokenizer, "user", asked) + begin_turn(tokenizer, "assistant")
    ids += prompt_parts.document(tokenizer, kind, file, args.seed, args.tokens + args.steps - len(ids))
    return ids[:args.tokens], ids[args.tokens:], f"a long answer, {kind}", asked
