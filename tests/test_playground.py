# SPDX-License-Identifier: Apache-2.0

"""The playground, in a real browser: a slider changes the answer, and nothing goes wrong out of sight."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from conftest import hear_interruptions

from trl_tfpo.cli import main
from trl_tfpo.server.playground import Frontiers, _as_html, launch, train_world_doctors, world_playground
from trl_tfpo.testbed import load_world


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOT = os.environ.get("TRL_TFPO_SCREENSHOT")  # `make screenshot` keeps it for the documentation
MAX_STEPS = 200 if SCREENSHOT else 20


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("doctors")


@pytest.fixture(scope="module")
def url(cache_dir):
    page = world_playground(cache_dir, max_steps=MAX_STEPS)
    yield launch(page)
    page.close()


def test_doctors_are_trained_once(url, cache_dir):
    """A page that trains for a minute at every start is opened once."""
    before = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*.safetensors")}
    assert set(train_world_doctors(cache_dir, max_steps=MAX_STEPS)) == {"praise", "calm"}
    assert before and before == {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*.safetensors")}
    assert sorted(path.name for path in cache_dir.iterdir()) == [f"calm-{MAX_STEPS}", f"praise-{MAX_STEPS}"]


def test_what_the_page_shows_is_escaped():
    """A model that writes markup must not write the page."""
    shown = _as_html([("<img src=x onerror=alert(1)>", 1.0), (" bad", -0.5)])
    assert "title=" not in _as_html([])
    assert "<img" not in shown and "&lt;img" in shown and "⁺" in shown and "-0.50 nats" in shown


def test_the_dot_is_where_the_setting_is(monkeypatch):
    """Without weights the dot is the patient: no distance, and the reward at which the frontier begins."""
    monkeypatch.setattr("trl_tfpo.server.playground.NUM_FRONTIER_SAMPLES", 20)
    world = load_world()
    frontiers = Frontiers(world, {"praise": world.doctor})
    kl, rewards = frontiers.dot((0.0,))
    assert kl == 0 and abs(rewards["praise"]) < 1
    assert frontiers.dot((0.5,))[0] > 0
    assert frontiers.picture((0.0,)).startswith("<svg")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(url, tmp_path):
    """What users see: two answers that stream, sliders that change one of them, and no error in the console."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "requestfailed", lambda request: errors.append(request.url) if "127.0.0.1" not in request.url else None
        )
        page.goto(url)

        def text(name: str) -> str:
            return page.locator(f"#{name} p").first.inner_text()

        def settled(name: str) -> str:
            """The answer once it has stopped to grow."""
            expect(page.locator(f"#{name} p").first).not_to_be_empty(timeout=60_000)
            before, now = None, text(name)
            while before != now:
                page.wait_for_timeout(1500)
                before, now = now, text(name)
            return now

        unguided, guided = settled("unguided"), settled("guided")
        assert unguided.rstrip().endswith(".")
        expect(page.locator("#frontier svg")).to_be_visible(timeout=60_000)
        picture = page.locator("#frontier svg").inner_html()

        def move(label: str, value: str) -> None:
            slider = page.get_by_label(f"range slider for {label}")
            assert float(slider.input_value()) != float(value)
            slider.evaluate(
                "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true}));"
                " slider.dispatchEvent(new Event('pointerup', {bubbles: true})); }",
                value,
            )

        move("praise", "0.3" if SCREENSHOT else "1")  # where the frontier is known; or as much as there is
        page.wait_for_function("before => document.querySelector('#guided p')?.innerText !== before", arg=guided)
        changed = settled("guided")
        assert changed != guided and settled("unguided") == unguided
        assert page.locator("#guided span[title]").count() > 5
        page.wait_for_function(
            "before => document.querySelector('#frontier svg')?.innerHTML !== before", arg=picture, timeout=60_000
        )
        shot = SCREENSHOT or str(tmp_path / "playground.png")
        page.screenshot(path=shot)
        assert os.path.getsize(shot) > 20_000
        browser.close()
    assert not errors


@pytest.mark.slow
def test_demo_as_a_command(cache_dir, url):
    """The one command that everybody tries has to open a page, and to end."""
    command = [sys.executable, "-m", "trl_tfpo", "demo", "--cache_dir", cache_dir, "--max_steps", str(MAX_STEPS)]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interruptions,
    )
    try:
        address = next((line.split()[1] for line in process.stdout if line.startswith("Open http")), None)
        assert address is not None, process.stderr.read()
        with urllib.request.urlopen(address) as page:
            assert b"trl-tfpo" in page.read()
    finally:
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in error, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--doctor", "a=b"], "needs `--patient`"), (["--patient", "x"], "at least one"), (["--hots", "1"], "'--host'")],
)
def test_demo_answers_mistakes_in_one_line(arguments, message, capsys):
    """A page that does not open must say why."""
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
