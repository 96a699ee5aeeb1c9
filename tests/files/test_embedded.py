"""The embedded text is made once, and is the same each time."""

import logging

import pytest

from sae_toolkit.files import embedded
from sae_toolkit.files.embedded import embedded_articles


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def articles(directory):
    return list(embedded_articles(directory))


def test_what_is_kept_is_what_gensim_makes(articles, directory, monkeypatch, disk_of, caplog):
    made_anew = list(embedded_articles(disk_of("32k")))  # where no copy has room
    assert "the embedded text cannot be kept there" in caplog.text
    assert made_anew == articles
    assert len(articles) == 107
    monkeypatch.setattr(embedded, "_pages", None)  # gensim is not asked again
    assert list(embedded_articles(directory)) == articles


@pytest.mark.parametrize("lacks", [(), ("manifest.json",), ("manifest.json", "pages.jsonl")], ids=len)
def test_a_damaged_copy_is_made_again(articles, directory, caplog, lacks):
    """One that was changed, and one of which files were removed, as cleaners of caches do."""
    (pages,) = directory.glob("*/pages.jsonl")
    whole = pages.read_bytes()
    pages.write_bytes(whole.replace(b"the", b"teh", 1))
    for name in lacks:
        pages.with_name(name).unlink()
    with caplog.at_level(logging.INFO):
        assert list(embedded_articles(directory)) == articles
    assert pages.read_bytes() == whole
    assert "making the embedded text once, in" in caplog.text
