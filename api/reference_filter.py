"""Prints a header with its comments as Doxygen's, for api/Doxyfile: reference_filter.py HEADER.

A comment above a declaration becomes /** ... */ or ///, one behind it on its line /**< ... */ or ///<.
Headers stay free of Doxygen's marks, which a reader of the header does not need.
"""

import re
import sys

text = open(sys.argv[1], encoding="utf-8").read()
if text.startswith("/*"):  # The header's own text describes the file.
    text = re.sub(r"\A/\*", "/** @file\n * ", text)
lines = []
for line in text.split("\n"):
    behind = re.search(r"[,;{}\w)]\s*(/\*(?!\*)|//(?!/))", line.split('"')[0])
    if re.match(r"\s*/\*(?!\*)", line):
        line = line.replace("/*", "/**", 1)
    elif re.match(r"\s*//(?!/)", line):
        line = line.replace("//", "///", 1)
    elif behind:
        at = behind.start(1)
        line = line[:at] + ("/**<" if line[at:].startswith("/*") else "///<") + line[at + 2 :]
    lines.append(line)
print("\n".join(lines))
