"""How the report's plots are made: matplotlib's SVG, turned into a part of an HTML page.

Colours are CSS variables of the page, so that a plot follows its light and dark mode, and text
stays text in the page's own font. One unit is one CSS pixel. A mark that belongs to a method or a
width carries it as `data-` attributes, by which the page's filter shows and hides it.
"""

import io
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import parse_qsl, urlencode
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins that matplotlib accepts; `inline` turns each into the page's CSS variable.
INK, MUTED, RULE, ACCENT, WARN, SURFACE = (f"#00000{digit}" for digit in range(1, 7))
SERIES = tuple(f"#00001{digit}" for digit in range(1, 7))
"""Colours of series that colour-blind readers tell apart; markers and dashes tell the rest."""

_VARIABLES = dict(
    zip(
        (INK, MUTED, RULE, ACCENT, WARN, SURFACE, *SERIES),
        ("ink", "muted", "rule", "accent", "warn", "surface", *(f"c{n}" for n in range(1, 7))),
        strict=True,
    )
)
_STAND_IN = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font(-family)?:[^;]*;?")
_GEOMETRY = frozenset({"d", "x", "y", "points", "transform"})
_LONG = re.compile(r"-?\d+\.\d{3,}")
_STYLED = re.compile(r'(?P<before><(?:g|path|text|use|rect)\b[^<>]*?) style="(?P<style>[^"]*)"')
_DATA = "data:"


def panel(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure of a size in CSS pixels with one axes inside these margins, without a frame."""
    figure = Figure(figsize=(width / 72, height / 72))
    box = (left / width, bottom / height)
    axes = figure.add_axes((*box, (width - left - right) / width, (height - top - bottom) / height))
    quiet(axes)
    return figure, axes


def quiet(axes: Axes) -> None:
    """No frame and no tick marks; the grid is enough to read a value."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=10.5, labelcolor=MUTED)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)


def plain(text: mpl.text.Text) -> mpl.text.Text:
    """Text that may hold a dollar sign."""
    text.set_parse_math(False)
    return text


def shortened(name: str, length: int = 18) -> str:
    """A name that fits; both ends stay: long names tend to differ in the last characters."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    if len(printable) <= length:
        return printable
    kept = length // 2
    return f"{printable[:kept]}…{printable[1 - kept :]}"


def marked(data: Mapping[str, str]) -> str | None:
    """The `gid` of an artist whose element shall carry these `data-` attributes."""
    return _DATA + urlencode(data) if data else None


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's own defaults whatever the user's are, and ids that do not change."""
    settings = {
        **{k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith(("backend", "dat"))},
        "svg.hashsalt": "quantwm",
        "svg.fonttype": "none",
        "font.size": 10.5,
        "text.color": INK,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The browser draws the text; which glyphs matplotlib's font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def inline(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for an HTML page, ids prefixed with `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    # Matplotlib's style element would apply to the whole page; the stylesheet holds its rule.
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _clean(element, name, used)
    _slim(root)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{figure.get_figwidth() * 72:g}",
        "height": f"{figure.get_figheight() * 72:g}",
        "role": "img",
        "aria-label": description,
    }
    return ElementTree.tostring(root, encoding="unicode")


def _id(name: str, own: str) -> str:
    """The page's id for one of a plot's own; short, because every marker repeats it."""
    return f"p{zlib.crc32(f'{name} {own}'.encode()):x}"


def _invisible(element: ElementTree.Element) -> bool:
    """Whether an element is a path without stroke and filling, as is a figure's background."""
    return element.attrib.get("style") == "fill:none" and "id" not in element.attrib


def shared_styles(html: str) -> tuple[str, str]:
    """Styles that several elements of a page's plots have, as classes.

    Returns:
        the page with classes in their place, and the rules.
    """
    counts = Counter(match["style"] for match in _STYLED.finditer(html))
    repeated = [style for style, count in counts.most_common() if count > 2]
    classes = {style: f"s{number}" for number, style in enumerate(repeated)}

    def named(match: re.Match[str]) -> str:
        style = match["style"]
        return f'{match["before"]} class="{classes[style]}"' if style in classes else match[0]

    rules = "\n".join(f".{name} {{{style}}}" for style, name in classes.items())
    return _STYLED.sub(named, html), rules


def _references(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key.endswith("href") or "url(#" in value:
                yield value


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    element.tag = element.tag.rpartition("}")[2]
    cleaned: dict[str, str] = {}
    for key, value in element.attrib.items():
        bare = key.rpartition("}")[2]
        text = value
        if bare == "id":
            if value.startswith(_DATA):
                pairs = parse_qsl(value.removeprefix(_DATA), keep_blank_values=True)
                cleaned |= {f"data-{attribute}": content for attribute, content in pairs}
                continue
            if value not in used:
                continue
            text = _id(name, value)
        elif bare == "href":
            text = f"#{_id(name, value.removeprefix('#'))}"
        elif match := re.fullmatch(r"url\(#(.*)\)", value):
            text = f"url(#{_id(name, match[1])})"
        elif bare in _GEOMETRY:
            text = _LONG.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
            text = re.sub(r" *\b([A-Zz]) *", r"\1", text).rstrip()
        if bare == "style":
            text = _STAND_IN.sub(lambda match: f"var(--{_VARIABLES[match[0]]})", text)
            if element.tag == "text":
                text = _style_of_text(text)
            text = re.sub(r"([:;]) +", r"\1", text)
        if not text.startswith("rotate(-0 "):
            cleaned[bare] = text
    element.attrib = cleaned


def _slim(element: ElementTree.Element) -> None:
    """Leave out what draws nothing: indentation, empty and needless groups, repeated styles."""
    children: list[ElementTree.Element] = []
    for child in element:
        _slim(child)
        if child.tag == "g" and not child.attrib:
            children += child
        elif (len(child) or child.attrib or child.text) and not _invisible(child):
            children.append(child)
    styles = {child.attrib.get("style") for child in children}
    if element.tag == "g" and len(children) > 1 and len(styles) == 1:
        style = styles.pop()
        if style is not None and "style" not in element.attrib:
            element.attrib["style"] = style
            for child in children:
                del child.attrib["style"]
    element[:] = children
    for part in children:
        part.tail = None
    if element.tag != "text":
        element.text = None


def _style_of_text(style: str) -> str:
    """Keep size, anchor and colour; the font is the page's."""
    size = re.search(r"([\d.]+)px", style)
    rest = _FONT.sub("", re.sub(r"font-size:[^;]*;?", "", style)).strip(" ;")
    return f"font-size: {size[1] if size else '10.5'}px; {rest}"
