"""What the pages of docs/methods repeat of a method's file: equations, differences, settings.

    python -m tools.method_pages      # after a docstring, a default or its meaning has changed

A test fails while a page says something else than the file.
"""

import ast
import dataclasses
import re
import textwrap
from pathlib import Path
from typing import get_type_hints

from offrl import config

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
BEGIN, END = "<!-- written by tools/method_pages.py -->\n", "<!-- end -->\n"


def main() -> None:
    for name in config.algorithms():
        page = PAGES / f"{name}.md"
        page.write_text(renewed(page.read_text(), name))


def renewed(page: str, name: str) -> str:
    """The page with its generated part as the method's file has it now."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + part(name) + END + after


def part(name: str) -> str:
    """Equations, differences and settings of a method, in Markdown."""
    source = ROOT / "offrl" / "algos" / f"{name}.py"
    told = ast.get_docstring(ast.parse(source.read_text())) or ""
    about, differences = re.split(r"(?=Differences from)", told.split("\n\n", 1)[1])
    head = re.match(r"[\w' ]+", differences)[0]  # type: ignore[index]
    rest = differences.removeprefix(head)
    rest = re.sub(r"^ *\((.+?)\):", r"\1:", rest.lstrip(": "), flags=re.S)
    return (
        f"\n## Equations\n\n{markdown(about)}\n\n"
        f"## {head.strip()}\n\n{markdown(rest[0].upper() + rest[1:])}\n\n"
        f"## Settings\n\n{settings(name)}\n"
    )


def markdown(text: str) -> str:
    """A docstring's paragraphs, lists and indented blocks."""
    out = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith("    "):
            out.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            plain = block.replace("*", r"\*")
            out.append(re.sub(r"(?m)^(?!- |  )(.+)\n(?=- )", r"\1\n\n", plain))
    return "\n\n".join(out)


def settings(name: str) -> str:
    """A table of the options: name, default, meaning and the words it takes."""
    options = config.method(name).config
    told, hints = config.meanings(options), get_type_hints(options)
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(options):
        words = config.words_of(hints[field.name])
        choices = f" ({', '.join(f'`{word}`' for word in words)})" if words else ""
        meaning = told[field.name].replace("|", r"\|")
        default = config.spelled(field.default)
        lines.append(f"| `algo.{field.name}` | `{default}` | {meaning}{choices} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
