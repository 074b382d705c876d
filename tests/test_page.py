"""The page in a browser: by mouse and keyboard, light and dark, narrow and wide."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("ANYORDER_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; ANYORDER_CHROMIUM names one"),
]

httpx = pytest.importorskip("httpx")

from anyorder.serving.service import Service  # noqa: E402
from serving import service_of, serving  # noqa: E402

playwright.expect.set_options(timeout=60_000)
REFUSED = "the server responded with a status of 400"  # a browser logs what the page shows
SHOTS = os.environ.get("ANYORDER_SCREENSHOTS")
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
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        one = context.new_page()
        one.on("pageerror", lambda error: wrong.append(str(error)))
        one.on(
            "console",
            lambda told: wrong.append(told.text) if told.type == "error" and REFUSED not in told.text else None,
        )
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
        field.select_option(value) if name in ("policy", "coupling") else field.fill(value)
    page.click("#fill")
    playwright.expect(page.locator(".card .status").first).to_have_text(re.compile("forwards|no blank"))


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


def test_what_else_might_have_stood_there(page):
    """By mouse and by keyboard: the five likeliest, the one that was taken marked."""
    fill(page, "a ___ b", length="3", policy="groupwise")
    tokens, details = page.locator(".out .token"), page.locator(".details")
    assert details.locator("tr").count() == 0
    tokens.nth(1).hover()
    assert details.locator("tr").count() in (5, 6)  # what was taken need not be one of the likeliest
    assert "step 2" in details.locator("caption").inner_text()
    assert details.locator("tr.taken").count() == 1
    shares = [float(text) for text in details.locator("td:first-child").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    page.locator(".out").focus()
    page.keyboard.press("Tab")
    assert "step 1" in details.locator("caption").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "step 3" in details.locator("caption").inner_text()
    page.keyboard.press("ArrowRight")  # the last one
    assert page.evaluate("document.activeElement.classList.contains('shown')")


def test_what_is_copied_asks_for_the_same(page, address):
    fill(page, 'it\'s a ___ "b" ___', length="2", policy="dynamic:criterion=entropy", group="2", coupling="")
    shown = page.locator(".out").inner_text()
    page.click("#curl")
    playwright.expect(page.locator("#copied")).to_have_text("curl copied")
    program, url, _, kind, _, body = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    name, _, value = kind.partition(": ")
    assert program == "curl"
    assert httpx.post(url, content=body, headers={name: value}, timeout=60).json()["text"] == shown
    page.click("#python")
    playwright.expect(page.locator("#copied")).to_have_text("Python copied")
    found = []
    exec(page.evaluate("navigator.clipboard.readText()"), {"print": found.append})
    assert found == [shown]
    assert json.loads(body)["policy"] == "dynamic:criterion=entropy,step_size=2"
    assert json.loads(body)["coupling"] is False


def test_axe_finds_nothing(page):
    """No violation of WCAG: empty, filled, with two ways and with a mistake."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    states = [
        lambda: None,
        lambda: fill(page, "a ___ b", length="3"),
        lambda: page.locator(".out .token").first.hover(),
    ]
    states += [lambda: page.click("#second"), lambda: fill(page, "no gap")]
    for state in states:
        state()
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()


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


@pytest.mark.smollm2
@pytest.mark.skipif(SHOTS is None, reason="ANYORDER_SCREENSHOTS names the folder for pictures of the page")
def test_pictures(browser, smollm2):
    """Light, dark, and in the middle of decoding, with the built-in model: `docs/images`."""
    folder = Path(SHOTS or "")
    with serving(Service(*smollm2, "smollm2-135m"), slots=1, capacity=256) as (address, _):
        for scheme in ("light", "dark"):
            with browser.new_context(color_scheme=scheme, viewport={"width": 760, "height": 760}) as context:
                page = context.new_page()
                page.goto(address)
                fill(page, page.input_value("#text"), policy="dynamic:criterion=confidence")
                page.locator(".out .token").nth(1).hover()
                page.screenshot(path=folder / f"page_{scheme}.png", full_page=True)
                if scheme == "light":
                    steps = int(page.locator(".scrub").get_attribute("max"))
                    page.locator(".scrub").fill(str(steps // 2))
                    page.screenshot(path=folder / "page_decoding.png", full_page=True)
    for name in ("light", "dark", "decoding"):
        assert 5_000 < (folder / f"page_{name}.png").stat().st_size < 150_000
