# SPDX-License-Identifier: Apache-2.0

"""The playground, in a real browser: a slider changes the answer, and nothing goes wrong out of sight."""

import os
import re
import shutil
import signal
import time
import urllib.request

import pytest
from processes import PATIENCE, end_of, in_child
from scripts import make_chat_model

from trl_tfpo.cli import main
from trl_tfpo.cli.demo import DemoArguments, choose_models
from trl_tfpo.server.playground import Frontiers, _as_html, launch, train_world_doctors, world_playground
from trl_tfpo.testbed import load_world


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOT = os.environ.get("TRL_TFPO_SCREENSHOT")  # `make screenshot` keeps it for the documentation
MAX_STEPS = 200 if SCREENSHOT else 5


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("doctors")


@pytest.fixture(scope="module")
def url(cache_dir):
    with pytest.MonkeyPatch.context() as patch:
        if not SCREENSHOT:
            patch.setattr("trl_tfpo.server.playground.NUM_FRONTIER_SAMPLES", 20)
        page = world_playground(cache_dir, max_steps=MAX_STEPS)
        yield launch(page)
        page.close()


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_dot_is_where_the_setting_is(monkeypatch):
    """Without weights the dot is the patient: no distance, and the reward at which the frontier begins."""
    monkeypatch.setattr("trl_tfpo.server.playground.NUM_FRONTIER_SAMPLES", 20)
    world = load_world()
    frontiers = Frontiers(world, {"praise": world.doctor})
    kl, rewards = frontiers.measure((0.0,))
    assert kl == 0 and abs(rewards["praise"]) < 1
    assert frontiers.measure((0.5,))[0] > 0
    assert frontiers.plot((0.0,)).startswith("<svg")


@pytest.fixture
def page(url):
    """The page in a browser, which must meet no error in the console, in a script or in a request."""
    from playwright.sync_api import sync_playwright

    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: None if "127.0.0.1" in request.url else errors.append(request.url))
        page.goto(url)
        yield page
        browser.close()
    assert not errors


def whole_answer(page, name: str) -> str:
    """The text of an answer, once it has stopped growing."""
    paragraph = page.locator(f"#{name} p").first
    page.wait_for_function("name => document.querySelector(`#${name} p`)?.innerText", arg=name)
    before, now = None, paragraph.inner_text()
    while before != now:
        page.wait_for_timeout(1000)
        before, now = now, paragraph.inner_text()
    return now


def move_slider(page, label: str, value: str) -> None:
    """Move a slider as a user does: change its value, then let go."""
    slider = page.get_by_label(f"range slider for {label}")
    assert float(slider.input_value()) != float(value)
    slider.evaluate("(slider, value) => { slider.value = value; }", value)
    slider.dispatch_event("input")
    slider.dispatch_event("pointerup")


def wait_until_changed(page, selector: str, before: str) -> None:
    """Wait until the markup of an element is another."""
    page.wait_for_function(
        "([selector, before]) => ![undefined, before].includes(document.querySelector(selector)?.innerHTML)",
        arg=[selector, before],
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(page, tmp_path):
    """Both answers stream in. A slider changes the guided answer and the picture, and leaves the unguided answer."""
    unguided, guided = whole_answer(page, "unguided"), whole_answer(page, "guided")
    assert unguided.rstrip().endswith(".")
    guided_markup = page.locator("#guided p").first.inner_html()
    picture = page.locator("#frontier svg").inner_html()

    move_slider(page, "praise", "0.3" if SCREENSHOT else "1")  # where the frontier is known, or the greatest weight
    wait_until_changed(page, "#guided p", guided_markup)
    assert whole_answer(page, "guided") != guided
    assert whole_answer(page, "unguided") == unguided
    assert page.locator("#guided span[title]").count() > 5  # each token with its change in nats
    wait_until_changed(page, "#frontier svg", picture)

    screenshot = SCREENSHOT or tmp_path / "playground.png"
    page.screenshot(path=screenshot)
    assert os.path.getsize(screenshot) > 20_000


def demo(command):
    """The command in a forked process, which hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(command)


def what_demo_says(tmp_path, *options):
    """What the command prints until its page is open. Then the page is read, and the command interrupted."""
    said, deadline = tmp_path / "said.txt", time.monotonic() + PATIENCE
    said.write_text("")
    child = in_child(demo, ["demo", *options], said=said)
    try:
        while not (address := re.search(r"^Open (http\S+)", said.read_text(), flags=re.MULTILINE)):
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        with urllib.request.urlopen(address[1]) as page:
            assert b"trl-tfpo" in page.read()
    finally:
        os.kill(child, signal.SIGINT)
        status = end_of(child)
    assert os.waitstatus_to_exitcode(status) in (0, 130) and "Traceback" not in said.read_text(), said.read_text()
    return said.read_text()


@pytest.mark.slow
def test_demo_without_a_real_model(cache_dir, url, tmp_path, monkeypatch):
    """The one command that everybody tries has to open a page, to say how to get a better one, and to end."""
    monkeypatch.setenv("TRL_TFPO_CACHE", str(tmp_path))
    said = what_demo_says(tmp_path, "--cache_dir", str(cache_dir), "--max_steps", str(MAX_STEPS))
    assert f"controlled world, because no model with a doctor is in {tmp_path}. To align" in said


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with a patient and a doctor, beside doctors without a patient and a patient without doctors."""
    monkeypatch.setenv("TRL_TFPO_CACHE", str(tmp_path / "cache"))
    patient = make_chat_model(tmp_path / "cache" / "small", "good bad is the")
    for folder in ("absent/kind", "small/kind", "small/unfinished", "world/praise-200"):
        (tmp_path / "cache" / "doctors" / folder).mkdir(parents=True)
    for name in ("absent", "small"):
        shutil.copytree(patient, tmp_path / "cache" / "doctors" / name / "kind", dirs_exist_ok=True)
    shutil.copytree(patient, tmp_path / "cache" / "alone")
    return tmp_path / "cache"


@pytest.mark.slow
def test_demo_with_a_real_model(cache, tmp_path):
    """Whoever has aligned a real model wants to see it, not a toy. Doctors that are not finished are left out."""
    said = what_demo_says(tmp_path)
    assert f"The patient is {cache / 'small'}. Doctors: kind. With --world, " in said


def test_where_demo_finds_models(cache, capsys):
    """The controlled world remains within reach, and models by name come first."""
    args = DemoArguments(world=True)
    choose_models(args)
    assert args.patient is None and f"Without --world, the page shows {cache / 'small'}." in capsys.readouterr().out
    args = DemoArguments(patient="mine", doctor=["kind"])
    choose_models(args)
    assert (args.patient, args.doctor) == ("mine", ["kind"]) and not capsys.readouterr().out
    assert args.cache_dir == str(cache / "doctors" / "world")
    shutil.rmtree(cache / "doctors" / "small")
    choose_models(args := DemoArguments())
    assert args.patient is None and f"no model with a doctor is in {cache}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--doctor", "a=b"], "together"),
        (["--patient", "x"], "together"),
        (["--world", "--patient", "x", "--doctor", "y"], "leave one of them out"),
        (["--hots", "1"], "'--host'"),
    ],
)
def test_demo_answers_mistakes_in_one_line(arguments, message, capsys):
    """A page that does not open must say why."""
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
