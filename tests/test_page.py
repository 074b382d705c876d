"""The page in a browser: by mouse and keyboard, light and dark, narrow and wide."""

from __future__ import annotations

import os
import re
import shutil

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("ANYORDER_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; ANYORDER_CHROMIUM names one"),
]

from serving import service_of, serving  # noqa: E402

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def address(byte_tokenizer):
    with serving(service_of(byte_tokenizer)) as (own, _):
        yield own


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield one
        one.close()


@pytest.fixture(params=["light", "dark"])
def page(request, browser, address):
    wrong = []
    with browser.new_context(color_scheme=request.param, viewport={"width": 900, "height": 900}) as context:
        one = context.new_page()
        one.on("pageerror", lambda error: wrong.append(str(error)))
        one.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        one.on(
            "request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((address, "data:")) else None
        )
        one.goto(address)
        yield one
    assert not wrong  # no error of a script's, and nothing fetched from elsewhere


def fill(page, text, **fields):
    page.fill("#text", text)
    for name, value in fields.items():
        field = page.locator(f"[data-field={name}]").first
        field.select_option(value) if name == "policy" else field.fill(value)
    page.click("#fill")
    playwright.expect(page.locator(".card .status")).to_have_text(re.compile("forwards|no blank"))


def test_tokens_arrive_and_can_be_scrubbed(page):
    fill(page, "a ___ b ___ <b>c</b>", length="3", policy="dynamic:criterion=entropy")
    assert "6 tokens in" in page.locator(".card .status").inner_text()
    assert page.locator(".out .token").count() == 6
    assert page.locator(".out b").count() == 0  # text is text
    scrub = page.locator(".scrub")
    scrub.fill("2")
    assert page.locator(".out .token").count() == 2
    assert page.locator(".out .open").count() == 4
    assert "probability" in page.locator(".out .token").first.get_attribute("title")
    assert page.locator("#model").inner_text() == "tiny"


def test_mistakes_are_shown(page):
    fill(page, "no gap")
    assert "no blank in" in page.locator(".card .status").inner_text()


def test_two_ways_side_by_side_by_keyboard_alone(page):
    page.focus("#second")
    page.keyboard.press("Enter")
    assert page.locator(".card").count() == 2
    page.focus("#text")
    page.keyboard.press("Control+A")
    page.keyboard.type("a ___ b")
    page.keyboard.press("Control+Enter")
    for number in range(2):
        playwright.expect(page.locator(".card .status").nth(number)).to_have_text(re.compile("forwards"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "blank"


def test_every_field_has_a_name_and_the_page_fits_a_phone(page):
    assert page.evaluate("[...document.querySelectorAll('input,select,textarea')].every((one) => one.labels.length)")
    assert page.evaluate("[...document.querySelectorAll('button')].every((one) => one.textContent.trim())")
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
