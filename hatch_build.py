"""Metadata of the package for its page on a package index: links of README and of the project.

A build of a tag on GitHub (`.github/workflows/release.yml`) makes the relative links of README absolute, at that tag,
and adds links of the project. Any other build leaves README unchanged.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURES = (".gif", ".jpg", ".png", ".svg")


class Links(MetadataHookInterface):
    """Sets `readme` and `urls`, which pyproject.toml declares dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Raises FileNotFoundError: a link of README leads to no file of the repository."""
        root, urls = Path(self.root), {"Paper": "https://arxiv.org/abs/2504.19599"}
        text = (root / "README.md").read_text(encoding="utf-8")
        if (at := _address(os.environ)) is not None:
            repository, tag = at
            text = absolute(text, root, repository, tag)
            urls["Source"] = repository
            urls["Documentation"] = f"{repository}/blob/{tag}/docs/index.md"
            urls["Changelog"] = f"{repository}/blob/{tag}/CHANGELOG.md"
            urls["Issues"] = f"{repository}/issues"
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls


def _address(variables: Mapping[str, str]) -> tuple[str, str] | None:
    """(URL of the repository, tag) of a build of a tag on GitHub."""
    server, name, tag = (variables.get(f"GITHUB_{x}", "") for x in ("SERVER_URL", "REPOSITORY", "REF_NAME"))
    if not (server and name and tag) or variables.get("GITHUB_REF_TYPE") != "tag":
        return None
    return f"{server}/{name}", tag


def absolute(text: str, root: Path, repository: str, tag: str) -> str:
    """Markdown with its relative links made absolute: pictures to their bytes, other files to their page. Code blocks
    are unchanged.

    Raises: FileNotFoundError: a link leads to no file under `root`.
    """

    def link(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        if not (root / path).exists():
            raise FileNotFoundError(f"README links to {path}, which is not in the repository")
        kind = "raw" if path.endswith(PICTURES) else "blob"
        return f"]({repository}/{kind}/{tag}/{path}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    relative = r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)"
    return "".join(part if part.startswith("```") else re.sub(relative, link, part) for part in parts)
