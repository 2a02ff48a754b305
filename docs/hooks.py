"""MkDocs hook: relative links to files outside docs/ work on GitHub; the site shows their text without the link."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link that leaves docs/ by its text and the file's path from the repository's root."""
    folder = (DOCS / page.file.src_uri).parent

    def replace(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        path = f"`{target.relative_to(DOCS.parent)}`"
        return path if link[1].strip("`") in path else f"{link[1]} ({path})"

    return LINK.sub(replace, markdown)
