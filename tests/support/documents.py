"""Read the documents: their code blocks, their commands, the anchors of their headings."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Return the arguments of each `unet-denoiser` command: a line of a code block, or code in a table."""
    lines = re.findall(r"^unet-denoiser ((?:.*\\\n)*.*)", text, flags=re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " "), comments=True) for line in lines]


def table_commands(document: Path) -> list[list[str]]:
    """Return the arguments of each command in the tables of a document."""
    text = document.read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^\|.*?`unet-denoiser (.*?)`", text, flags=re.MULTILINE)]


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub and MkDocs give to the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
