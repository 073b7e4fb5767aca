"The page in a real browser; `.ci/run` installs one."
import base64
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from defect_detect.core.bundle import BundleCard, OperatingPoint, example_model, write_bundle
from defect_detect.core.image import InputSpec
from defect_detect.serve.api import background
from defect_detect.serve.settings import Settings
from serving import WEB, encode, plate

TOKEN = "only-for-this-test-0123456789"
XSS = "<img src=x onerror=document.title='run'>"
SHOTS = os.environ.get("DEFECT_SHOTS") # a folder: keep what the browser showed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    spec = InputSpec(height=128, width=128)
    card = BundleCard(name="example-spot", classes=("background", "spot", XSS), input=spec, operating_point=OperatingPoint(score_pixels=8, review_from=.3, chosen_for="an example <b>not</b> chosen by data"))
    return write_bundle(tmp_path_factory.mktemp("page")/"bundle", card, example_model(spec, kinds=2))


@pytest.fixture(scope="module")
def browser():
    driver, program = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not program: pytest.skip("chromium and chromium-driver are not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        o = webdriver.ChromeOptions()
        o.binary_location = program
        for f in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={tmp}"): o.add_argument(f)
        o.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        b = webdriver.Chrome(options=o, service=Service(driver))
        yield b
        b.quit()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    p = tmp_path_factory.mktemp("picture")/"part.png"
    p.write_bytes(encode(plate(150, 200, [(100, 60), (30, 100)])))
    return p


def size(b, w, h=900): b.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=w, height=h, deviceScaleFactor=1, mobile=False))
def text(b, css): return b.find_element(By.CSS_SELECTOR, css).text
def wait(b, f): return WebDriverWait(b, 20, .05).until(lambda _: f())
def complaints(b): return [e["message"] for e in b.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
def shot(b, name):
    if SHOTS: b.save_screenshot(str(Path(SHOTS)/name))


def judge(b, url, picture):
    b.get(url)
    b.get_log("browser")
    wait(b, lambda: "version" in text(b, "#model"))
    b.find_element(By.ID, "file").send_keys(str(picture))
    wait(b, lambda: b.find_element(By.ID, "result").is_displayed())


def canvas(b):
    "The picture as it is drawn."
    data = b.execute_script("return document.getElementById('picture').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")).astype(int)


@pytest.mark.parametrize("width", [1280, 400])
def test_page(bundle, browser, picture, width):
    size(browser, width)
    with background(Settings(bundle=bundle, threads=1)) as u:
        judge(browser, u, picture)
        want = WEB.post(f"{u}/v1/predict", content=picture.read_bytes(), headers={"content-type": "image/png"}).json()
        assert text(browser, "#verdict") == "Defective" and f"{want['score']:.3f}" in text(browser, "#score")
        assert len(browser.find_elements(By.CSS_SELECTOR, "#regions tbody tr")) == len(want["regions"]) == 2
        words = text(browser, "#words")
        assert "0.500" in words and "0.300" in words and "a person should look" in words and "<b>not</b>" in words
        assert XSS in text(browser, "#model") and browser.title == "defect_detect"
        shot(browser, f"page-{width}.png")
        wide, there = browser.execute_script("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide<=there<=width, f"{wide} px wide"
        drawn = canvas(browser)
        scale = drawn.shape[1]/200
        def at(x, y): return drawn[int(y*scale), int(x*scale)]
        for left, top, _, _ in (r["box"] for r in want["regions"]): assert np.ptp(at(left, top+6))>60, "the box is drawn in colour where the region is"
        assert np.ptp(at(106, 66))>15, "the mask shows"
        browser.execute_script("const s = document.getElementById('strength'); s.value = 0; s.dispatchEvent(new Event('input')); document.getElementById('boxes').click()")
        assert np.ptp(canvas(browser).reshape(-1, 3), 1).max() == 0, "without mask and boxes the grey picture is there as it was"
        browser.find_element(By.ID, "file").send_keys(str(Path(__file__)))
        wait(browser, lambda: browser.find_element(By.ID, "trouble").is_displayed())
        assert "Not a picture of an allowed format" in text(browser, "#trouble") and not browser.find_element(By.ID, "result").is_displayed()
        assert [c for c in complaints(browser) if "415" not in c] == []
        events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
        urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent" and e["params"].get("documentURL", "").startswith(u)}
        assert u+"/page.js" in urls and {x for x in urls if not x.startswith((u, "blob:"+u, "data:"))} == set()


def test_a_good_part_and_one_to_look_at(bundle, browser, tmp_path):
    size(browser, 1280)
    (tmp_path/"good.png").write_bytes(encode(plate()))
    with background(Settings(bundle=bundle, threads=1)) as u:
        judge(browser, u, tmp_path/"good.png")
        assert text(browser, "#verdict") == "Good" and "No region" in text(browser, "#more")
        shot(browser, "page-good.png")


def test_a_token_is_asked_for(bundle, browser, picture):
    with background(Settings(bundle=bundle, threads=1, token=TOKEN)) as u:
        browser.get(u)
        wait(browser, lambda: browser.find_element(By.ID, "ask").is_displayed())
        browser.find_element(By.ID, "token").send_keys("wrong")
        browser.find_element(By.CSS_SELECTOR, "#ask button").click()
        wait(browser, lambda: "token" in text(browser, "#trouble"))
        shot(browser, "page-token.png")
        browser.find_element(By.ID, "token").clear()
        browser.find_element(By.ID, "token").send_keys(TOKEN)
        browser.find_element(By.CSS_SELECTOR, "#ask button").click()
        wait(browser, lambda: not browser.find_element(By.ID, "ask").is_displayed())
        browser.find_element(By.ID, "file").send_keys(str(picture))
        wait(browser, lambda: browser.find_element(By.ID, "result").is_displayed())
        assert text(browser, "#verdict") == "Defective" and TOKEN not in browser.current_url


def test_the_policy_stops_what_should_not_run(bundle, browser):
    "A script, a style and a picture from elsewhere, put into the page as somebody would who had found a hole."
    with background(Settings(bundle=bundle, threads=1)) as u:
        browser.get(u)
        browser.get_log("browser")
        browser.execute_script("""const s = document.createElement('script'); s.textContent = "document.title = 'run'"; document.body.append(s);
            const i = document.createElement('div'); i.innerHTML = "<img src=x onerror=\\"document.title='run'\\"><b style='color:red'>x</b>"; document.body.append(i);
            const e = document.createElement('img'); e.src = 'http://192.0.2.1/x.png'; document.body.append(e)""")
        wait(browser, lambda: len(complaints_kept(browser))>=3)
        assert browser.title == "defect_detect"


KEPT = []
def complaints_kept(b):
    KEPT.extend(c for c in complaints(b) if "Content Security Policy" in c)
    return KEPT


def test_the_policy_is_needed(bundle, browser, monkeypatch):
    "Without it the same script runs."
    from defect_detect.serve import page
    monkeypatch.setitem(page.SAFE, "Content-Security-Policy", "default-src * 'unsafe-inline'")
    with background(Settings(bundle=bundle, threads=1)) as u:
        browser.get(u)
        browser.execute_script("""const s = document.createElement('script'); s.textContent = "document.title = 'run'"; document.body.append(s)""")
        assert browser.title == "run"
