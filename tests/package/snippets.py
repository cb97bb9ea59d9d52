#!/usr/bin/env python3
"""The programs in the pages compile and run, and the commands are ones that there are.

    snippets.py BUILD SOURCE [PAGE...]        exit 1 if one fails; says so where one was skipped

Of every page (by default all of SOURCE): blocks of c and cpp are compiled against the installed BUILD with all warnings as
errors, by find_package as the page's block of cmake says, and run; blocks of python are run where their packages are to be
had; of commands, options of the vattn program and of CMake must exist, and so must files that bash and python are given.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
STANDARDS = {"c": ["cc", "-std=c99"], "cpp": ["c++", "-std=c++17"]}


def run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, **options)


class Snippets:
    def __init__(self, build, source, work):
        self.build, self.source, self.work = build, source, work
        self.failed, self.counted, self.helps = [], {}, {}
        prefix = work / "prefix"
        done = run(["cmake", "--install", build, "--prefix", prefix])
        if done.returncode:
            sys.exit(f"cmake --install: {done.stdout}")
        self.prefix = prefix
        self.library = next(prefix.glob("**/libvattn.so")).parent

    def fail(self, where, what):
        self.failed.append(f"{where}: {what}")

    def count(self, what):
        self.counted[what] = self.counted.get(what, 0) + 1

    def program(self, where, language, text):
        source = self.work / f"program.{language}"
        source.write_text(text)
        built = run([*STANDARDS[language], "-Wall", "-Wextra", "-Werror", source, "-o", self.work / "program",
                     f"-I{next(self.prefix.glob('**/vattn.h')).parent}", f"-L{self.library}", "-lvattn",
                     f"-Wl,-rpath,{self.library}"])
        if built.returncode:
            return self.fail(where, f"does not compile: {built.stdout}")
        ran = run([self.work / "program"])
        if ran.returncode:
            self.fail(where, f"exit {ran.returncode}: {ran.stdout}")
        self.count(language)

    def cmake(self, where, text):
        folder = self.work / "user"
        folder.mkdir(exist_ok=True)
        (folder / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.25)\nproject(user C)\n{text}")
        (folder / "app.c").write_text((self.source / "examples/minimal.c").read_text())
        made = run(["cmake", "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={self.prefix}"])
        made = made if made.returncode else run(["cmake", "--build", folder / "build"])
        if made.returncode:
            return self.fail(where, made.stdout)
        self.count("cmake")

    def python(self, where, text):
        packages = sorted(set(re.findall(r"^(?:import|from) ([a-z_]+)", text, re.M)) - {"vattn"})
        environment = dict(os.environ, PYTHONPATH=str(self.source / "api/python"), PYTHONDONTWRITEBYTECODE="1",
                           VATTN_LIBRARY=str(self.library / "libvattn.so"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        for python in (os.environ.get("VATTN_TEST_PYTHON"), f"{self.build}/python/bin/python", "python3"):
            if not python or (os.path.isabs(python) and not os.path.exists(python)):
                continue
            if run([python, "-c", "".join(f"import {name}\n" for name in packages)]).returncode:
                continue
            ran = run([python, "-W", "error::SyntaxWarning", "-c", text], env=environment)
            if ran.returncode:
                return self.fail(where, f"exit {ran.returncode}: {ran.stdout}")
            return self.count("python")
        compile(text, where, "exec")
        print(f"{where}: skipped, no Python has {', '.join(packages)}")

    def help(self, command):
        if command not in self.helps:
            shown = run([f"{self.build}/vattn", *command.split(), "--help"])
            known = shown.returncode == 0 and "SUBCOMMAND" not in shown.stdout  # else that of the program
            self.helps[command] = shown.stdout if known else None
        return self.helps[command]

    def command(self, where, line):
        line = re.sub(r"\s#.*", "", line)
        words = line.split()
        if not words:
            return
        if words[0] == "build/vattn" and len(words) > 1 and os.path.exists(f"{self.build}/vattn"):
            text = self.help(words[1])
            if text is None:
                return self.fail(where, f"vattn has no command {words[1]}")
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", line):
                if not re.search(re.escape(option) + r"(?![\w-])", text):
                    self.fail(where, f"vattn {words[1]} has no option {option}")
            self.count("command")
        elif words[0] == "cmake":
            known = "\n".join(path.read_text() for path in (self.source / "CMakeLists.txt",))
            for name in re.findall(r"-D(VATTN_\w+)", line):
                if not re.search(rf"(option|set)\({name}\b", known):
                    self.fail(where, f"CMake has no option {name}")
            self.count("command")
        elif words[0] in ("bash", "python", "python3") and len(words) > 1 and "/" in words[1]:
            if not (self.source / words[1]).exists():
                self.fail(where, f"{words[1]} does not exist")
            self.count("command")

    def page(self, path):
        text = path.read_text()
        name = path.relative_to(self.source) if path.is_relative_to(self.source) else path.name
        for found in FENCE.finditer(text):
            where = f"{name}:{text.count(chr(10), 0, found.start()) + 1}"
            language, body = found.groups()
            if language in STANDARDS:
                self.program(where, language, body)
            elif language in ("cmake", "python"):
                getattr(self, language)(where, body)
            elif language in ("", "sh"):
                for line in re.sub(r"\\\n", " ", body).splitlines():
                    for part in line.split("&&"):
                        self.command(where, part)


def main():
    build, source = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    pages = [pathlib.Path(page).resolve() for page in sys.argv[3:]]
    if not pages:
        pages = [page for page in sorted(source.rglob("*.md"))
                 if not any(part.startswith("build") or part == ".git" for part in page.relative_to(source).parts)]
    with tempfile.TemporaryDirectory() as work:
        snippets = Snippets(build, source, pathlib.Path(work))
        for page in pages:
            snippets.page(page)
    print(", ".join(f"{count} of {what}" for what, count in sorted(snippets.counted.items())) or "no snippet")
    for line in snippets.failed:
        print(line)
    sys.exit(1 if snippets.failed or not snippets.counted else 0)


main()
