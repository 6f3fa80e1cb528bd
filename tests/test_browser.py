"""The viewer of notebook 05 in a real browser: JupyterLab serves it, Chromium opens it, and somebody uses it."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import expect, sync_playwright

from effad_lib.runs import PROJECT, write_text
from effad_lib.viewer import of_run
from effad_lib.viewer.state import counts

PATIENCE = 180
"""Seconds to wait for anything: a slow machine is no defect of the viewer."""

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

LAB_SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # else a question is asked
    "notebook-extension/tracker": {"windowingMode": "none"},  # else cells out of sight are not in the page
}

READ = """images => Promise.all(images.map(async image =>
    new TextDecoder("latin1").decode(await (await fetch(image.src)).arrayBuffer())))"""

PANELS = ("image", "overlay", "heatmap", "truth")  # in the order of the page

expect.set_options(timeout=PATIENCE * 1000)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


def until(true):
    """Wait until a function of the page answers with something true, and return it."""
    end = time.monotonic() + PATIENCE
    while not (answer := true()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return answer


class Seen:
    """The viewer as one sees it in the page, and what went wrong there so far."""

    def __init__(self, page):
        self.page, self.wrong = page, []
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.wrong.append(f"in the page: {error}"))
        page.on("websocket", lambda socket: socket.on("framereceived", self._received))  # observers fail only here
        self.whole = page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-tab"))
        self.heading = self.whole.locator(".widget-html", has=page.locator("b")).first
        self.counts = self.whole.locator(".widget-html", has_text="false alarms")
        self.histogram = self.whole.locator(".widget-html", has_text="good (")
        self.list = self.whole.locator(".widget-select select")

    def _received(self, frame):
        if b"Traceback (most recent call last)" in (frame if isinstance(frame, bytes) else frame.encode()):
            self.wrong.append(f"in the kernel: {frame}")

    def tab(self, name):
        """Bring a tab to the front."""
        self.whole.get_by_role("tab", name=name).click()

    def slide(self, name, *keys):
        """Press keys on the handle of a slider."""
        for key in keys:
            self.whole.locator(".widget-slider", has_text=name).locator(".noUi-handle").press(key)

    def stored(self):
        """Click the button of the stored threshold and wait for it."""
        self.tab("decide")
        self.whole.get_by_role("button", name="stored threshold").click()
        expect(self.counts).to_contain_text("stored threshold:")

    def shows_stored(self, found):
        """Wait until the stored threshold is shown with its counts."""
        expect(self.histogram).to_contain_text(f"threshold {found.threshold:.4g}")
        expect(self.counts).to_contain_text(f"stored threshold: false alarms {counts(found, found.threshold)[0, 1]} of")

    def go(self, place):
        """Choose a line of the list and wait for its heading."""
        self.list.select_option(index=place)
        expect(self.heading).to_contain_text(self.name(place))

    def lines(self):
        """The lines of the list."""
        return self.list.locator("option").all_text_contents()

    def name(self, place):
        """How the heading begins for a line of the list, `0.123  dent/7.png`."""
        defect, name = self.lines()[place].split()[-1].split("/")
        return f"{name} · {defect}"

    def pictures(self):
        """The bytes of the four panels, as text."""
        return dict(zip(PANELS, self.whole.locator(".widget-image").evaluate_all(READ), strict=False))


@pytest.fixture(scope="module")
def run(evaluated_run, tmp_path_factory):
    """A copy of an evaluated run without notes: of a small one, or of the one that EFFAD_RUN names."""
    source, folder = Path(os.environ.get("EFFAD_RUN") or evaluated_run), tmp_path_factory.mktemp("browser") / "run"
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns("notes.csv", "checkpoints", "tensorboard"))


@pytest.fixture(scope="module")
def notebook(run):
    """The address of notebook 05 up to its section 7, with the run's folder, in a JupyterLab of our own."""
    content = json.loads((PROJECT / "notebooks" / "05_viewer.ipynb").read_text(encoding="utf-8"))
    end = next(k for k, cell in enumerate(content["cells"]) if "".join(cell["source"]).startswith("## 7"))
    content["cells"] = content["cells"][:end]
    (given,) = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    given["source"] = re.sub(r'(?m)^run_folder = "[^"]*"', f"run_folder = {str(run)!r}", "".join(given["source"]))
    assert str(run) in given["source"]
    root = run.parent / "lab"
    write_text(root / "served" / "viewer.ipynb", json.dumps(content))
    for name, settings in LAB_SETTINGS.items():
        write_text(root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings", json.dumps(settings))
    names = "JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR".split()
    folders = {name: str(root / name) for name in names} | {"JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    token, started = secrets.token_hex(), root / "JUPYTER_RUNTIME_DIR"  # where it writes which port was free
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--IdentityProvider.token={token}"]
    command.append(f"--ServerApp.root_dir={root / 'served'}")
    made = re.search(r"jupyter lab notebooks (.*)", (PROJECT / "Makefile").read_text(encoding="utf-8"))
    command += shlex.split(made[1])  # what `make lab` starts it with
    with open(root / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=os.environ | folders, stdout=log, stderr=log)
    try:
        until(lambda: server.poll() is not None or list(started.glob("jpserver-*.json")))
        assert server.poll() is None, (root / "log.txt").read_text()
        text = until(next(started.glob("jpserver-*.json")).read_text)
        yield f"{json.loads(text)['url']}doc/tree/viewer.ipynb?token={token}"
    finally:
        server.terminate()  # it stops its kernels
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def seen(notebook):
    """The viewer after somebody has run all cells."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1568, "height": 1900})  # all of the viewer, 1400 pixels wide
        seen = Seen(page)
        page.goto(notebook)
        page.get_by_text("| Idle").wait_for()  # before, the menu does nothing
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        last = page.locator(".jp-CodeCell .jp-InputPrompt").last
        until(lambda: seen.wrong or re.search(r"\[\d+\]", last.inner_text()))
        assert not seen.wrong
        seen.whole.scroll_into_view_if_needed()
        yield seen
        browser.close()


@pytest.fixture(autouse=True)
def nothing_goes_wrong(seen):
    """No traceback, neither in an output nor of an observer, and no error of a widget in the page."""
    yield
    outputs = "\n".join(seen.page.locator(".jp-OutputArea-output").all_text_contents())
    assert not seen.wrong and "Traceback" not in outputs


def test_the_viewer_opens_at_the_stored_threshold(seen, run):
    seen.page.wait_for_timeout(1000)  # a slider that rounds to its own steps would have answered by now
    seen.shows_stored(of_run(run))


def test_a_slider_changes_the_picture_that_depends_on_it(seen):
    seen.go(0)
    seen.tab("look")
    before = seen.pictures()
    seen.slide("opacity", *["ArrowLeft"] * 5)
    until(lambda: seen.pictures()["overlay"] != before["overlay"])
    assert [name for name, picture in seen.pictures().items() if picture != before[name]] == ["overlay"]


def test_the_threshold_changes_the_counts_and_no_picture(seen, run):
    good = int((of_run(run).labels == 0).sum())
    seen.stored()
    before, drawn = seen.pictures(), seen.histogram.text_content()
    seen.slide("image threshold", "ArrowRight")
    expect(seen.counts).to_contain_text("chosen by hand")
    seen.slide("image threshold", "Home")  # below all scores
    expect(seen.counts).to_contain_text(re.compile(rf"chosen by hand: false alarms {good} of {good} .*misses 0 of"))
    assert seen.histogram.text_content() != drawn and seen.pictures() == before


def test_the_stored_threshold_comes_back_exactly_and_stays(seen, run):
    seen.tab("decide")
    seen.slide("image threshold", "End")
    expect(seen.counts).to_contain_text("chosen by hand")
    seen.stored()
    for place in (1, 0):  # the controls are set anew with every image
        seen.go(place)
        seen.page.wait_for_timeout(500)
    seen.shows_stored(of_run(run))


def test_the_arrow_keys_walk_through_the_list(seen):
    seen.go(0)
    before = seen.pictures()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        seen.slide("place", key)
        expect(seen.heading).to_contain_text(seen.name(place))
    until(lambda: seen.pictures()["image"] != before["image"])


def test_the_list_keeps_its_arrow_keys(seen):
    seen.go(0)
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)):
        seen.list.press(key)
        expect(seen.heading).to_contain_text(seen.name(place))


def test_screenshot(seen, tmp_path):
    path = Path(os.environ.get("EFFAD_SCREENSHOT") or tmp_path / "viewer.png").resolve()
    defective = [place for place, line in enumerate(seen.lines()) if "good/" not in line]
    seen.go(defective[len(defective) // 2])
    seen.stored()
    tops = {image.bounding_box()["y"] for image in seen.whole.locator(".widget-image").all()[: len(PANELS)]}
    assert len(tops) == 1, "the panels are not side by side"
    seen.whole.screenshot(path=path)
    assert path.stat().st_size < 1_000_000


def test_a_note_is_in_the_file_beside_the_run(seen, run):
    seen.go(1)
    seen.tab("note and save")
    seen.whole.get_by_role("button", name="unclear", exact=True).click()
    text = "a shadow, or a dent?"
    seen.whole.locator("textarea").press_sequentially(text)
    until(lambda: (run / "notes.csv").is_file() and text in (run / "notes.csv").read_text(encoding="utf-8"))
    ((name, *written, _),) = pd.read_csv(run / "notes.csv").to_numpy()
    assert f"{Path(name).name} · {Path(name).parent.name}" == seen.name(1) and written == ["unclear", text]
    expect(seen.whole.locator("textarea")).to_have_value(text)


def test_a_picture_is_uploaded_and_scored(seen, picture, tmp_path):
    seen.tab("note and save")
    with seen.page.expect_file_chooser() as chooser:
        seen.whole.get_by_role("button", name="look at a picture").click()
    large = picture(tmp_path / "my own.png", size=(2100, 2100))
    assert large.stat().st_size > 11 * 2**20  # more than a server of Jupyter takes at once by itself
    chooser.value.set_files(large)
    expect(seen.heading).to_contain_text(re.compile(r"my own\.png · .*score -?\d"))
    assert any("my" in line and "own.png" in line for line in seen.lines())
