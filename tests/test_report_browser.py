"""The report in a real headless Chromium, from disk: load, sort, filter, probe, mark, download."""

import json
import shutil
import time

import numpy as np
import pytest
from conftest import CLASSES, make_label

from teacher.jobs.selection import apply_selections
from teacher.label import Task
from teacher.report import PART, inspect, script
from teacher.shard_writer import ShardWriter
from teacher.store import LabelSet

N = 40
HOSTILE = "photos/</script><img src=x onerror=\"document.title='owned'\">.jpg"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser that logs what it does; skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs Debian's chromium and chromium-driver (apt-get install them)")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1600,1000")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_script_timeout(120)
    browser.downloads = downloads
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A label set of 40 scenes with uncertainty, rejects with a hostile name, and its report."""
    folder = tmp_path_factory.mktemp("shown") / "set"
    folder.mkdir()
    about = {"format": "dense-label-set", "version": 1, "plan_hash": "ab" * 32, "shards": 1}
    about |= {"tasks": ["depth", "normals", "semantic"], "teacher": {"name": "truth"}}
    about["classes"] = {str(k): v for k, v in CLASSES.items()}
    (folder / "dataset.json").write_text(json.dumps(about))
    rng = np.random.default_rng(0)
    with ShardWriter(folder, 0, plan_hash="ab" * 32) as writer:
        for i, spread in enumerate(rng.permutation(N)):
            label = make_label(i, height=60, width=80)
            size = label.image.shape[:2]
            label.uncertainty[Task.DEPTH] = np.full(size, 0.01 * (spread + 1), np.float32)
            label.pictures[Task.DEPTH] = label.image
            writer.add(label, uri=HOSTILE if i == 7 else f"photos/{i:03d}.jpg")
        writer.reject("a" * 24, uri=HOSTILE, reason="<b>an HTML page</b>, 1234 bytes")
        writer.reject("b" * 24, uri="photos/cut.jpg", reason="an HTML page, 99 bytes")
        writer.duplicate("c" * 24, uri="photos/copy.jpg", of=label.key)
        writer.commit({})
    inspect(labels=str(folder), side_px=80)
    return folder


def wait(browser, condition, *, seconds=90):
    """Wait until a line of JavaScript is true."""
    end = time.monotonic() + seconds
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.05)


PAINTED = (
    "document.querySelectorAll('#space canvas.plane').length > 0 && "
    "[...document.querySelectorAll('#space canvas.plane')].every((c) => c.probe)"
)


def open_page(browser, folder):
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get((folder / "report" / "index.html").as_uri())
    wait(browser, "document.documentElement.dataset.ready === 'yes'")
    wait(browser, PAINTED)
    return browser


@pytest.fixture(scope="module")
def opened(chromium, shown):
    return open_page(chromium, shown)


@pytest.fixture
def page(opened, shown):
    """The page opened anew: no marks, no filters, worst first, nothing focused."""
    opened.execute_script("localStorage.clear()")
    return open_page(opened, shown)


def keys_shown(page):
    text = "return report.state.view.map((i) => report.state.rows.key[i])"
    return page.execute_script(text)


def press(page, keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(keys).perform()


def point_at(page, selector, x, y, *, shape):
    """Move the pointer to pixel (x, y) of a canvas that shows a picture of ``shape`` (h, w)."""
    from selenium.webdriver.common.action_chains import ActionChains

    canvas = page.find_element("css selector", selector)
    box = canvas.rect
    scale = min(box["width"] / shape[1], box["height"] / shape[0])
    dx, dy = (x + 0.5 - shape[1] / 2) * scale, (y + 0.5 - shape[0] / 2) * scale
    ActionChains(page).move_to_element_with_offset(canvas, round(dx), round(dy)).perform()


def test_it_opens_from_disk_worst_first_without_a_complaint_or_a_connection(opened, shown):
    page = open_page(opened, shown)
    labels = LabelSet(shown)
    rows = sorted(
        (r for r in labels.rows if r["state"] == "labelled"), key=lambda r: -r["depth_uncertainty"]
    )
    assert keys_shown(page) == [r["key"] for r in rows]
    assert [e for e in page.get_log("browser") if e["level"] == "SEVERE"] == []
    urls = [
        m["params"]["request"]["url"]
        for e in page.get_log("performance")
        if (m := json.loads(e["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(u.startswith(("file:", "data:", "about:", "blob:")) for u in urls)
    heads = [h.text for h in page.find_elements("css selector", ".head-plane")]
    assert heads[:4] == ["image", "depth", "depth: raw answer", "depth uncertainty"]


def test_a_hostile_name_is_text(page):
    page.execute_script("document.querySelector('[data-tab=rejected]').click()")
    titles = [t.text for t in page.find_elements("css selector", ".row.other .title")]
    assert titles == [HOSTILE, "photos/cut.jpg"]
    reasons = [t.text for t in page.find_elements("css selector", ".row.other .reason")]
    assert reasons[0] == "<b>an HTML page</b>, 1234 bytes"
    assert "owned" not in page.title
    chips = [c.text for c in page.find_elements("css selector", ".chip")]
    assert "1 × an HTML page, # bytes" in chips
    page.execute_script("document.querySelector('[data-tab=duplicate_of]').click()")
    assert "same content as photos/039.jpg" in page.find_element("css selector", ".reason").text
    page.execute_script("document.querySelector('[data-tab=labelled]').click()")


def test_sort_search_and_filter_by_dragging_a_histogram(page, shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import Select

    labels = LabelSet(shown)
    rows = [r for r in labels.rows if r["state"] == "labelled"]
    Select(page.find_element("id", "sort")).select_by_value("depth_m_p50")
    page.find_element("id", "direction").click()
    by_depth = sorted(rows, key=lambda r: r["depth_m_p50"])
    found = keys_shown(page)
    assert [r["depth_m_p50"] for r in by_depth] == [
        next(r for r in rows if r["key"] == k)["depth_m_p50"] for k in found
    ]
    bars = page.find_element("css selector", "[data-column=depth_uncertainty] canvas")
    width = bars.rect["width"]
    drag = ActionChains(page).move_to_element_with_offset(bars, round(-width / 4), 0)
    drag.click_and_hold().move_by_offset(round(width / 2), 0).release().perform()
    low, high = page.execute_script("return report.state.ranges.depth_uncertainty")
    assert low == pytest.approx(0.01 + 0.39 / 4, abs=0.005)
    assert high == pytest.approx(0.01 + 0.39 * 3 / 4, abs=0.005)
    inside = {r["key"] for r in rows if low <= r["depth_uncertainty"] <= high}
    assert set(keys_shown(page)) == inside and 15 < len(inside) < 25
    assert page.find_element("id", "count").text == f"{len(inside)} of {N} shown"
    page.find_element("id", "clear-all").click()
    press(page, "/")
    press(page, "photos/01")
    assert len(keys_shown(page)) == 10
    press(page, "-none")
    assert "Nothing fits" in page.find_element("id", "empty").text


def test_the_probe_says_metres_and_classes(page, shown):
    labels = LabelSet(shown)
    label = labels[keys_shown(page)[0]]
    depth_m, semantic = label.values[Task.DEPTH], label.values[Task.SEMANTIC]
    for y, x in [(55, 40), (np.argwhere(semantic == 2).mean(0)).astype(int), (3, 20)]:
        point_at(page, ".row[data-place='0'] canvas[data-plane=depth]", x, y, shape=(60, 80))
        lines = {
            d.get_attribute("data-plane"): d.find_element("tag name", "b").text
            for d in page.find_elements("css selector", "#probe div")
        }
        if np.isinf(depth_m[y, x]):
            assert lines["depth"] == "sky"
            assert lines["normals"] == "unknown"
        else:
            value, unit = lines["depth"].split()
            near = depth_m[y - 1 : y + 2, x - 1 : x + 2]  # the pointer stands on whole pixels
            assert unit == "m"
            assert near.min() * 0.998 <= float(value) <= near.max() * 1.002
        assert lines["semantic"] == f"{CLASSES[semantic[y, x]]} ({semantic[y, x]})"
        assert float(lines["depth_uncertainty"]) == pytest.approx(0.4, rel=0.01)


def test_marks_by_keyboard_download_as_a_selection_that_training_takes(page, shown):
    labels = LabelSet(shown)
    order = keys_shown(page)
    press(page, "xxkxz")  # drop, drop, keep, drop, and the last one undone
    wait(page, 'JSON.stringify(report.tally()) === \'{"keep":1,"drop":2}\'')
    press(page, "s")
    page.find_element("id", "download").click()
    end = time.monotonic() + 60
    while not (files := list(page.downloads.glob("*.json"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert files[0].name == "set.selection.json"
    (kept,) = apply_selections([str(files[0])], [labels])
    assert set(labels.keys) - set(kept) == set(order[:2])
    assert json.loads(files[0].read_text())["dropped"][order[0]] == ["marked drop"]
    page.refresh()  # marks stay in the browser
    wait(page, "document.documentElement.dataset.ready === 'yes'")
    assert page.execute_script("return report.tally()") == {"keep": 1, "drop": 2}


def test_a_key_clears_no_mark_that_is_not_in_sight(page):
    press(page, "k")
    page.execute_script("report.list.moveTo(0)")
    page.execute_script("document.querySelector('[data-tab=rejected]').click()")
    press(page, "u")
    assert page.execute_script("return report.tally()") == {"keep": 1, "drop": 0}
    page.execute_script("document.querySelector('[data-tab=labelled]').click()")
    page.execute_script("report.state.search = 'no such name'; report.update()")
    press(page, "u")
    assert "undefined" not in page.execute_script("return Object.keys(report.state.marks)")
    page.execute_script("report.state.search = ''; report.update(); report.list.moveTo(0)")
    press(page, "u")
    assert page.execute_script("return report.tally()") == {"keep": 0, "drop": 0}


def test_the_large_view_walks_and_closes(page):
    order = keys_shown(page)
    press(page, "\ue007")  # Enter
    wait(page, "document.querySelectorAll('#detail canvas').length === 7")
    press(page, "\ue014")  # right
    wait(page, f"document.querySelector('#detail code').textContent === '{order[1]}'")
    press(page, "x")
    wait(page, "report.tally().drop === 1 && report.state.cursor === 2")
    press(page, "\ue00c")  # Escape
    wait(page, "!document.getElementById('detail').open")


def make_large(folder, source, n):
    """The report of ``source`` repeated to ``n`` samples, with the same bytes per sample."""
    shutil.copytree(source, folder)
    data = folder / "data"
    text = (data / "part-00000.js").read_text()
    samples = json.loads(f"[{text[text.index('(') + 1 : -3]}]")[1]
    text = (data / "rows.js").read_text()
    table, others = json.loads(f"[{text[text.index('(') + 1 : -3]}]")
    m = len(table["key"])
    rng = np.random.default_rng(0)
    keys = [f"{table['key'][i % m]}-{i}" for i in range(n)]
    columns = {
        name: [v[i % m] + float(rng.normal(0, 1e-3)) for i in range(n)]
        for name, v in table["columns"].items()
    }
    uris = [f"photos/{i:06d}.jpg" for i in range(n)]
    large = {"key": keys, "uri": uris, "shard": [0] * n, "columns": columns}
    (data / "rows.js").write_bytes(script("rows", large, others))
    for number in range(-(-n // PART)):
        (data / f"part-{number:05d}.js").write_bytes(script("part", number, samples))
    return folder


@pytest.mark.slow
def test_twenty_thousand_samples_keep_a_small_document(chromium, tmp_path):
    """Only what is in view is in the document; the times are printed, for docs/results.md."""
    seen = measure_large(chromium, tmp_path, n=20_000)
    print(json.dumps(seen))
    assert seen["rows_in_document"] < 40
    assert seen["heap_mb"] < 700


def measure_large(chromium, folder, *, n):
    """Times of the page with ``n`` samples of 192 x 144 with seven planes each."""
    labels = folder / "set"
    labels.mkdir()
    about = {"format": "dense-label-set", "version": 1, "plan_hash": "cd" * 32, "shards": 1}
    about |= {"tasks": ["depth", "normals", "semantic"], "teacher": {"name": "truth"}}
    (labels / "dataset.json").write_text(json.dumps(about))
    with ShardWriter(labels, 0, plan_hash="cd" * 32) as writer:
        for i in range(PART):
            label = make_label(i, height=240, width=320)
            noise = np.random.default_rng(i).uniform(0.02, 0.4, (240, 320)).astype(np.float32)
            label.values[Task.DEPTH] *= 1 + noise / 20  # as hard to compress as real labels
            label.uncertainty = {Task.DEPTH: noise, Task.NORMALS: noise * 50}
            label.pictures = {Task.DEPTH: label.image}
            writer.add(label, uri=f"{i}.jpg")
        writer.commit({})
    inspect(labels=str(labels))
    page = make_large(folder / "large" / "report", labels / "report", n)
    before = time.monotonic()
    chromium.get((page / "index.html").as_uri())
    wait(chromium, "document.documentElement.dataset.ready === 'yes'")
    seen = {"ready_s": round(time.monotonic() - before, 2)}
    wait(chromium, PAINTED)
    seen["first_pictures_s"] = round(time.monotonic() - before, 2)
    seen |= chromium.execute_async_script(MEASURE)
    before = time.monotonic()
    chromium.execute_script("document.getElementById('scroll').scrollTop = 1e6")
    time.sleep(0.2)
    wait(chromium, PAINTED)
    seen["jump_pictures_s"] = round(time.monotonic() - before, 2)
    seen["mb_on_disk"] = round(sum(p.stat().st_size for p in page.rglob("*.js")) / 1e6)
    assert [e for e in chromium.get_log("browser") if e["level"] == "SEVERE"] == []
    return seen


MEASURE = """
const done = arguments[0], out = {};
const timed = (name, call) => {
  const t = performance.now(); call(); out[name] = Math.round(performance.now() - t);
};
timed('sort_ms', () => report.sortBy('depth_m_p50'));
timed('filter_ms', () => report.panel.set('depth_m_p50', [0, 6]));
timed('search_ms', () => { report.state.search = '0123'; report.update(); });
report.panel.clearAll();
const box = document.getElementById('scroll'), frames = [];
let last = performance.now(), count = 0;
const step = (now) => {
  frames.push(now - last); last = now; box.scrollTop += 400;
  if (++count < 150) requestAnimationFrame(step);
  else {
    frames.sort((a, b) => a - b);
    out.scroll_frame_median_ms = Math.round(frames[75]);
    out.scroll_frame_p95_ms = Math.round(frames[142]);
    out.rows_in_document = document.querySelectorAll('#space article').length;
    out.heap_mb = Math.round(performance.memory.usedJSHeapSize / 1e6);
    done(out);
  }
};
requestAnimationFrame(step);
"""
