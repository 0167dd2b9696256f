"""mkdocs hook: a link to a file outside docs/, which the site does not hold, becomes its text and path."""

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Raises FileNotFoundError: the linked file is not in the repository."""
    root = Path(config["config_file_path"]).parent

    def replace(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        if not (root / path).exists():
            raise FileNotFoundError(f"a page links to {path}, which is not in the repository")
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", replace, markdown)
