"""The report in a real browser. Skipped where there is none, unless LTE_REQUIRE_BROWSER is set, as in CI."""

import json
import os
import shutil

import pytest

import lte
from lte.cli.main import main
from result_rows import bench, row, write

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER) and not os.environ.get("LTE_REQUIRE_BROWSER"),
    reason="no chromium and chromedriver here: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def browser():
    assert BROWSER, "chromium is not installed, and LTE_REQUIRE_BROWSER is set"
    assert DRIVER, "chromedriver is not installed, and LTE_REQUIRE_BROWSER is set"
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(files, tmp_path_factory):
    """A report with everything in it, of two tiny models and rows made by hand."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("report")
    sparsify = ["sparsify", "--model", str(files / "llama"), "--expert-size", "8"]
    assert main([*sparsify, "-o", str(folder / "before")]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "before")
    lte.set_mode_(model, "hard")
    model.save_pretrained(folder / "after")
    shutil.copytree(folder / "before", folder / "after", dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
    methods = (("lte", 10.4), ("cats", 10.2), ("a-method-with-quite-a-long-name", 12))
    rows = [
        row(method, value + s, s, 0.2 - s / 10, seed=n) for method, value in methods for s in (0.3, 0.5) for n in (1, 2)
    ]
    rows += [row("dense", 10), {"command": "lte train " + "x" * 200, "error": "no memory " * 30}, bench()]
    (folder / "text.txt").write_text("One <b>and</b> two\nmake </script> three.\n")
    arguments = ["report", str(write(folder / "rows.jsonl", rows)), "-o", str(folder / "report.html")]
    arguments += ["--model", str(folder / "after"), "--before", str(folder / "before")]
    assert main([*arguments, "--text", str(folder / "text.txt")]) == 0
    return folder / "report.html"


@pytest.fixture
def at(browser, page):
    """Open the page at a width; what was logged before is gone."""

    def open_at(width):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(page.as_uri())
        return browser

    return open_at


@pytest.mark.parametrize("width", [360, 1200])
def test_it_renders_alone_and_fits(at, width):
    browser = at(width)
    assert browser.find_element("tag name", "h1").text == "Learn To be Efficient: results"
    for details in browser.find_elements("tag name", "summary"):
        details.click()
    charts = browser.find_elements("css selector", "figure svg")
    assert len(charts) == 2 + 3 + 1 + 1 + 1  # curves, layers, scores, union, speed
    for chart in charts:
        assert chart.get_attribute("aria-label")
        assert 250 < chart.size["width"] <= width
        assert chart.size["height"] > 100
    assert "LTE does not lead" in browser.find_element("id", "task-1").text
    assert "no memory" in browser.find_element("id", "failed").text
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.innerWidth") == width


def test_text_in_charts_can_be_read_on_a_phone(at):
    sizes = at(360).execute_script(
        "return [...document.querySelectorAll('figure svg text')].map((one) => {"
        "  const scale = one.ownerSVGElement.getScreenCTM().a;"
        "  return scale * parseFloat(getComputedStyle(one).fontSize)})"
    )
    assert len(sizes) > 50
    assert min(sizes) > 8.5


def test_the_layer_changes_the_tokens(at):
    from selenium.webdriver.support.select import Select

    browser = at(1200)
    text = browser.find_element("id", "text")
    assert "<b>and</b>" in text.text
    assert "</script>" in text.text

    def tokens(name):
        found = browser.find_elements("class name", "token")
        return [one.get_attribute(name) for one in found]

    layer = Select(browser.find_element("id", "layer"))
    assert [option.text for option in layer.options] == ["all, mean", "0", "1"]
    seen = {}
    for value in ("all", "0", "1"):
        layer.select_by_value(value)
        seen[value] = [float(one) for one in tokens("data-count")], tokens("style")
    assert seen["0"][0] != seen["1"][0]
    assert seen["0"][1] != seen["1"][1]
    mean = [(a + b) / 2 for a, b in zip(seen["0"][0], seen["1"][0], strict=True)]
    assert seen["all"][0] == pytest.approx(mean, abs=0.051)
    browser.find_element("id", "layer-up").click()
    assert layer.first_selected_option.text == "all, mean"
    assert tokens("style") == seen["all"][1]


def test_a_token_says_which_experts(at):
    from selenium.webdriver.common.keys import Keys

    browser = at(360)
    browser.find_element("id", "layer-up").click()
    first, second = browser.find_elements("class name", "token")[:2]
    first.click()
    chosen = browser.find_element("id", "chosen")
    assert chosen.text.startswith("Token 1, “O”, layer 0:")
    count = int(first.get_attribute("data-count"))
    listed = chosen.text.split("They are ")[1].rstrip(".")
    assert len([one for one in listed.split(", ") if one != "none"]) == count
    assert chosen.find_elements("tag name", "svg")
    first.send_keys(Keys.ARROW_RIGHT)
    assert chosen.text.startswith("Token 2, “n”, layer 0:")
    assert second.get_attribute("aria-pressed") == "true"
    assert first.get_attribute("aria-pressed") == "false"


def test_a_mark_has_a_tip(at):
    browser = at(1200)
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    browser.execute_script("document.querySelector('#task-1 .mark').focus()")
    assert tip.is_displayed()
    assert "GFLOPs per token" in tip.text
