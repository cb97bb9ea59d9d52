#!/usr/bin/env python3
"""Every page that a file of the tree cites is in the tree, and so is every heading cited with it.

    cited_headings.py [TOP]

A citation is the name of a page (METHOD.md, bench/PROMISE.md), alone or with headings behind it: METHOD.md, "Looks";
METHOD.md, "Selection" and "Looks"; or a link of a page, [text](page.md#heading). A page is found beside the file that
cites it, from the top of the tree, or by its name if only one page has it. A section by number (PAGE 4) is no citation:
numbers move. Prints every one that leads nowhere; cited_headings_test.sh plants wrong ones.
"""

import os
import re
import sys

SUFFIXES = (".h", ".hpp", ".c", ".cc", ".cu", ".cuh", ".py", ".pyi", ".sh", ".rs", ".md", ".txt", ".yml", ".toml")
# A comment that goes on in the next line: the citation may be broken there.
NEXT_LINE = re.compile(r"[ \t]*\n[ \t]*(?://+|\*(?!/)|#|>)?[ \t]*")
PAGE = re.compile(r"(?<![\w./*$-])(?!build/)((?:\.\./)*(?:[\w.-]+/)*[\w-]+\.md)\b")
HEADINGS = re.compile(r'(?:,)?\s+"([^"\n]+)"(?:(?:,| and|, and)\s+"([^"\n]+)")*')
QUOTED = re.compile(r'"([^"\n]+)"')
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A section of a page by its number; REQUIRES is a word of contracts.
NUMBERED = re.compile(r"\b(?!REQUIRES)([A-Z]{4,})(?:\.md)? \d{1,2}\b(?![.\d])")


def files_of(top):
    for folder, folders, names in os.walk(top):
        folders[:] = [f for f in folders if not f.startswith(("build", "__")) and f not in (".git", "corpus", "results")]
        for name in names:
            if name.endswith(SUFFIXES) and not name.startswith(("cited_headings", "snippets_test")):
                yield os.path.relpath(os.path.join(folder, name), top)


def headings_of(text):
    """Headings of a page, outside of its code."""
    headings, code = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            code = not code
        elif not code and re.match(r"#{1,6} ", line):
            headings.append(line.lstrip("#").strip().replace("`", ""))
    return headings


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class Tree:
    def __init__(self, top):
        self.texts = {}
        for path in files_of(top):
            with open(os.path.join(top, path), encoding="utf-8") as file:
                self.texts[path] = file.read()
        self.headings = {path: headings_of(text) for path, text in self.texts.items() if path.endswith(".md")}
        self.top, self.wrong = top, []

    def page(self, cited, by):
        """Where the page is that file `by` cites, or None."""
        for path in (os.path.normpath(os.path.join(os.path.dirname(by), cited)), cited):
            if path in self.headings:
                return path
        named = [page for page in self.headings if os.path.basename(page) == cited]
        return named[0] if len(named) == 1 else None

    def fail(self, by, line, text):
        self.wrong.append(f"{by}:{line}: {text}")

    def check_pages(self, by, text):
        joined, starts = [], []  # the text without line breaks, and where each line begins in it
        at = last = 0
        for found in NEXT_LINE.finditer(text):
            joined.append(text[last : found.start()] + " ")
            at += found.start() - last + 1
            starts.append(at)
            last = found.end()
        joined = "".join(joined) + text[last:]
        for found in PAGE.finditer(joined):
            line = 1 + sum(start <= found.start() for start in starts)
            page = self.page(found[1], by)
            if page is None:
                self.fail(by, line, f"{found[1]} is no page of the tree, or of several folders")
                continue
            cited = HEADINGS.match(joined, found.end())
            if cited is None or not cited[0].startswith(","):
                continue
            for heading in QUOTED.findall(cited[0]):
                if heading not in self.headings[page]:
                    self.fail(by, line, f'{page} has no heading "{heading}"')

    def check_links(self, by, text):
        for number, line in enumerate(text.splitlines(), 1):
            for link in LINK.findall(line):
                if re.match(r"[a-z]+:", link):
                    continue
                path, _, fragment = link.partition("#")
                target = os.path.normpath(os.path.join(os.path.dirname(by), path)) if path else by
                if not os.path.exists(os.path.join(self.top, target)):
                    self.fail(by, number, f"{link} leads nowhere")
                elif fragment and fragment not in [anchor(h) for h in self.headings.get(target, [])]:
                    self.fail(by, number, f"{target} has no heading for #{fragment}")

    def check_numbers(self, by, text):
        if by.endswith("CMakeLists.txt"):  # words in capitals are CMake's own
            return
        for number, line in enumerate(text.splitlines(), 1):
            for name in NUMBERED.findall(line):
                self.fail(by, number, f"{name} is cited by a number, must be by a heading")

    def check(self):
        for by, text in sorted(self.texts.items()):
            self.check_pages(by, text)
            self.check_numbers(by, text)
            if by.endswith(".md"):
                self.check_links(by, text)
        return self.wrong


def main():
    wrong = Tree(sys.argv[1] if len(sys.argv) > 1 else ".").check()
    for line in wrong:
        print(line)
    sys.exit(1 if wrong else 0)


main()
