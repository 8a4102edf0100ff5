"""A picture of the page of `afcache serve`, while it draws.

    ./run_afcache.sh serve --replicas 2 --max-requests 4 &
    python -m bench.load.screenshot --url http://127.0.0.1:8000

Needs Chromium. Two images are drawn first, then two longer ones are taken in the middle.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from bench.record.naming import RESULTS

_PROMPTS = ("a handwritten seven on a flower", "a handwritten three on a palace")


def take(url: str, path: Path) -> None:
    """Draw, and take the picture.

    Args:
        url: of the server.
        path: of the PNG.

    """
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 980, "height": 900}, device_scale_factor=1.5)
        page.goto(url)
        page.wait_for_function("document.title != 'AFCache'")
        for seed, prompt in enumerate(_PROMPTS):
            _ask(page, prompt=prompt, steps=28, seed=seed + 3)
        page.wait_for_function("document.querySelectorAll('article.drawn img').length == 2")
        page.select_option("[name=preset]", "quality")
        page.wait_for_function("document.querySelector('#fleet').innerText.includes('drawn')")
        _ask(page, prompt="a handwritten five on a flower", steps=120, seed=5, count=2)
        page.wait_for_function("document.querySelectorAll('article.drawing .steps .F').length > 8")
        page.screenshot(path=path, full_page=True)
        browser.close()


def _ask(page: Any, **fields: Any) -> None:
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    before = page.locator("article").count()
    page.click("form button")
    page.wait_for_function(f"document.querySelectorAll('article').length > {before}")


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_page.png")
    arguments = parser.parse_args()
    take(arguments.url, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
