"""The page in a real browser: offline, without an error, with surfaces that turn and tables that sort."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.pages import entry, page

api = pytest.importorskip("playwright.sync_api", reason="playwright (in the dev extra) drives the browser")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")

HOSTILE = "</script><img src=x onerror=window.hit=1>"
NAMES = ["sgd", "sam", "asam:rho=1", "msam"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        # No GPU and no sandbox: neither is there in a container.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(entry(NAMES)).html, encoding="utf-8")
    return path


class Opened:
    """A page that is open, and everything that went wrong on it."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"offline": True, "viewport": {"width": 1440, "height": 900}, **options})
        self.tab = self.context.new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        start = time.perf_counter()
        self.tab.goto(file.as_uri())
        self.seconds = time.perf_counter() - start

    def cameras(self) -> list[tuple[str, str]]:
        self.tab.wait_for_function(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )
        found = "all => all.map(c => [c.dataset.azimuth, c.dataset.elevation])"
        return [tuple(pair) for pair in self.tab.eval_on_selector_all(".surface canvas", found)]

    def pixels(self) -> list[str]:
        return self.tab.eval_on_selector_all(".surface canvas", "all => all.map(c => c.toDataURL())")


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Opened]:
    one = Opened(browser, file)
    yield one
    assert one.wrong == []
    one.context.close()


def test_it_opens_offline_alone_and_without_an_error(opened: Opened, file: Path) -> None:
    timing = opened.tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    print(f"opened in {opened.seconds:.2f} s; the load event came after {timing / 1000:.2f} s")
    assert opened.tab.title() == "Did sam, asam:rho=1 or msam help, against sgd?"
    assert {url for url in opened.asked if not url.startswith("data:")} == {file.as_uri()}


def test_the_keys_turn_all_surfaces_alike(opened: Opened) -> None:
    before, drawn = opened.cameras(), opened.pixels()
    assert len(before) == 4
    assert len(set(before)) == 1
    assert len(set(drawn)) == 4  # each is drawn, and differs
    opened.tab.focus(".surface canvas >> nth=1")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        opened.tab.keyboard.press(key)
    after = opened.cameras()
    assert set(after) == {
        (str(float(before[0][0]) + 10).removesuffix(".0"), str(float(before[0][1]) + 5).removesuffix(".0"))
    }
    assert all(a != b for a, b in zip(drawn, opened.pixels(), strict=True))


