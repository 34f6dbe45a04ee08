"""The page in a real browser: sorting, search, no network access, and no script from a run."""

import json
import shutil
from contextlib import contextmanager

import pytest

from lceval.analysis.report import site
from lceval.analysis.report.page import write

CHROMIUM = shutil.which("chromium")
# By the step between right answers.
RECIPES = {3: "knorm:0.5", 4: "knorm:0.25", 6: "snapkv:0.25:window=8"}
EVIL = "</script><script>window.evil=1</script><img src=x onerror='window.evil=1'>"


def run_folder(folder, recipe, answer, n=60, step=2):
    folder.mkdir()
    model_args = {"pretrained": "org/m", "kv": recipe}
    config = {"model": "lcft", "model_args": model_args}
    (folder / "results_D.json").write_text(json.dumps({"configs": {"lc_x_2k": {}}, "config": config}))
    lines = [
        {
            "doc_id": i,
            "doc": {"id": f"q{i}", "answers": ["yes"], "question": "Is it?", "cluster": f"c{i % 9}"},
            "filter": "none",
        }
        | {
            "arguments": {"gen_args_0": {"arg_0": "x" * 3000 + "END"}},
            "metrics": ["em"],
            "em": float(i % step == 0),
            "gold_kept": 0.1 * (i % 10),
            "gold_nll": 1.5,
        }
        | {"filtered_resps": [answer], "kv_bytes": 10**6, "kv_bytes_full": 4 * 10**6, "kv": {"status": "ok"}}
        for i in range(n)
    ]
    (folder / "samples_lc_x_2k_D.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@contextmanager
def opened(file, **size):
    """A page of a browser, which had no error and made no request when it is closed."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--disable-component-update", "--disable-sync"]
    requests, errors = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = browser.new_page(viewport={"width": 375, "height": 800} | size)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(file.as_uri())
        yield tab
        assert tab.evaluate("window.evil") is None
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_works_offline_and_runs_no_script_from_a_run(tmp_path):
    runs = [run_folder(tmp_path / "full", "full", "yes"), run_folder(tmp_path / "half", "knorm:0.5", EVIL, step=4)]
    html = tmp_path / "r.html"
    write(runs, html)
    with opened(html) as tab:
        tab.wait_for_selector("body[data-drawn]")
        drawn = tab.evaluate(
            "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).map(p => p.id)"
        )
        assert drawn == ["memory", "retention", "evidence"]
        assert "No task was run at two lengths." in tab.inner_text("#plots")
        assert "50.0 [" in tab.inner_text("#board")  # retention: half of the score of `full`
        tab.click("#board th button >> text=recipe")
        assert "knorm:0.5" in tab.inner_text("#board tr:nth-child(2)")
        tab.check("#every")
        assert "kv_16bit_share" in tab.inner_text("#board")
        before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.click("#theme")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.reload()
        tab.wait_for_selector("body[data-drawn]")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.select_option("#against", "gold_nll")
        assert "mean gold_nll" in tab.inner_text("#evidence")
        tab.select_option("#row", "1")
        for kind, count in (("right", 15), ("wrong", 45), ("lost", 15), ("won", 0)):
            tab.select_option("#correct", kind)
            assert tab.inner_text("#count") == f"{count} samples", kind
        tab.select_option("#correct", "")
        tab.fill("#search", "q59")
        assert tab.inner_text("#count") == "1 samples"
        tab.click("#list button")
        assert EVIL in tab.inner_text("#detail")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [375, 1200])
def test_the_site_leads_from_a_method_to_its_run_and_back(tmp_path, width):
    runs = [run_folder(tmp_path / "full", "full", "yes")]
    runs += [run_folder(tmp_path / f"{n}", f"{recipe}", EVIL, step=n) for n, recipe in RECIPES.items()]
    site.write(runs, tmp_path / "site")
    with opened(tmp_path / "site" / "index.html", width=width) as tab:
        cells = "[...document.querySelectorAll('#pivot tr')].map(r => [...r.children].map(c => c.innerText))"
        lines = tab.evaluate(cells)
        assert [line[0] for line in lines] == ["", "method", "full", "knorm", "snapkv:window=8"]
        assert lines[1][1:] == ["no budget", "0.5", "0.25"]
        assert [cell != "" for cell in lines[3][1:]] == [False, True, True]
        assert [cell != "" for cell in lines[4][1:]] == [False, False, True]
        assert tab.evaluate("[...document.querySelectorAll('#pivot .best')].map(a => a.title)") == ["4, 60 samples"]
        assert tab.evaluate("document.querySelectorAll('#pareto circle').length") == 4
        tab.select_option("#value", "retention")
        assert "50.0\n[" in tab.inner_text("#pivot")
        assert tab.evaluate("document.querySelector('#pareto svg').ariaLabel") == "retention against KV memory"
        assert [line[0] for line in tab.evaluate(cells)][2:] == ["knorm", "snapkv:window=8"]
        tab.click("#pivot th button >> text='0.5'")
        assert tab.inner_text("#pivot th[aria-sort]").startswith("0.5")
        assert [line[0] for line in tab.evaluate(cells)][2:] == ["knorm", "snapkv:window=8"]
        tab.click("#pivot .best")
        tab.wait_for_selector("#detail")
        assert "knorm:0.25" in tab.inner_text("#board")
        tab.select_option("#correct", "lost")
        assert tab.inner_text("#count") == "15 samples"
        tab.click("#list button")
        assert EVIL in tab.inner_text("#detail")
        tab.click("#summary a")
        tab.wait_for_selector("#pivot")
