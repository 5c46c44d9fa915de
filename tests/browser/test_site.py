"""The built site in a headless Chromium: pages, search, equations, both themes, a phone."""

import functools
import http.server
import pathlib
import shutil
import threading

import pytest

selenium = pytest.importorskip("selenium", reason="make browser installs selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

SITE = pathlib.Path(__file__).parents[2] / "build" / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DESKTOP, PHONE = (1440, 1000), (390, 844)
PAGES = (
    "index.html",
    "get_started.html",
    "guides/threshold.html",
    "guides/flax.html",
    "how_it_works.html",
    "qk_clip.html",
    "numerics.html",
    "evidence.html",
    "comparison.html",
    "api/optimizers.html",
    "notebooks/quick_start.html",
)

pytestmark = pytest.mark.browser


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address():
    assert SITE.exists(), "make docs builds the site"
    handler = functools.partial(_Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "there is neither chromium nor google-chrome"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, address):
    """Opens a page of the site at a size and in a color scheme, and returns the browser."""

    def open_page(page, size=DESKTOP, scheme="light"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        screen["mobile"] = size == PHONE
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(f"{address}/{page}")
        return browser

    return open_page


def text(browser):
    return browser.find_element(By.TAG_NAME, "article").text


def shown(browser, selector):
    return [x for x in browser.find_elements(By.CSS_SELECTOR, selector) if x.is_displayed()]


def test_start_page_has_the_chapters_and_the_install_command(visit):
    browser = visit("index.html")
    assert "pip install" in text(browser)
    captions = [x.text for x in shown(browser, ".sidebar-tree .caption")]
    assert [caption.capitalize() for caption in captions[:2]] == ["Get started", "Guides"]
    assert "Api reference" in [caption.capitalize() for caption in captions]


def test_guide_shows_code_and_tables(visit):
    browser = visit("qk_clip.html")
    assert "mc.MLALayout(" in text(browser)
    assert shown(browser, "article table")
    assert shown(browser, "div.highlight-python")
    assert "<!--" not in text(browser)
    assert "table: layouts" not in text(browser)


def test_api_page_shows_signature_arguments_and_example(visit):
    browser = visit("api/optimizers.html#muonclip_jax.muon")
    signature = browser.find_element(By.ID, "muonclip_jax.muon")
    assert "learning_rate: optax.ScalarOrSchedule" in signature.text
    assert ">>> tx = mc.muon(" in text(browser)
    links = [x.get_attribute("href") for x in shown(browser, "article a.reference.internal")]
    assert any(link.endswith("transforms.html#muonclip_jax.scale_by_muon") for link in links)


@pytest.mark.parametrize(
    ("words", "page"),
    [("polar_express_coefficients", "api/newton_schulz.html"), ("grouped queries", "qk_clip.html")],
)
def test_search_finds_a_name_and_a_page(visit, words, page):
    browser = visit("index.html")
    field = browser.find_element(By.CSS_SELECTOR, "input.sidebar-search")
    field.send_keys(words)
    field.submit()
    found = "#search-results ul.search li a"
    link, *_ = WebDriverWait(browser, 20).until(
        lambda b: [url for x in shown(b, found) if page in (url := x.get_attribute("href"))]
    )
    browser.get(link)
    assert words in text(browser)


def test_notebook_shows_code_output_and_plots(visit):
    browser = visit("notebooks/quick_start.html")
    assert shown(browser, "div.highlight-python")
    assert shown(browser, "div.highlight-text")
    plots = browser.find_elements(By.CSS_SELECTOR, "article img")
    assert plots
    assert all(x.get_property("naturalWidth") > 300 for x in plots)


def test_equations_are_drawn(visit):
    browser = visit("how_it_works.html")
    equations = shown(browser, "article svg[aria-label]")
    assert len(equations) >= 15
    assert all(x.size["height"] > 5 for x in equations)
    assert "$" not in text(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_and_background_follow_the_theme(visit, scheme):
    browser = visit("how_it_works.html", scheme=scheme)
    drawn = [x.get_attribute("src").rsplit("/", 1)[1] for x in shown(browser, "article img")]
    assert len(drawn) == 5
    assert all(name.endswith("-dark.svg") == (scheme == "dark") for name in drawn)
    color = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert (sum(browser.execute_script(color)[:3]) < 300) == (scheme == "dark")


def luminance(rgb):
    """Relative luminance of a color, by WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_changed_lines_have_contrast(visit, scheme):
    browser = visit("index.html", scheme=scheme)
    style = "return getComputedStyle(arguments[0])[arguments[1]].match(/[\\d.]+/g).map(Number)"

    def color(element, name):
        *rgb, alpha = [*browser.execute_script(style, element, name), 1][:4]
        return [c / 255 for c in rgb], alpha

    block = browser.find_element(By.CSS_SELECTOR, ".highlight-diff .highlight")
    below, _ = color(block, "backgroundColor")
    lines = block.find_elements(By.CSS_SELECTOR, ".gi, .gd")
    assert lines
    for line in lines:
        tint, alpha = color(line, "backgroundColor")
        back = [alpha * t + (1 - alpha) * b for t, b in zip(tint, below, strict=True)]
        light, dark = sorted((luminance(color(line, "color")[0]), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # level AA of WCAG 2.2


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_screen_and_loads_only_from_the_site(visit, address, page, size):
    browser = visit(page, size)
    browser.get_log("browser")  # empties it
    browser.refresh()
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]
    loaded = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    foreign = [x for x in browser.execute_script(loaded) if not x.startswith((address, "data:"))]
    assert not foreign
    assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []


def test_every_link_of_the_navigation_opens(visit, address):
    browser = visit("index.html")
    links = {
        x.get_attribute("href") for x in browser.find_elements(By.CSS_SELECTOR, ".sidebar-tree a")
    }
    assert len(links) > 20
    for link in links:
        path = link.removeprefix(f"{address}/").split("#")[0] or "index.html"
        assert (SITE / path).is_file(), link
