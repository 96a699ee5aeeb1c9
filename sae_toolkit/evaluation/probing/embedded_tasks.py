"""Tasks from files of the gensim package: Wikipedia articles, news articles and Python code."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from sae_toolkit.evaluation.probing.tasks import Task
from sae_toolkit.files.embedded import embedded_articles, embedded_news, embedded_sources

_PER_CLASS = 400
_PER_DOCUMENT = 40  # of one class, so that no long article makes up the task
_LONGEST = 300  # characters
_APART = 10  # sentences between two that do not follow each other

_BIOGRAPHY = re.compile(r"\[\[Category:[^\]|]*\b(births|deaths)\b")
_COUNTRY = re.compile(r"\{\{ ?Infobox (country|U\.S\. state|province or territory of Canada)", re.IGNORECASE)
_YEAR = re.compile(r"\b(1\d{3}|20[0-2]\d)\b")
_HEADING = re.compile(r"^(=+) *(.*?) *=+$")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"][.!?])\s+(?=[A-Z\"])")
_PRESENT_SECTIONS = ("Economy", "Demographics", "Geography", "Culture")

_Examples = Iterator[tuple[int, bool, str]]  # number of the document, whether of class 1, and text


@dataclass(frozen=True)
class _Article:
    """An article of Wikipedia.

    Args:
        markup: its wiki markup.
        paragraphs: its top section's heading and the text of each paragraph.
        entries: the entries of its lists.
    """

    markup: str
    paragraphs: tuple[tuple[str, str], ...]
    entries: tuple[str, ...]

    def sentences(self) -> list[str]:
        """Returns the sentences of 40 to 300 characters, in order."""
        found = (sentence for _, paragraph in self.paragraphs for sentence in _sentences(paragraph))
        return [sentence for sentence in found if 40 <= len(sentence) <= _LONGEST]


def embedded_tasks() -> list[Task]:
    """Returns ten tasks of 800 texts at most, as many of each class. They are the same for each call.

    Raises:
        UserError: the package that carries the texts is not installed.
    """
    articles = [_article(markup, text) for markup, text in embedded_articles() if text]
    news, sources = embedded_news(), embedded_sources()
    made: dict[str, tuple[tuple[str, str], Callable[[], _Examples]]] = {
        "biography": (("another subject", "a person's life"), lambda: _about(articles, _BIOGRAPHY)),
        "country": (("another subject", "a country or state"), lambda: _about(articles, _COUNTRY)),
        "history_section": (("a section on the present", "a section History"), lambda: _history(articles)),
        "names_a_year": (("no year", "a year"), lambda: _years(articles)),
        "list_entry": (("a sentence", "an entry of a list"), lambda: _entries(articles)),
        "next_sentence": (("sentences from two places", "sentences in a row"), lambda: _pairs(articles)),
        "word_order": (("words in random order", "a sentence"), lambda: _orders(articles)),
        "news": (("Wikipedia", "news"), lambda: _news(articles, news)),
        "code": (("a docstring", "code"), lambda: _code(sources)),
        "test_code": (("code of the library", "code of its tests"), lambda: _test_code(sources)),
    }
    source = f"gensim {version('gensim')}"
    return [_task(name, source, classes, examples()) for name, (classes, examples) in made.items()]


def _task(name: str, source: str, classes: tuple[str, str], examples: _Examples) -> Task:
    """Returns a balanced task of different texts, drawn at random from the examples."""
    random = np.random.RandomState(0)  # its draws are the same in every version of numpy
    found = list({text: (document, label) for document, label, text in examples}.items())
    chosen: dict[bool, list[tuple[str, int]]] = {False: [], True: []}
    n_of: defaultdict[tuple[int, bool], int] = defaultdict(int)
    for place in random.permutation(len(found)):
        text, (document, label) = found[place]
        if len(chosen[label]) < _PER_CLASS and n_of[document, label] < _PER_DOCUMENT:
            n_of[document, label] += 1
            chosen[label].append((text, document))
    n = min(map(len, chosen.values()))
    both = chosen[False][:n] + chosen[True][:n]
    return Task(
        name=name,
        source=source,
        texts=tuple(text for text, _ in both),
        y_N=np.repeat([0, 1], n),
        classes=classes,
        document_N=np.array([document for _, document in both]),
    )


def _article(markup: str, text: str) -> _Article:
    paragraphs, entries, section = [], [], ""
    for line in text.split("\n"):
        if heading := _HEADING.match(line):
            if len(heading[1]) == 2:
                section = heading[2]
        elif entry := re.match(r"[*#:;]+ *(\S.*)", line):
            if len(entry[1]) >= 40:
                entries.append(_cut(entry[1]))
        elif len(line) >= 100:
            paragraphs.append((section, line))
    return _Article(markup, tuple(paragraphs), tuple(entries))


def _sentences(paragraph: str) -> list[str]:
    return [sentence.strip() for sentence in _SENTENCE_END.split(paragraph)]


def _cut(text: str) -> str:
    """Returns at most 300 characters of a text, cut where a word begins."""
    return text if len(text) <= _LONGEST else text[: _LONGEST + 1].rsplit(None, 1)[0]


def _about(articles: list[_Article], subject: re.Pattern[str]) -> _Examples:
    for number, article in enumerate(articles):
        label = subject.search(article.markup) is not None
        yield from ((number, label, _cut(paragraph)) for _, paragraph in article.paragraphs)


def _history(articles: list[_Article]) -> _Examples:
    for number, article in enumerate(articles):
        for section, paragraph in article.paragraphs:
            if section == "History" or section in _PRESENT_SECTIONS:
                yield number, section == "History", _cut(paragraph)


def _years(articles: list[_Article]) -> _Examples:
    for number, article in enumerate(articles):
        yield from ((number, _YEAR.search(sentence) is not None, sentence) for sentence in article.sentences())


def _entries(articles: list[_Article]) -> _Examples:
    for number, article in enumerate(articles):
        yield from ((number, True, entry.rstrip(".")) for entry in article.entries)
        yield from ((number, False, sentence.rstrip(".")) for sentence in article.sentences())


def _pairs(articles: list[_Article]) -> _Examples:
    for number, article in enumerate(articles):
        sentences = article.sentences()
        for i in range(0, len(sentences) - 2 * _APART, 4):
            follows = i % 8 == 0
            second = sentences[i + 1 if follows else i + _APART]
            yield number, follows, f"{sentences[i]} {second}"


def _orders(articles: list[_Article]) -> _Examples:
    random = np.random.RandomState(0)
    for number, article in enumerate(articles):
        for i, sentence in enumerate(article.sentences()):
            words = sentence.rstrip(".").split()
            yield number, i % 2 == 0, " ".join(words if i % 2 == 0 else random.permutation(words))


def _news(articles: list[_Article], news: list[str]) -> _Examples:
    for number, article in enumerate(articles):
        yield from ((number, False, sentence) for sentence in article.sentences())
    for number, text in enumerate(news, len(articles)):
        yield from ((number, True, s) for s in _sentences(text) if 40 <= len(s) <= _LONGEST)


def _functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields the docstring of each function, empty if it has none, and the code behind it."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            body = node.body[1:] if docstring else node.body
            if body and body[0].lineno > node.lineno:
                indented = lines[body[0].lineno - 1 : body[-1].end_lineno]
                yield docstring, "\n".join(line[body[0].col_offset :] for line in indented)


def _code(sources: list[tuple[str, str]]) -> _Examples:
    for number, (_, source) in enumerate(sources):
        for docstring, code in _functions(source):
            if len(docstring) >= 40:
                yield number, False, _cut(docstring)
            if len(code) >= 40:
                yield number, True, _cut(code)


def _test_code(sources: list[tuple[str, str]]) -> _Examples:
    for number, (path, source) in enumerate(sources):
        yield from ((number, path.startswith("test/"), _cut(code)) for _, code in _functions(source) if len(code) >= 40)
