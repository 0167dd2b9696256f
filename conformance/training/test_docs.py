"""The examples in the docs: TOML blocks are settings, and the site's pages exist."""

import re
from pathlib import Path

import pytest

from gvpo_core.training.config.file import read_config

REQUIRED = {  # what a block of some sections leaves to the rest of the config
    "[model]": '[model]\npath = "model"\n',
    "[data]": '[data]\ntrain = "train.jsonl"\n',
    "[rewards.": '[rewards.right]\nfunction = "exact_match"\n',
}
ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [
    (page.name, block)
    for page in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.core
def test_toml_blocks_of_the_docs_are_settings(tmp_path):
    assert {name for name, _ in BLOCKS} >= {"README.md", "training.md", "choosing.md"}
    for number, (_, block) in enumerate(BLOCKS):
        path = tmp_path / f"{number}.toml"
        missing = [section for header, section in REQUIRED.items() if header not in block]
        path.write_text("\n".join([block, *missing]), encoding="utf-8")
        read_config(path)


@pytest.mark.core
def test_site_lists_every_page():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))
