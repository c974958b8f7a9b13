"""Reports in headless Chromium: every figure is there, nothing is asked of the network, nothing overflows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from made_up_study import SMALL, made_up

from vespo_megatron.study.report import write_report
from vespo_megatron.study.spec import load_study
from vespo_megatron.study.study_report import write_study_report

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=120_000)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A study's page, and that of its runs; long names and many metrics, so that there is something to overflow."""
    folder = tmp_path_factory.mktemp("pages")
    path = folder / "small.yaml"
    text = SMALL.format(base=ROOT / "examples/tiny_moe/in_process.yaml", output=folder / "runs")
    text = text.replace("  again:", "  a_variant_with_a_long_name_that_has_no_place_to_break:")
    path.write_text(text.replace("seeds: [1, 2]", "seeds: [1, 2, 3]") + "published: {source: a paper, values: {}}\n")
    study = load_study(path)
    made_up(study, lambda cell, steps: [0.5 + 0.4 * math.sin(step + cell.seed) for step in range(steps)], steps=30)
    runs = [study.folder(cell) for cell in study.cells()]
    return {"study": write_study_report(study), "runs": write_report(runs, folder / "runs.html")}


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("which", ["study", "runs"])
def test_a_page_is_whole(which, width, browser, pages, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[which].as_uri(), wait_until="load")
    images = page.evaluate(
        """() => [...document.images].map(image => {
            const box = image.getBoundingClientRect();
            return [image.complete && image.naturalWidth > 0, box.width, box.left, box.right];
        })"""
    )
    assert len(images) >= 2
    for whole, drawn_width, left, right in images:
        assert whole and drawn_width > 200 and left >= 0 and right <= width
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
