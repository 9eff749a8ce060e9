"""The page of a release: README.md as a registry can show it, and the addresses beside it.

A registry knows no file of this repository, so that relative links are dead there. With the address of the repository,
which is `repository` in pyproject.toml and nowhere else, they lead to the tag of the release. Without it they become
plain text, pictures are left out, and the release workflow publishes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from hatchling.metadata.plugin.interface import MetadataHookInterface

TARGET = r"<?(?P<{}>[^\s()<>]+)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?"
PARTS = re.compile(  # code, which stays, and all that has a target
    r"(?P<code>^\ *(?P<fence>```+|~~~+).*?^\ *(?P=fence)[`~]*\ *$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|!\[[^\[\]]*\]\(" + TARGET.format("picture") + r"\)"
    r"|\[(?P<text>(?:[^\[\]]|!?\[[^\[\]]*\](?:\([^()]*\))?)*)\]\(" + TARGET.format("link") + r"\)"
    r"|^\ {0,3}\[[^\]]+\]:\s*(?P<reference>\S+)"
    r"|<a\b[^<>]*?\bhref=[\"'](?P<anchor>[^\"']*)[\"'][^<>]*>(?P<content>.*?)</a>"
    r"|<(?:img|source)\b[^<>]*?\bsrc(?:set)?=[\"'](?P<source>[^\"']*)[\"'][^<>]*>",
    re.DOTALL | re.MULTILINE,
)


class Page(MetadataHookInterface):
    """Gives the project its `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        address = self.config["repository"].rstrip("/")
        if address and not address.startswith("https://"):
            raise ValueError(f"repository in pyproject.toml: expected https://..., found {address}")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": page(text, address, tag)}
        metadata["urls"] = urls(address, tag)


def urls(address: str, tag: str) -> dict[str, str]:
    """What a registry shows beside the page: nothing without the address of a repository."""
    if not address:
        return {}
    return {
        "Source": address,
        "Documentation": f"{address}/tree/{tag}/docs",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def page(text: str, address: str, tag: str) -> str:
    """Markdown without relative links and pictures; a relative target that is defined elsewhere is a `ValueError`."""

    def replaced(found: re.Match[str]) -> str:
        if found["code"] is not None:
            return found[0]
        (kind,) = (name for name in ("picture", "source", "link", "anchor", "reference") if found[name] is not None)
        content = found["text"] or found["content"] or ""  # may hold a picture
        if re.match(r"[a-z][a-z0-9+.-]*:|//", found[kind]):
            result = found[0]
        elif kind == "reference":
            raise ValueError(f"README.md: expected [text]({found[kind]}), found a reference to {found[kind]}")
        elif not address:
            result = content
        else:
            base = f"{address}/{'raw' if kind in ('picture', 'source') else 'blob'}/{tag}/README.md"
            start, end = (position - found.start() for position in found.span(kind))
            result = found[0][:start] + urljoin(base, found[kind]) + found[0][end:]
        return result.replace(content, page(content, address, tag), 1) if content else result

    return PARTS.sub(replaced, text)