def test_the_mouse_turns_all_surfaces_alike_and_the_button_turns_back(opened: Opened) -> None:
    before, drawn = opened.cameras(), opened.pixels()
    opened.tab.locator(".surface canvas").first.scroll_into_view_if_needed()
    box = opened.tab.locator(".surface canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    opened.tab.mouse.move(x, y)
    opened.tab.mouse.down()
    opened.tab.mouse.move(x + 60, y + 20, steps=4)
    opened.tab.mouse.up()
    after = opened.cameras()
    assert len(set(after)) == 1
    assert after != before
    opened.tab.mouse.move(x, y)  # not held any more
    assert opened.cameras() == after
    opened.tab.click(".reset")
    assert opened.cameras() == before
    assert opened.pixels() == drawn


def test_a_dark_page_is_printed_for_white_paper(browser: Any, file: Path) -> None:
    light, dark = (Opened(browser, file, color_scheme=theme) for theme in ("light", "dark"))
    on_screen = dark.pixels()
    assert on_screen != light.pixels()
    dark.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert dark.pixels() == light.pixels()
    dark.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    dark.cameras()  # waits for two frames
    assert dark.pixels() == on_screen
    for one in (light, dark):
        assert one.wrong == []
        one.context.close()


def test_the_sliders_are_the_camera(opened: Opened) -> None:
    opened.tab.focus("input[name=azimuth]")
    opened.tab.keyboard.press("Home")
    assert {azimuth for azimuth, _ in opened.cameras()} == {"-180"}
    opened.tab.focus(".surface canvas >> nth=0")
    opened.tab.keyboard.press("ArrowLeft")
    assert opened.tab.input_value("input[name=azimuth]") == "175"


def test_a_finger_turns(browser: Any, file: Path) -> None:
    one = Opened(browser, file, has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    before = one.cameras()
    one.tab.locator(".surface canvas").first.scroll_into_view_if_needed()
    box = one.tab.locator(".surface canvas").first.bounding_box()
    x, y = box["x"] + 100, box["y"] + 80
    finger = one.context.new_cdp_session(one.tab)
    for kind, steps in (("touchStart", [0]), ("touchMove", [20, 40, 80]), ("touchEnd", [None])):
        for step in steps:
            points = [] if step is None else [{"x": x + step, "y": y}]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    after = one.cameras()
    assert len(set(after)) == 1
    assert after[0][0] != before[0][0]
    assert after[0][1] == before[0][1]
    assert one.wrong == []
    one.context.close()


def column(tab: Any, number: int) -> list[str]:
    cells = f"all => all.map(body => body.rows[0].cells[{number}].textContent)"
    return tab.eval_on_selector_all("#results table:first-of-type tbody", cells)


def test_tables_sort_by_mouse_and_keyboard(opened: Opened) -> None:
    tab = opened.tab
    buttons = tab.locator("#results button.sort")
    headings = tab.locator("#results thead th")
    assert column(tab, 0) == NAMES
    buttons.nth(2).click()
    assert column(tab, 0) == ["asam:rho=1", "sgd", "msam", "sam"]
    assert headings.nth(2).get_attribute("aria-sort") == "ascending"
    buttons.nth(2).focus()
    tab.keyboard.press("Enter")
    assert column(tab, 0) == ["sam", "msam", "sgd", "asam:rho=1"]
    assert headings.nth(2).get_attribute("aria-sort") == "descending"
    assert "falling" in tab.text_content("#said")
    buttons.nth(0).focus()
    tab.keyboard.press("Space")
    assert column(tab, 0) == sorted(NAMES)
    assert [headings.nth(n).get_attribute("aria-sort") for n in (0, 2)] == ["ascending", "none"]


def test_notes_stay_with_their_rows(opened: Opened) -> None:
    rows = "all => all.map(body => [body.rows[0].cells[0].textContent, body.rows[1].textContent])"
    table = "#flatness table:has(.note) tbody"
    before = dict(opened.tab.eval_on_selector_all(table, rows))
    opened.tab.locator("#flatness table:has(.note) button.sort").nth(2).click()
    after = opened.tab.eval_on_selector_all(table, rows)
    assert [name for name, _ in after] != list(before)
    assert dict(after) == before


@pytest.mark.parametrize("selector", ["#curves figure >> nth=0", "#flatness figure >> nth=0"])
def test_figures_are_saved_as_png_and_svg(opened: Opened, selector: str, tmp_path: Path) -> None:
    for what, start in (("button.png", b"\x89PNG"), ("a[download]", b"<svg")):
        with opened.tab.expect_download() as waiting:
            opened.tab.locator(selector).locator(what).click()
        target = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(target)
        content = target.read_bytes()
        assert content.startswith(start)
        assert len(content) > 3000


@pytest.mark.parametrize("size", [(320, 640), (390, 844), (820, 1180), (1440, 900)])
def test_nothing_is_wider_than_the_screen(browser: Any, file: Path, size: tuple[int, int]) -> None:
    one = Opened(browser, file, viewport={"width": size[0], "height": size[1]})
    assert one.tab.evaluate("document.documentElement.scrollWidth") <= size[0]
    one.context.close()


def test_without_scripts_the_still_surfaces_are_shown(browser: Any, file: Path) -> None:
    one = Opened(browser, file, java_script_enabled=False)
    assert one.tab.locator(".surface svg").first.is_visible()
    assert not one.tab.locator(".surface canvas").first.is_visible()
    assert not one.tab.locator("button.png").first.is_visible()
    one.context.close()


CONTRAST = """
() => {
  const parse = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 || c[3] > 0 ? c : null; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const c = parse(getComputedStyle(at).backgroundColor);
      if (c) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    if (["SCRIPT", "STYLE", "title", "desc"].includes(e.tagName)) continue;
    const style = getComputedStyle(e), ink = parse(e instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${e.tagName}: ${e.textContent.slice(0, 30)}`);
  }
  return [document.querySelectorAll("body *").length, poor];
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(browser: Any, file: Path, theme: str) -> None:
    one = Opened(browser, file, color_scheme=theme)
    one.tab.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true; })")
    looked_at, poor = one.tab.evaluate(CONTRAST)
    assert looked_at > 300
    assert poor == []
    one.context.close()


def test_every_control_is_reached_by_the_keyboard_and_has_a_name(opened: Opened) -> None:
    controls = "a[href], button:not([hidden]), input, canvas, summary, .scroll"
    names = opened.tab.eval_on_selector_all(
        controls,
        "all => all.map(e => [e.tabIndex, (e.getAttribute('aria-label') || e.closest('label')?.textContent "
        "|| e.textContent).trim()])",
    )
    assert len(names) > 30
    assert all(index >= 0 and name for index, name in names)
    opened.tab.keyboard.press("Tab")
    assert opened.tab.evaluate("document.activeElement.className") == "skip"
    assert opened.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    one = entry([name + HOSTILE for name in NAMES], name=HOSTILE, data_set=HOSTILE)
    path.write_text(page(one, one).html, encoding="utf-8")
    seen = Opened(browser, path)
    seen.tab.wait_for_timeout(200)
    assert seen.tab.evaluate("window.hit") is None
    assert seen.tab.locator("img").count() == 0
    assert seen.wrong == []
    assert HOSTILE in seen.tab.text_content("h1")
    seen.context.close()
