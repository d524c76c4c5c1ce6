"""The page in a real browser, on a real stack with the fake trainer: no console message, no rule of CSP broken."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from api.ui import curves, page_files, wing
from shared.products import aliases
from shared.store.db import session_scope
from shared.tenants import keys
from standalone.page_parts import NotFetched, NpmFile, fetch
from tests import page_products
from tests.factories import make_file, make_key
from tests.lifecycle.stack import Stack, until
from tests.live import live_api
from tests.page_stand import CHROMIUM, chromium
from tests.patience import paced, patience

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium of the distribution is installed"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="the extra `browser` is not installed"),
    pytest.mark.skipif(bool(page_files.MISSING), reason="npm did not bring the page's parts"),
]
AXE = NpmFile(
    "axe-core@4.14.1",
    "package/axe.min.js",
    "axe.js",
    "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(running: Stack) -> Iterator[str]:
    with live_api(running.settings) as url:
        yield url


@pytest.fixture
def page(browser: Any, address: str, running: Stack) -> Iterator[Any]:
    """A tab that is signed in; what its console says, and what fails in it, fails the test."""
    with session_scope(running.engine) as session:
        _, key = keys.create(session, project_id=running.caller.project_id, name="eve", scopes=("*", "admin"))
    context = browser.new_context(base_url=address)
    context.set_default_timeout(1000 * patience(20))
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(f"error: {error}"))
    tab.goto("/ui/jobs")
    tab.fill("[name=key]", key)
    tab.click("text=Sign in >> nth=-1")
    tab.wait_for_url("**/ui/jobs")
    yield tab
    context.close()
    assert said == []


def rows(behaviour: str) -> bytes:
    lines = [f'{{"text": "fake: {paced(behaviour)}"}}', *(f'{{"text": "row {number}"}}' for number in range(12))]
    return "\n".join(lines).encode()


def bring_and_submit(page: Any, behaviour: str, suffix: str) -> str:
    """By hand, from a file to a job; its id."""
    page.goto("/ui/files")
    page.set_input_files("[name=file]", {"name": f"{suffix}.jsonl", "mimeType": "", "buffer": rows(behaviour)})
    page.click("text=Upload")
    page.click("text=Train on it")
    page.select_option("[name=model]", "tiny")
    page.fill("[name=suffix]", suffix)
    page.click("button[value=submit]")
    page.wait_for_url("**/ui/jobs/ftjob-*")
    return str(page.url.rsplit("/", 1)[1].partition("?")[0])


def test_a_job_is_submitted_and_watched_live_to_its_end_without_a_reload(page: Any, running: Stack) -> None:
    job_id = bring_and_submit(page, "steps=12 step_seconds=0.1 save=5", "watched")
    page.evaluate("window.neverReloaded = true")

    page.wait_for_selector("#head .badge.succeeded", timeout=1000 * patience(60))
    page.wait_for_selector(".chart[data-chart=loss] canvas")

    page.locator("#came-of-it").get_by_text(str(running.job(job_id).fine_tuned_model), exact=True).wait_for()
    page.locator("#head").get_by_text("Try it").wait_for()
    assert page.evaluate("window.neverReloaded") is True
    assert running.job(job_id).status == "succeeded"
    assert page.locator("#head .headline").inner_text() == "Trained and published"
    legend = page.locator(".chart[data-chart=loss] .u-legend").inner_text()
    assert "training" in legend
    assert "Training 1 of 10 parameters" in page.locator("#events").inner_text()
    assert not re.search(r"\d UTC", page.locator("#head").inner_text())  # the viewer's zone
    page.reload()
    page.wait_for_selector("[data-drawn=yes]", state="attached")
    assert page.locator(".chart[data-chart=loss] canvas").count() == 1


def test_a_file_that_is_dropped_on_a_new_job_is_chosen_and_trained_on(
    page: Any, running: Stack, tmp_path: Path
) -> None:
    """A real drop, as the system tells the browser of it."""
    file = tmp_path / "dropped.jsonl"
    file.write_bytes(rows("steps=6 step_seconds=0.01"))
    page.goto("/ui/new")
    box = page.locator("input[type=file]").bounding_box()
    line = page.context.new_cdp_session(page)
    carried = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", "drop"):
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        line.send("Input.dispatchDragEvent", {"type": step, **place, "data": carried})
    page.click("text=Upload")
    page.wait_for_url("**/ui/new?*")
    assert "dropped.jsonl" in page.locator("[name=training_file] option:checked").inner_text()
    page.select_option("[name=model]", "tiny")
    page.click("button[value=submit]")
    page.wait_for_url("**/ui/jobs/ftjob-*")

    page.wait_for_selector("#head .badge.succeeded", timeout=1000 * patience(60))


def test_a_fault_of_the_form_has_the_focus_and_its_words_beside_it(browser: Any, address: str, running: Stack) -> None:
    """In a tab of its own: each 400 is a line of the console."""
    with session_scope(running.engine) as session:
        file = make_file(session, running.caller).id
        _, key = keys.create(session, project_id=running.caller.project_id, name="hasty")
    context = browser.new_context(base_url=address)
    context.set_default_timeout(1000 * patience(20))
    page = context.new_page()
    page.goto(f"/ui/new?file={file}")
    page.fill("[name=key]", key)
    page.click("text=Sign in >> nth=-1")
    page.fill("[name=n_epochs]", "2")
    page.fill("[name=max_steps]", "9")
    page.click("text=Check first")

    page.wait_for_selector("#fault")
    assert page.evaluate("document.activeElement.name") == "max_steps"
    assert "drop one of them" in page.locator("div:has(> label > [name=max_steps]) > #fault").inner_text()
    page.fill("[name=max_steps]", "")
    page.click("text=Check first")
    page.wait_for_url("**/ui/preflights/*")
    context.close()


def test_what_the_trainer_prints_appears_on_the_page_by_itself_and_stays_text(page: Any, running: Stack) -> None:
    bring_and_submit(page, "steps=4000 step_seconds=0.05 print=<img_src=x_onerror=alert(1)>loaded", "printing")
    page.evaluate("window.neverReloaded = true")

    page.wait_for_selector("#log pre", timeout=1000 * patience(60))

    assert page.evaluate("window.neverReloaded") is True
    assert page.locator("#log pre").inner_text() == "<img src=x onerror=alert(1)>loaded\n"
    assert page.locator("#log img").count() == 0
    page.click("#head >> text=Cancel")
    page.click('dialog button:text-is("Yes")')
    page.wait_for_selector("#head .badge.cancelled", timeout=1000 * patience(60))


def test_a_running_job_is_cancelled_after_a_question(page: Any, running: Stack) -> None:
    job_id = bring_and_submit(page, "steps=4000 step_seconds=0.05", "stopped")
    page.wait_for_selector("#head .badge.running", timeout=1000 * patience(60))

    page.click("#head >> text=Cancel")
    page.click('dialog button:text-is("No")')
    assert running.job(job_id).cancel_requested_at is None
    page.click("#head >> text=Cancel")
    page.click('dialog button:text-is("Yes")')

    page.wait_for_selector("#head .badge.cancelled", timeout=1000 * patience(60))
    assert running.job(job_id).status == "cancelled"


PAGES = ("", "/jobs", "/new", "/pool", "/files", "/models", "/playground", "/usage", "/projects", "/keys", "/rules",
         "/audit", "/account", "/preflights", "/aliases", "/evaluations", "/webhooks", "/schedules",
         "/sweeps")  # fmt: skip


def test_two_runs_are_compared_and_every_page_is_quiet(page: Any, running: Stack) -> None:
    made = [running.submit("steps=6 step_seconds=0.01"), running.submit("steps=6 step_seconds=0.01")]
    for job_id in made:
        running.wait(job_id, "succeeded", seconds=60)
    page.goto("/ui/jobs")
    for job_id in made:
        page.check(f"[value={job_id}]")
    page.click("text=Compare the ticked")
    page.wait_for_selector("[data-drawn=yes]", state="attached")
    assert page.locator(".chart[data-chart=loss] .u-legend .u-series").count() == 3

    for path in (*PAGES, f"/jobs/{made[0]}"):
        page.goto(f"/ui{path}")
        assert page.title().endswith("Tunepool")


def products_of(stack: Stack, job_id: str) -> tuple[str, ...]:
    """Pages of what a project has, with something on them and a hostile name."""
    words = "<b>it's here & there</b>"
    job = stack.job(job_id)
    with session_scope(stack.engine) as session:
        key, _ = keys.create(session, project_id=stack.caller.project_id, name="maker")
        caller = dataclasses.replace(stack.caller, key_id=key.id)
        evaluation = page_products.make_evaluation(session, caller, words)
        alias = page_products.make_alias(session, caller, words, job_id=job_id)
        webhook = page_products.make_webhook(session, caller, words)
        page_products.make_merge(session, caller, words, adapter=str(job.fine_tuned_model))
        page_products.make_export(session, caller, words, adapter=str(job.fine_tuned_model))
        schedule = page_products.make_schedule(session, caller, words, job_id=job_id)
        sweep = page_products.make_sweep(session, caller, words, job_id=job_id, status="paused")
        preflight = page_products.make_preflight(session, caller, words, file_id=job.training_file)
    return (
        f"/evaluations/{evaluation}",
        *(f"/aliases/{alias}", f"/aliases/{alias}?first=1&second=2"),
        f"/webhooks/{webhook}",
        f"/schedules/{schedule}",
        f"/sweeps/{sweep}",
        *(f"/preflights/{preflight}", f"/preflights/{preflight}/change"),
        *(f"/files/{job.training_file}", f"/models/{job.fine_tuned_model}", "/models/base/tiny"),
        *(f"/projects/{stack.caller.project_id}", f"/jobs/{job_id}/events"),
    )


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program of axe-core."""
    place = tmp_path_factory.mktemp("axe")
    try:
        fetch(place, [AXE])
    except NotFetched as error:
        pytest.skip(f"nobody looks at accessibility: {error}")
    return (place / AXE.name).read_text(encoding="utf-8")


