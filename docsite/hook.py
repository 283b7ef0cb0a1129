"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The site is of the sources that it lies in, wherever the package may be installed from.
if sys.path[0] != str(ROOT):
    sys.path.insert(0, str(ROOT))

from docsite.pages import filled, separated  # noqa: E402


def on_config(config: Any) -> Any:
    """Fills the navigation: a folder stands for the pages in it, and what is not there yet is left out."""
    docs = Path(config.docs_dir)
    config.nav = [entry for entry in (_entry(docs, each) for each in config.nav) if entry]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts in what is generated."""
    return separated(filled(markdown))


def _entry(docs: Path, entry: Any) -> Any:
    if isinstance(entry, str):
        return entry
    ((title, target),) = entry.items()
    if isinstance(target, list):
        return {title: [inner for inner in (_entry(docs, each) for each in target) if inner]}
    if target.endswith("/"):
        return {title: _pages(docs, docs / target)}
    if target.endswith("?"):  # a page of another change that may not have come yet
        target = target.removesuffix("?")
        return {title: target} if (docs / target).is_file() else None
    return {title: target}


def _pages(docs: Path, folder: Path) -> list[str]:
    """The pages of a folder by name, its README first."""
    pages = sorted(folder.glob("*.md"), key=lambda path: (path.name != "README.md", path.name))
    return [str(path.relative_to(docs)) for path in pages]
