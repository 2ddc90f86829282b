"""
Prints how long and how dense a Markdown page is: lines, the longest paragraph and the average sentence, in words.

    python docs/readability.py README.md

Prose counts, and list items are paragraphs. Code, tables, headings and badges are left out.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Figures(NamedTuple):
    """Lines of the file; words of the longest paragraph and of the average sentence."""

    lines: int
    longest_paragraph: int
    average_sentence: float


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items as plain text: a link is its text, code in a line is one word."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)  # pictures, and badges
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`\n]*`", "code", text)
    text = re.sub(r"^(#|\|).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n", text, flags=re.MULTILINE)
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [part for part in found if re.search(r"\w", part)]


def measure(text: str) -> Figures:
    """Figures of a page's text."""
    prose = paragraphs(text)
    sentences = [sentence for part in prose for sentence in re.split(r"(?<=[.!?]) ", part)]
    words = sum(len(part.split()) for part in prose)
    return Figures(len(text.splitlines()), max(len(part.split()) for part in prose), words / len(sentences))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        lines, longest, average = measure(Path(name).read_text(encoding="utf-8"))
        print(f"{name}: {lines} lines, longest paragraph {longest} words, average sentence {average:.1f} words")