def addresses(stack: Stack, job_id: str) -> tuple[str, ...]:
    return (*PAGES, *products_of(stack, job_id), f"/jobs/{job_id}", f"/compare?job={job_id}")


# Not pages: figures, files and streams.
OTHER = re.compile(r"/ui/(live/.*|files-of-the-page/.*|.*/curves|.*/content|.*\.(csv|txt)|sign-in)")


def test_every_page_is_accessible_and_fits_a_narrow_screen(page: Any, axe: str, running: Stack) -> None:
    job_id = running.submit("steps=6 step_seconds=0.01")
    running.wait(job_id, "succeeded", seconds=60)
    page.set_viewport_size({"width": 360, "height": 740})
    paths = addresses(running, job_id)
    routes = [route.path for part in wing.PARTS for route in part.router.routes if "GET" in route.methods]
    seen = [f"/ui{path.partition('?')[0]}" for path in paths]
    patterns = {route: re.sub(r"{\w+(:path)?}", "[^/]+", route) for route in routes if not OTHER.fullmatch(route)}
    assert {route for route, form in patterns.items() if not any(re.fullmatch(form, path) for path in seen)} == set()

    found = {}
    for path in paths:
        page.goto(f"/ui{path}")
        found[path] = blemishes(page, axe)
    assert {path: named for path, named in found.items() if named} == {}


