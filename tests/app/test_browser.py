"""The page in Debian's chromium, driven by Playwright: samples, edits, trains, and errors in one line.

APP_SCREENSHOTS=docs/images writes the documentation's pictures; APP_RUN=runs/digits names the run that they show.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from unet_denoiser.app.training_state import read_training
from unet_denoiser.cli.app import main
from unet_denoiser.training.run import PROCESS_NAME
from unet_denoiser.utils.processes import find_worker

gradio = pytest.importorskip("gradio", reason="needs the extra app: pip install 'unet-denoiser[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

SHOWN_RUN = os.environ.get("APP_RUN")
SCREENSHOTS = Path(name).absolute() if (name := os.environ.get("APP_SCREENSHOTS")) else None
OLD = Path(__file__).parents[1] / "support" / "old"  # a run of two steps
LONG = 120_000  # milliseconds: the machine may be busy
EXACT = "--num-images 40 --seed 3 --num-inference-steps 30 --guidance-scale 2 --sampler ddim --device cpu"


def start_page(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start the command in a folder that has runs/ and data/; return the process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "unet_denoiser", "app", "runs", "--data", "data", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert lines == ["opening the page ...\n", f"the page is at http://127.0.0.1:{port}; Ctrl+C ends it\n"]
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    shutil.copytree(SHOWN_RUN or OLD / "run", folder / "runs" / "digits")
    (folder / "data").mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "noise.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(21 * 2**20)
    shown = np.zeros((8, 8), np.uint8)
    shown[1:7, 3:5] = 255
    Image.fromarray(shown).save(folder / "one.png")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(folder):
    process, address = start_page(folder)
    yield process, address
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def page(browser, server):
    return open_page(browser, server[1])


def open_page(browser, address):
    page = browser.new_page(viewport={"width": 1240, "height": 860})
    page.set_default_timeout(LONG)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector(".ud-about >> text=images of 8 x 8 >> visible=true")
    return page


def fill(page, name, value):
    """Fill the visible input with a label."""
    page.get_by_label(name, exact=True).locator("visible=true").fill(value)


def choose(page, name, option):
    """Choose an option of the visible list with a label."""
    page.get_by_label(name, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option).locator("visible=true").first.click()


def wait_for(page, name, pattern):
    """Wait until the element says something; return what it says."""
    lines = ", ".join(f"#{name} {kind}" for kind in (".ud-note", ".ud-error", ".ud-state", ".md"))
    read = "lines => [...document.querySelectorAll(lines)].map(line => line.innerText.trim()).join('\\n')"
    page.wait_for_function(f"([lines, words]) => new RegExp(words).test(({read})(lines))", arg=[lines, pattern])
    return page.evaluate(read, lines)


def picture_of(page, name):
    """Return the pixels of a picture that the page shows."""
    url = page.locator(f"#{name} img").get_attribute("src")
    return np.asarray(Image.open(BytesIO(page.request.get(url).body())))


def keep(page, name):
    if SCREENSHOTS:
        page.evaluate("window.scrollTo(0, 0)")
        page.mouse.move(0, 0)
        time.sleep(1)
        page.screenshot(path=SCREENSHOTS / f"app-{name}.png")


def test_a_sample_forms_step_by_step_and_is_the_commands(page, folder, monkeypatch):
    page.evaluate("""() => {
        window.said = [];
        const element = document.getElementById("sample-message");
        const listen = {subtree: true, childList: true, characterData: true};
        new MutationObserver(() => window.said.push(element.innerText)).observe(element, listen);
    }""")
    for name, value in (("Seed", "3"), ("Images", "40"), ("Steps", "30"), ("Guidance", "2")):
        fill(page, name, value)
    page.get_by_role("button", name="More").locator("visible=true").click()
    choose(page, "Sampler", "ddim")
    page.click("#sample-start")
    assert wait_for(page, "sample-message", " s, ").startswith("40 images in ")
    assert any(re.fullmatch(r"step \d+ of 30", text.strip()) for text in page.evaluate("window.said"))
    keep(page, "sample")
    monkeypatch.chdir(folder)
    main(["sample", "runs/digits", "--out", "same.png", *EXACT.split()])
    found = picture_of(page, "sample-picture")
    with Image.open("same.png") as expected:
        assert np.array_equal(
            found.reshape(expected.height, expected.width, -1)[..., 0], np.asarray(expected.convert("L"))
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Steps", "0", "steps=0 must be a whole number from 1 to 1000"),
        ("Steps", "1001", "steps=1001 must be a whole number from 1 to 1000"),
        ("Images", "65", "number=65 must be a whole number from 1 to 64"),
        ("Seed", "1.5", "seed=1.5 must be a whole number from 0 to 2147483647"),
    ],
)
def test_a_number_out_of_range_is_one_line(page, name, value, message):
    before = page.get_by_label(name, exact=True).locator("visible=true").input_value()
    fill(page, name, value)
    page.click("#sample-start")
    assert wait_for(page, "sample-message", re.escape(message)) == message
    fill(page, name, before)


def test_a_broken_upload_is_one_line_and_an_image_is_inpainted(page, folder):
    page.get_by_role("tab", name="Edit").click()
    upload = page.get_by_test_id("Upload an image-upload-button")
    upload.set_input_files(folder / "broken.png")
    line = wait_for(page, "edit-message", "broken")
    assert line == "broken.png cannot be read as an image: no image format that is known"
    upload.set_input_files(folder / "large.png")
    page.wait_for_selector("text=exceed the maximum allowed size of 20.0 Mb >> nth=0")
    page.click("#edit-start")
    assert wait_for(page, "edit-message", "no image is") == "no image is uploaded; give one, such as a PNG"
    upload.set_input_files(folder / "one.png")
    wait_for(page, "edit-message", "one.png, as the network sees it")
    choose(page, "Edit", "Inpaint")
    page.wait_for_selector("text=Repeats of each step >> visible=true")
    page.click("#edit-start")
    assert wait_for(page, "edit-message", "mask").startswith("mask: nothing is painted")
    box = page.locator("#edit-canvas canvas").first.bounding_box()
    x, y, w, h = (box[name] for name in ("x", "y", "width", "height"))
    page.mouse.move(x + 0.35 * w, y + 0.65 * h)
    page.mouse.down()
    page.mouse.move(x + 0.65 * w, y + 0.65 * h, steps=8)
    page.mouse.up()
    page.click("#edit-start")
    assert wait_for(page, "edit-message", " s, ").startswith("4 images in ")
    keep(page, "edit")
    found, given = picture_of(page, "edit-picture"), np.asarray(Image.open(folder / "one.png"))
    found = found.reshape(*found.shape[:2], -1)[..., 0]
    first = found[2:34, 2:34].reshape(8, 4, 8, 4)[:, 0, :, 0]
    assert np.array_equal(first[:4], given[:4])  # not painted over, so exactly as given
    assert not np.array_equal(first, given)


def test_reports_have_their_pictures(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    if not SHOWN_RUN:
        main(["doctor", "runs/digits", "--num-images", "4", "--num-samples", "4", "--device", "cpu"])
    page.get_by_role("tab", name="Reports").click()
    wait_for(page, "reports-doctor", "noise level t")
    wait_for(page, "reports-evaluation", "held-out" if SHOWN_RUN else "unet-denoiser evaluate runs/digits")
    pictures = page.locator("#reports-doctor-pictures img")
    assert pictures.count() == 2
    assert all(picture.evaluate("image => image.naturalWidth") > 100 for picture in pictures.all())
    keep(page, "reports")


def test_no_file_of_the_machine_is_served_and_nothing_is_asked_of_others(page, server, folder):
    address = server[1]
    assert {url.split("/")[2] for url in page.asked if not url.startswith(("data:", "blob:"))} == {address[7:]}
    for path in ("file=/etc/passwd", f"file={folder}/runs/digits/config.json", "file=http://example.com/"):
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{address}/gradio_api/{path}")


def test_a_training_outlives_the_page_stops_and_resumes(folder, page, server, browser):
    """The page is killed while it trains; a new one finds the training, stops it, and resumes it to its end."""
    page.get_by_role("tab", name="Training").click()
    page.get_by_role("button", name="New training").click()
    for name, value in (("Name of the run", "../elsewhere"), ("Batch size", "many")):
        kept = page.get_by_label(name, exact=True).input_value()
        fill(page, name, value)
        page.click("#training-start")
        assert "must be" in wait_for(page, "training-message", re.escape(repr(value)))
        fill(page, name, kept or "new")
    choose(page, "Data", "digits")
    for name, value in (("Steps", "5000"), ("Batch size", "4"), ("Previews every (steps, or a time as 10m)", "100")):
        fill(page, name, value)
    page.click("#training-start")
    wait_for(page, "training-message", "runs/new: started")
    run = folder / "runs" / "new"
    while read_training(run).step < (300 if SCREENSHOTS else 10):
        assert read_training(run).runs, (run / "train.log").read_text()
        time.sleep(0.2)
    keep(page, "training")
    server[0].kill()
    server[0].wait()
    second, address = start_page(folder)
    try:
        page = open_page(browser, address)
        page.get_by_role("tab", name="Training").click()
        choose(page, "Run", "runs/new")
        wait_for(page, "training-state", r"training · step \d+ of 5,000 · loss .* left")
        page.click("#training-stop")
        stopped = wait_for(page, "training-state", r"stopped · step [\d,]+ of 5,000")
        step = int(re.search(r"step ([\d,]+)", stopped)[1].replace(",", ""))
        assert step >= 10
        assert list((run / "checkpoints").glob(f"step-{step:08d}.safetensors"))
        fill(page, "Steps in total, to resume", str(step + 2))
        page.click("#training-resume")
        wait_for(page, "training-state", f"finished · step {step + 2:,} of {step + 2:,}")
        assert json.loads((run / "config.json").read_text())["training"]["steps"] == step + 2
        assert page.locator("#training-plot img").count() == 1
        assert page.locator("#training-previews figcaption").first.inner_text() == f"step {step + 2:,}"
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=20) == 0
    finally:
        second.kill()
        if (worker := find_worker(run / PROCESS_NAME)) is not None:
            os.kill(worker.pid, signal.SIGKILL)
