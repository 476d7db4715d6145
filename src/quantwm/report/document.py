"""The report's page: sections, their contents, and a frame that loads nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TypeAlias

from quantwm.report.svg import shared_styles
from quantwm.report.tables import Table, data_attributes, tables_in
from quantwm.report.text import escape

Part: TypeAlias = str | Table
"""HTML, or a table."""


@dataclass(frozen=True)
class Section:
    """A titled part of the page; without parts and children it vanishes.

    Attributes:
        id: what the contents link to; unique in the page.
        title: plain text.
        parts: in order, before the children.
        task: which task it belongs to, for the filter; "" for all.
        listed: whether the contents name it.
        folded: whether it starts closed.
    """

    id: str
    title: str
    parts: Sequence[Part] = ()
    children: Sequence["Section"] = field(default=())
    task: str = ""
    listed: bool = True
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not any(self.parts) and all(child.empty for child in self.children)

    def tables(self) -> Iterator[Table]:
        """Its tables and those of its children."""
        yield from tables_in(self.parts)
        for child in self.children:
            yield from child.tables()

    def html(self, level: int = 2, *, linked: bool = True) -> str:
        """The section with a heading of a level; "" if it is empty.

        Args:
            level: of the heading.
            linked: whether tables link to their CSV.
        """
        if self.empty:
            return ""
        content = "".join(
            part.html(linked=linked) if isinstance(part, Table) else part for part in self.parts
        )
        content += "".join(child.html(level + 1, linked=linked) for child in self.children)
        heading = f"<h{level}>{escape(self.title)}</h{level}>"
        if self.folded:
            content = f"<details><summary>{heading}</summary>{content}</details>"
        else:
            content = heading + content
        task = data_attributes({"task": self.task})
        return f'<section id="{escape(self.id)}"{task} data-group>{content}</section>'


def contents(sections: Sequence[Section]) -> str:
    """Links to the sections and their children."""

    def entry(section: Section) -> str:
        inner = listing(section.children)
        link = f'<a href="#{escape(section.id)}">{escape(section.title)}</a>'
        return f"<li{data_attributes({'task': section.task})}>{link}{inner}</li>"

    def listing(members: Sequence[Section]) -> str:
        entries = [entry(one) for one in members if one.listed and not one.empty]
        return f"<ul>{''.join(entries)}</ul>" if entries else ""

    return f'<nav class="contents" aria-label="Contents">{listing(sections)}</nav>'


def page(title: str, body: str, *, filtered: bool) -> str:
    """The whole document.

    Args:
        title: plain text.
        body: HTML inside `main`.
        filtered: whether the page has a filter, and so its script, which the page's policy
            allows by its hash; without one no script runs.
    """
    body, rules = shared_styles(body)
    style = f"{_resource('style.css')}{rules}\n"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    script = ""
    if filtered:
        code = _resource("filter.js")
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        script = f"<script>{code}</script>\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
"""


def _resource(name: str) -> str:
    return resources.files("quantwm.report").joinpath(name).read_text(encoding="utf-8")