def blemishes(page: Any, axe: str) -> list[tuple[str, str]]:
    """What axe finds on the page, in light and in dark, and whether it is wider than a narrow screen."""
    page.emulate_media(color_scheme="light")
    page.evaluate(axe)  # by the debugger's line, which the policy of pages does not concern
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    page.emulate_media(color_scheme="dark")  # it changes colours, and nothing else
    found += page.evaluate("axe.run(document, {runOnly: ['color-contrast'], resultTypes: ['violations']})")[
        "violations"
    ]
    page.emulate_media(color_scheme="light")
    width = page.evaluate("document.scrollingElement.scrollWidth")
    wide = [("wider than the screen", str(width))] if width > page.viewport_size["width"] else []
    return wide + [(broken["id"], node["html"][:200]) for broken in found for node in broken["nodes"][:2]]


def test_pages_of_an_empty_project_errors_and_the_sign_in_are_accessible_and_fit(
    browser: Any, address: str, axe: str, running: Stack
) -> None:
    with session_scope(running.engine) as session:
        _, key = make_key(session, name="Newcomers", scopes=("*", "admin"))
    context = browser.new_context(base_url=address, viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto("/ui")
    assert blemishes(page, axe) == []
    page.fill("[name=key]", "tp_nobody")
    page.click("text=Sign in >> nth=-1")
    page.wait_for_selector("[role=alert]")
    assert blemishes(page, axe) == []
    page.fill("[name=key]", key)
    page.click("text=Sign in >> nth=-1")
    page.wait_for_url("**/ui/jobs")
    assert "No job yet" in page.locator("main").inner_text()

    found = {}
    for path in (*PAGES, "/jobs/ftjob-nowhere", "/compare", "/nowhere"):
        page.goto(f"/ui{path}")
        found[path] = blemishes(page, axe)
    context.close()
    assert {path: named for path, named in found.items() if named} == {}


def test_the_page_is_used_by_keyboard_alone(page: Any, running: Stack) -> None:
    job_id = bring_and_submit(page, "steps=4000 step_seconds=0.05", "by-hand")
    page.wait_for_selector("#head .badge.running", timeout=1000 * patience(60))
    page.goto(f"/ui/jobs/{job_id}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    cancel = page.locator("#head button", has_text="Cancel")
    for _ in range(40):
        page.keyboard.press("Tab")
        if cancel.evaluate("button => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    assert running.job(job_id).cancel_requested_at is None
    cancel.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Enter")  # the first button has the focus: Yes
    page.wait_for_selector("#head .badge.cancelled", timeout=1000 * patience(60))


def test_what_a_curve_is_called_stays_text(page: Any, running: Stack) -> None:
    """Names of runs cannot be hostile today; were they, the legend must show them as they are."""
    evil = "<img src=x onerror=alert(1)>"
    job_id = running.submit("steps=6 step_seconds=0.01")
    running.wait(job_id, "succeeded", seconds=60)

    def renamed(route: Any) -> None:
        told = route.fetch().json()
        for chart in told["charts"]:
            for series in chart["series"]:
                series["label"] = evil
        route.fulfill(json=told)

    page.route("**/curves?*", renamed)
    page.goto(f"/ui/jobs/{job_id}")
    page.wait_for_selector("[data-drawn=yes]", state="attached")

    assert evil in page.locator(".chart[data-chart=loss] .u-legend").inner_text()
    assert page.locator(".u-legend img").count() == 0
    assert page.locator(".chart canvas").count() == len(curves.CHARTS) - 1  # this trainer tells no gradient norm


def tuned(stack: Stack) -> str:
    job_id = stack.submit("steps=6 step_seconds=0.01")
    stack.wait(job_id, "succeeded", seconds=60)
    return str(stack.job(job_id).fine_tuned_model)


def test_a_model_is_promoted_and_rolled_back(page: Any, running: Stack) -> None:
    first, second = tuned(running), tuned(running)
    page.goto("/ui/aliases")
    for name, value in (("alias", "shop@prod"), ("model", first), ("reason", "the first")):
        page.fill(f"[name={name}]", value)
    page.check("[name=force]")
    page.click("text=Make it")
    page.wait_for_url("**/ui/aliases/shop%40prod")

    page.fill("[name=model]", second)
    page.fill("[name=reason]", "better")
    page.check("[name=force]")
    page.click('button:text-is("Promote")')
    page.wait_for_selector(f".facts >> text={second}")
    page.click("text=Roll back to it")
    page.click('dialog button:text-is("Yes")')

    page.wait_for_selector(f".facts >> text={first}")
    assert "rolled back to version 1" in page.locator("main").inner_text()
    with session_scope(running.engine) as session:
        alias = aliases.find(session, "shop@prod", project_id=running.caller.project_id)
        versions = [row.model for row in aliases.history(session, alias)]
    assert versions == [first, second, first]


def test_base_and_tuned_model_answer_side_by_side(page: Any, address: str, running: Stack) -> None:
    name = tuned(running)
    with session_scope(running.engine) as session:
        _, key = keys.create(session, project_id=running.caller.project_id, name="waits")
    place = {"TUNEPOOL_HOME": str(running.home / "talking"), "TUNEPOOL_MODELS_FILE": str(running.home / "models.toml")}
    talking = running.start(
        ["-m", "worker.chores.playground_queue"],
        name="playground",
        TUNEPOOL_PLAYGROUND="tests.fake_playground",
        **place,
    )
    try:
        until(lambda: _talks(address, key, name), seconds=60, what="a playground that answers")
        page.goto(f"/ui/playground?model={name}")
        assert [page.locator("[name=model]").nth(place).input_value() for place in (0, 1)] == ["tiny", name]
        page.locator("[name=scale]").nth(1).fill("0.5")
        page.fill("[name=question]", "one <b>two</b>")
        page.click('button:text-is("Ask")')
        for number in (0, 1):
            page.locator(".remark").nth(number).filter(has_text=re.compile(r"pieces in")).wait_for()
    finally:
        talking.terminate()
        talking.wait(patience(20))

    answers = page.locator(".answer")
    assert answers.nth(0).inner_text().split() == ["base:one", "base:<b>two</b>"]
    voices = {word.partition(":")[0] for word in answers.nth(1).inner_text().split()}
    assert len(voices) == 1
    assert voices != {"base"}
    assert page.locator(".answer b").count() == 0


def _talks(address: str, key: str, model: str) -> bool:
    """Asked past the page: whose console would tell of each 503 until the playground is there."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx2.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=patience(20))
    return answer.status_code == 200
