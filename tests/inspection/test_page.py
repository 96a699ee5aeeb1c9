"""features.html in a real browser: it opens as a file, shows what features.parquet has, and is driven by its user."""

from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect

from sae_toolkit.evaluation.feature_browser import decode_tokens

WIDTHS = (400, 1600)


@pytest.fixture
def opened(chromium, inspected, tokenizer):
    """Opens the page at a width. What it logs or fails to load is collected."""
    contexts, problems = [], []

    def open_page(width, address="", **settings):
        context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(inspected.with_name("features.html").as_uri() + address)
        expect(page.locator("#name")).to_be_visible()
        return page

    features = pq.read_table(inspected).to_pylist()
    yield SimpleNamespace(open=open_page, features=features, tokenizer=tokenizer)
    for context in contexts:
        context.close()
    assert not problems


def shown_numbers(page):
    return [int(text) for text in page.locator(".row b").all_inner_texts()]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_feature_is_shown_as_features_parquet_has_it(opened, width):
    feature = max(opened.features, key=lambda each: each["n_firings"])
    page = opened.open(width, f"#{feature['feature']}")
    expect(page.locator("#name")).to_contain_text(f"Feature {feature['feature']} ")
    numbers = page.locator(".numbers").inner_text()
    assert f"tokens {feature['n_firings']:,}" in numbers
    assert f"contexts {feature['n_contexts']:,}" in numbers
    assert page.locator("svg title").count() == len(page.locator("svg rect").all()) > 0
    bars = page.locator("svg title").evaluate_all("titles => titles.map(each => each.textContent)")
    assert sum(int(bar.rsplit(": ")[1].replace(",", "")) for bar in bars) == feature["n_firings"]
    texts = page.locator(".example .text").evaluate_all("texts => texts.map(each => each.textContent)")
    assert texts == ["".join(decode_tokens(opened.tokenizer, one["token_ids"])) for one in feature["examples"]]
    peak = feature["examples"][0]
    token = peak["token_ids"][peak["position"] - peak["first_position"]]
    assert (
        page.locator(".example b").first.evaluate("each => each.textContent")
        == decode_tokens(opened.tokenizer, [token])[0]
    )
    neighbors = page.locator(".tokens a").evaluate_all("links => links.map(each => each.getAttribute('href'))")
    assert neighbors == [f"#{each['feature']}" for each in feature["neighbors"]]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_search_sorting_and_filters_find_the_features_of_the_file(opened, width):
    page = opened.open(width)
    by_rate = sorted(opened.features, key=lambda each: -each["firing_rate"])
    page.select_option("#sort", "-rate")
    expect(page.locator(".row b").first).to_have_text(str(by_rate[0]["feature"]))
    dead = [each["feature"] for each in opened.features if each["n_firings"] == 0]
    page.check(".only[value=dead]")
    expect(page.locator("#count")).to_have_text(f"{len(dead)} of 128 features.")
    page.uncheck(".only[value=dead]")
    page.fill("#from", "0.05")
    page.locator("#from").press("Enter")
    frequent = [each for each in opened.features if each["firing_rate"] >= 0.05]
    expect(page.locator("#count")).to_have_text(f"{len(frequent)} of 128 features.")
    page.fill("#from", "")
    token = max((each["token"] for each in opened.features[0]["promoted"]), key=len)
    page.fill("#query", token)
    found = [each["feature"] for each in by_rate if token.strip().lower() in searched(each, opened.tokenizer)]
    assert 0 in found and len(found) < 128
    expect(page.locator("#count")).to_have_text(f"{len(found)} of 128 features.")
    assert set(shown_numbers(page)) <= set(found)
    context = next(each["examples"][0] for each in by_rate if each["examples"])
    text = "".join(decode_tokens(opened.tokenizer, context["token_ids"][:12])).strip()
    page.fill("#query", text)
    found = [each["feature"] for each in by_rate if text.lower() in searched(each, opened.tokenizer)]
    expect(page.locator("#count")).to_have_text(f"{len(found)} of 128 features.")
    page.fill("#query", "#7")
    expect(page.locator("#count")).to_have_text("1 of 128 features.")
    assert shown_numbers(page) == [7]


def searched(feature, tokenizer):
    """What a search looks at: the tokens at the peaks, the promoted tokens, and the three strongest contexts."""
    examples = feature["examples"]
    peaks = [each["token_ids"][each["position"] - each["first_position"]] for each in examples]
    strongest = [each["token_ids"] for each in examples if each["kind"] == "strongest"][:3]
    texts = [*decode_tokens(tokenizer, peaks), *(each["token"] for each in feature["promoted"])]
    texts += ["".join(decode_tokens(tokenizer, ids)) for ids in strongest]
    return "\n".join(texts).lower()


@pytest.mark.parametrize("width", WIDTHS)
def test_keys_links_and_addresses_move_through_the_features(opened, width):
    page = opened.open(width, "#5")
    page.keyboard.press("j")
    expect(page.locator("#name")).to_contain_text("Feature 6 ")
    assert page.url.endswith("#6")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("k")
    expect(page.locator("#name")).to_contain_text("Feature 4 ")
    neighbor = opened.features[4]["neighbors"][0]["feature"]
    page.locator(".tokens a").first.click()
    expect(page.locator("#name")).to_contain_text(f"Feature {neighbor} ")
    page.go_back()
    expect(page.locator("#name")).to_contain_text("Feature 4 ")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"


def test_light_and_dark_follow_the_system_and_the_key(opened):
    page = opened.open(1600, color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    assert opened.open(1600, color_scheme="light").evaluate("getComputedStyle(document.body).backgroundColor") == light
