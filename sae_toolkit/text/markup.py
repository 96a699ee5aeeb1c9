"""The text of HTML pages, without tags, scripts and styles."""

from __future__ import annotations

import re

from bs4 import BeautifulSoup
from bs4.builder import HTMLTreeBuilder
from bs4.dammit import EncodingDetector

# Characters that HTML allows in no page stand for line breaks, and for the white space of <pre>, which is kept.
_PARAGRAPH, _LINE, _BR = "\x01", "\x02", "\x03"
_KEPT, _AS_WRITTEN = str.maketrans(" \n\t", "\x04\x05\x06"), str.maketrans("\x04\x05\x06", " \n\t")
_BREAKS = dict.fromkeys(HTMLTreeBuilder.DEFAULT_BLOCK_ELEMENTS, _PARAGRAPH) | {
    **dict.fromkeys(("dd", "dt", "figcaption", "li", "tr"), _LINE),
    **dict.fromkeys(("td", "th"), " "),
}
_SPACES, _RUN_OF_BREAKS = re.compile(r"[ \t\r\n\f]+"), re.compile(r" ?[\x01-\x03][ \x01-\x03]*")


def text_of_html(data: bytes) -> str:
    """Returns the text of an HTML page as a browser would show it: an empty line between paragraphs, no tags.

    Beautiful Soup parses the page. It leaves out scripts, styles, comments and the like.

    Args:
        data: the page, in UTF-8 or in the encoding that it declares.

    Raises:
        UnicodeDecodeError: it is in neither.
    """
    soup = BeautifulSoup(_decoded(data), "html.parser")
    in_pre = {id(string) for tag in soup.find_all(["pre", "textarea"]) for string in tag.find_all(string=True)}
    as_shown = {
        id(string): string.translate(_KEPT) if id(string) in in_pre else _SPACES.sub(" ", string)
        for string in soup.strings
    }
    for tag in soup.find_all("br"):
        tag.append(_BR)
    for tag in soup.find_all(list(_BREAKS)):
        tag.insert(0, _BREAKS[tag.name])
        tag.append(_BREAKS[tag.name])
    text = re.sub(r" +", " ", "".join(as_shown.get(id(string), string) for string in soup.strings))
    return _RUN_OF_BREAKS.sub(_line_breaks, text).strip().translate(_AS_WRITTEN)


def _line_breaks(run: re.Match[str]) -> str:
    return "\n\n" if _PARAGRAPH in run[0] or run[0].count(_BR) > 1 else "\n"


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = EncodingDetector.find_declared_encoding(data, is_html=True)
        try:
            if declared is not None:
                return data.decode(declared)
        except (LookupError, UnicodeDecodeError):
            pass
        raise
