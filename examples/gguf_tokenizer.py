"""Tokenizers read from the metadata of a GGUF file: byte-level BPE and SentencePiece."""
import re

import gguf
import numpy as np

from gguf_config import metadata

# Word splitting. Python's re has no \p{L} and \p{N}: letters are written [^\W\d_] and digits \d.
# That differs from the original patterns only for characters such as superscript digits, fractions
# and combining marks.
_LETTER, _SYMBOL, _ENDING = r"[^\W\d_]", r"(?:[^\s\w]|_)", r"'(?:s|t|re|ve|m|ll|d)"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_ENDING}| ?{_LETTER}+| ?\d+| ?{_SYMBOL}+|{_SPACES}"
_SINGLE_DIGITS = rf"\d|{_ENDING}| ?{_LETTER}+| ?{_SYMBOL}+|\s+(?=\d)|{_SPACES}"


def _by_line(digits):
    """Words that keep line ends apart, with `digits` digits at most in a number."""
    return (rf"(?i:{_ENDING})|(?:[^\r\n\w]|_)?{_LETTER}+|\d{{1,{digits}}}"
            rf"| ?{_SYMBOL}+[\r\n]*|\s*[\r\n]+|{_SPACES}")


WORD_PATTERNS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS,
    "qwen2": _by_line(1), "deepseek-r1-qwen": _by_line(1), "llama-bpe": _by_line(3)}


def byte_alphabet():
    """The printable character that byte-level BPE uses for each of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in chars:
            chars[byte] = chr(256 + len(chars) - len(plain))
    return chars


class Tokenizer:
    """What both kinds share: the vocabulary, and a text's words, each of which is encoded once.

    Text is never read as control tokens; control_id gives theirs.
    """

    def __init__(self, reader, name, words):
        self.name = name
        self.tokens = metadata(reader, "tokenizer.ggml.tokens")
        types = np.array(metadata(reader, "tokenizer.ggml.token_type"))
        self.control = types == gguf.TokenType.CONTROL     # [vocabulary]
        self.prefix = ([metadata(reader, "tokenizer.ggml.bos_token_id")]
                       if metadata(reader, "tokenizer.ggml.add_bos_token", False) else [])
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        self._words = words
        self._cache = {}

    def encode(self, text, limit=None):
        """Token ids of `text`, the first `limit` of them at most; adds no prefix."""
        ids = []
        for match in self._words.finditer(text):
            word = match.group()
            if word not in self._cache:
                self._cache[word] = self._encode_word(word)
            ids += self._cache[word]
            if limit is not None and len(ids) >= limit:
                return ids[:limit]
        return ids

    def has_control(self, name):
        """Whether the vocabulary has a control token of this name."""
        return name in self._ids and bool(self.control[self._ids[name]])

    def control_id(self, name):
        """Token id of a control token."""
        if not self.has_control(name):
            raise ValueError(f"the model's vocabulary has no control token {name}")
        return self._ids[name]


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE from the vocabulary and merges in the GGUF metadata."""

    def __init__(self, reader):
        split = metadata(reader, "tokenizer.ggml.pre", "default")
        if split not in WORD_PATTERNS:
            raise ValueError(f"tokenizer gpt2/{split} is not supported "
                             f"(supported: gpt2 with {', '.join(WORD_PATTERNS)})")
        super().__init__(reader, f"gpt2/{split}", re.compile(WORD_PATTERNS[split]))
        merges = metadata(reader, "tokenizer.ggml.merges")
        self._ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        self._chars = byte_alphabet()
        self._bytes = {char: byte for byte, char in self._chars.items()}

    def decode(self, ids):
        """Text of `ids`; control tokens appear by name."""
        data = b"".join(
            self.tokens[i].encode() if self.control[i]
            else bytes(self._bytes[char] for char in self.tokens[i]) for i in ids)
        return data.decode("utf-8", errors="replace")

    def _encode_word(self, word):
        """Merge the neighbouring pair of lowest rank until no pair has a rank."""
        parts = [self._chars[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                joined = i < len(pairs) and pairs[i] == best
                merged.append("".join(best) if joined else parts[i])
                i += 2 if joined else 1
            parts = merged
        return [self._ids[part] for part in parts]


class SentencePieceTokenizer(Tokenizer):
    """Merges by the scores in the GGUF metadata, as SentencePiece does; characters that the vocabulary
    lacks are their bytes.
    """
    SPACE = "\u2581"     # stands for a blank within tokens, but not in those that are runs of blanks
    LONGEST_RUN = 31

    def __init__(self, reader):
        if metadata(reader, "tokenizer.ggml.add_space_prefix", True):
            raise ValueError("tokenizer llama with add_space_prefix is not supported")
        space = self.SPACE
        super().__init__(reader, "llama",
                         re.compile(rf"\n+|\t+|{space}{{2,{self.LONGEST_RUN}}}|{space}?[^{space}\n\t]+|{space}"))
        self._scores = metadata(reader, "tokenizer.ggml.scores")

    def encode(self, text, limit=None):
        """See Tokenizer.encode."""
        return super().encode(text.replace(" ", self.SPACE), limit)

    def decode(self, ids):
        """See BytePairTokenizer.decode."""
        data = b"".join(
            bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token)
            else token.replace(self.SPACE, " ").encode() for token in (self.tokens[i] for i in ids))
        return data.decode("utf-8", errors="replace")

    def _encode_word(self, word):
        """Merge the neighbouring pair whose token scores highest until none is a token."""
        if len(word) > 1 and not word.strip(self.SPACE) and " " * len(word) in self._ids:
            return [self._ids[" " * len(word)]]
        parts = list(word)
        while len(parts) > 1:
            merged = [self._ids.get(a + b) for a, b in zip(parts, parts[1:])]
            best = max((i for i, token in enumerate(merged) if token is not None),
                       key=lambda i: self._scores[merged[i]], default=None)
            if best is None:
                break
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        ids = []
        for part in parts:
            ids += ([self._ids[part]] if part in self._ids
                    else [self._ids[f"<0x{byte:02X}>"] for byte in part.encode()])
        return ids


def make_tokenizer(reader):
    """The tokenizer of an opened gguf.GGUFReader."""
    kinds = {"gpt2": BytePairTokenizer, "llama": SentencePieceTokenizer}
    model = metadata(reader, "tokenizer.ggml.model")
    if model not in kinds:
        raise ValueError(f"tokenizer {model} is not supported (supported: {', '.join(kinds)})")
    return kinds[model](reader)
