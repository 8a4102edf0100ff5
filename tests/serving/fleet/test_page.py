"""The page, as a person uses it: a real browser, a real server, a real model."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.fleet.conftest import Client

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.host,
    pytest.mark.xdist_group("fleet"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
SECONDS = 1000.0


@pytest.fixture(scope="module")
def page(client: Client) -> Iterator[Any]:
    """The page, opened; whatever it complains of to the console fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 960, "height": 760})
        complaints: list[str] = []
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        # A request that is refused stands in the console, too.
        opened.on(
            "console", lambda said: complaints.append(said.text) if said.type == "error" and " 422 " not in said.text else None
        )
        opened.set_default_timeout(60 * SECONDS)
        opened.goto(client.url)
        opened.wait_for_function("document.title == 'mini-flux'")
        yield opened
        browser.close()
        assert complaints == []


def card(page: Any, number: int) -> Any:
    """The latest request is the first one."""
    return page.locator("#requests article").nth(number)


def draw(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    page.click("form button")


def test_a_person_draws(page: Any):
    assert page.input_value("[name=prompt]") == "a handwritten seven on a flower"
    draw(page, steps=28, seed=5, count=2)
    page.wait_for_function("document.querySelectorAll('article.drawn img').length == 2")
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth == 32)")
    assert card(page, 0).locator("h2").inner_text() == "a handwritten seven on a flower (seed 6)"
    facts = card(page, 0).locator(".facts").inner_text()
    assert facts.startswith("drawn · 28 of 28 steps · ")
    computed = card(page, 0).locator(".steps .F").count()
    forecast = card(page, 0).locator(".steps .f").count()
    assert computed + forecast == 28
    assert 4 <= computed <= 14
    assert f"{computed} computed · {28 / computed:.2f}x fewer" in facts
    page.wait_for_function("document.querySelector('#fleet').innerText.includes('drawn')")


def test_a_person_watches_and_gives_up(page: Any):
    draw(page, prompt="a handwritten two on a palace", steps=900, count=1)
    page.wait_for_function("document.querySelector('article').dataset.state == 'drawing'")
    page.wait_for_function("document.querySelectorAll('article:first-child .steps .F').length > 2")
    assert card(page, 0).locator(".steps i").count() == 900
    card(page, 0).locator("button").click()
    page.wait_for_function("document.querySelector('article').dataset.state == 'cancelled'")
    assert not card(page, 0).locator("button").is_visible()


def test_what_is_wrong_is_said(page: Any):
    page.evaluate("document.querySelector('form').noValidate = true")
    draw(page, prompt="a handwritten two on a palace", steps=5000, count=1)
    problem = page.locator("#problem")
    problem.wait_for(state="visible")
    assert problem.inner_text() == "steps: Input should be less than or equal to 1000"
    draw(page, prompt="<b>bold</b>", steps=4)
    page.wait_for_function("document.querySelector('article').dataset.state == 'drawn'")
    assert not problem.is_visible()
    # Words stay words.
    assert card(page, 0).locator("h2").inner_text().startswith("<b>bold</b>")
