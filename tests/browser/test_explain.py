"""The page of attention maps in a real browser: what it shows is what the model computed, with a mouse, with keys and
on a phone; nothing is fetched and nothing goes wrong.

Playwright drives the chromium that the system has; without either the tests are skipped, and say what to install.
"""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diptych.checkpoints.texts import open_text, open_tokenizer
from diptych.cli import cli
from diptych.core.attention import Tap
from tests.unit.folders import text_folder

playwright = pytest.importorskip("playwright.sync_api", reason="browser: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser: install chromium (Debian: apt-get install chromium)")

TEXT = 'the dog sleeps near <script>window.ran=1</script> & "a \'mill" 世 مر!'
LAYER, HEAD = 1, 2  # from 0; the page counts from 1
READING = "willReadFrequently"  # what chromium says of a test that reads a map's pixels
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page, made by the command, and what the model looks at by a tap of our own: (L, H, T, T)."""
    home = tmp_path_factory.mktemp("page")
    text_folder(home / "bert", "bert")
    done = CliRunner().invoke(cli, ["explain", TEXT, "--model", str(home / "bert"), "--out", str(home / "page.html")])
    assert done.exit_code == 0, done.output
    model, ids = open_text(home / "bert")[0], open_tokenizer(home / "bert")(TEXT)["input_ids"]
    with torch.no_grad(), Tap(*(block.attn for block in model.stack.blocks)) as tap:
        model(torch.tensor([ids]))
    return home / "page.html", torch.cat(tap.probabilities).numpy()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture
def visit(written, browser):
    """Opens the page; afterwards nothing has been fetched, and nothing said in the console, but what `expected` is."""
    said, fetched, expected, contexts = [], [], [], []

    def open_page(viewport, **options):
        context = browser.new_context(viewport=viewport, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(written[0].as_uri())
        return page

    open_page.expected = expected
    yield open_page
    assert [line for line in said if not any(part in line for part in expected)] == []
    assert fetched == [written[0].as_uri()] * len(contexts)
    for context in contexts:
        context.close()


def choose(page, layer=LAYER, head=HEAD):
    page.get_by_role("button", name=f"layer {layer + 1}, head {head + 1}", exact=True).click()
    assert page.locator("#chosen").inner_text() == f"Layer {layer + 1}, head {head + 1}"


def hover(page, q, k):
    """The pointer over a cell, and the number that is then shown."""
    box = page.locator("#map")
    size, count = box.bounding_box(), page.locator("#from span").count()
    box.hover(position={"x": (k + 0.5) * size["width"] / count, "y": (q + 0.5) * size["height"] / count})
    return float(page.locator("#readout b").inner_text())


def pixel(page, selector, x, y):
    """Red, green and blue of a cell of a map."""
    return page.eval_on_selector(selector, f"map => [...map.getContext('2d').getImageData({x}, {y}, 1, 1).data]")[:3]


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_head_is_clicked_and_its_cells_are_the_models(visit, written, viewport):
    page, (layers, heads, count, _) = visit(viewport), written[1].shape
    assert page.locator("#overview button").count() == layers * heads
    choose(page)
    want = written[1][LAYER, HEAD]
    labels = page.locator("#from span").all_inner_texts()
    assert len(labels) == count and labels[1:4] == ["the", "dog", "sleeps"]
    for q in (0, 2, count - 1):
        shown = [hover(page, q, k) for k in range(count)]
        np.testing.assert_allclose(shown, want[q], atol=7e-5)  # four digits, and the steps that numbers are kept in
        assert sum(shown) == pytest.approx(1, abs=count * 5e-5)
        assert page.locator("#readout").inner_text().startswith(f"{labels[q]} → {labels[count - 1]}: ")
    assert np.ptp(want[2]) > 0.3  # not a row that a flat map would have too
    choose(page, 0, 0)  # the cell stays where it is
    assert float(page.locator("#readout b").inner_text()) == pytest.approx(written[1][0, 0, -1, -1], abs=7e-5)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_word_shows_where_it_looks_and_who_looks_at_it(visit, written, viewport):
    page, want = visit(viewport), 100 * written[1][LAYER, HEAD]
    choose(page)
    word = page.locator("#words button").nth(2)
    for way, shares in (("where the chosen word looks", want[2]), ("which words look at it", want[:, 2])):
        page.get_by_label(way).check()
        word.hover()
        shown = [float(number) for number in page.locator("#words small").all_inner_texts()]
        np.testing.assert_allclose(shown, shares, atol=0.51)
        assert word.get_attribute("aria-pressed") == "true"
        most = page.locator("#words bdi").nth(int(shares.argmax())).inner_text()
        assert page.locator("#told bdi").all_inner_texts()[:2] == ["dog", most]
        said = page.locator("#told b").all_inner_texts()
        np.testing.assert_allclose([float(number) for number in said], np.sort(shares)[::-1][:3] / 100, atol=7e-5)


def test_small_and_large_maps_are_drawn_in_shades_of_the_weights(visit, written):
    page, weights = visit(WIDE), written[1]
    visit.expected.append(READING)
    choose(page)
    for selector, map_ in (("#map", weights[LAYER, HEAD]), ("#overview button:last-of-type canvas", weights[-1, -1])):
        (q, k), (a, b) = (np.unravel_index(find(map_), map_.shape) for find in (np.argmax, np.argmin))
        for x, y in ((k, q), (b, a)):
            share = np.sqrt(map_[y, x])
            mixed = [255 + share * (high - 255) for high in (0x12, 0x40, 0x6E)]
            np.testing.assert_allclose(pixel(page, selector, x, y), mixed, atol=1.5)


def test_dark_follows_the_system_at_once(visit, written):
    page = visit(WIDE, color_scheme="light")
    visit.expected.append(READING)
    choose(page)
    a, b = np.unravel_index(written[1][LAYER, HEAD].argmin(), written[1].shape[2:])
    assert min(pixel(page, "#map", b, a)) > 200
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 10  # the page hears of it a little later than we
    while max(pixel(page, "#map", b, a)) > 90:  # asked from here: its policy forbids what Playwright waits with inside
        assert time.monotonic() < deadline, "the map is still light"
        page.wait_for_timeout(20)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


def test_keys_do_all_that_a_mouse_does(visit, written):
    page, count = visit(WIDE), written[1].shape[-1]
    page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.locator("#chosen").inner_text() == "Layer 2, head 3"
    order = []
    while "field" not in order:  # of 12 maps one alone is on the way
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        assert len(order) < 5, order
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    shown = float(page.locator("#readout b").inner_text())
    assert shown == pytest.approx(written[1][1, 2, 1, 1], abs=7e-5)
    page.keyboard.press("End")
    assert f"token 2 looks at token {count}" in page.locator("#readout").inner_text()
    page.locator("#words button").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#told bdi").first.inner_text() == "the"
    page.locator("#layer").select_option(label="3")
    assert page.locator("#chosen").inner_text() == "Layer 3, head 3"


def test_a_cell_far_out_is_scrolled_to(visit, written):
    page = visit(PHONE)
    page.locator("#field").focus()
    page.keyboard.press("End")
    cursor, box = page.locator("#cursor").bounding_box(), page.locator("#scroller").bounding_box()
    assert box["x"] <= cursor["x"] and cursor["x"] + cursor["width"] <= box["x"] + box["width"]
    assert page.evaluate("document.getElementById('scroller').scrollLeft") > 0
    labels = page.locator("#from").bounding_box()
    page.keyboard.press("Home")
    assert page.locator("#cursor").bounding_box()["x"] >= labels["x"] + labels["width"] - 1


def test_what_the_text_says_is_shown_and_no_script_but_ours_runs(visit):
    page = visit(WIDE)
    assert page.locator("blockquote").inner_text() == TEXT
    labels = page.locator("#words bdi").all_inner_texts()
    assert "<" in labels and "世" in labels and "##ر" in labels
    visit.expected.append("Content Security Policy")
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), {textContent: 'window.ran=2'}))"
    )
    assert page.evaluate("window.ran === undefined")
