"""The page in a browser: sizes, colours, search, sorting, the keyboard, and safety."""

import pytest
import sample_report
from browser import BINARY, Browser

from r_tsvm_kernels.report import report_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium"),
]

SIZES = {"phone": {"width": 390, "height": 844, "phone": True}, "desktop": {"width": 1280, "height": 900}}
LINES = "document.querySelectorAll('#table tbody tr:not(.gap)').length"
FIRST = "document.querySelector('#table tbody tr:not(.gap) td').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_problems(browser):
    browser.problems.clear()
    yield
    assert browser.problems == []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "merge_report.html"
    file.write_text(report_page(sample_report.of_model(40, experts=4)), encoding="utf-8")
    return file


def search(browser, text):
    browser.run(f"$('search').value = {text!r}; $('search').dispatchEvent(new Event('input'))")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits(browser, page, tmp_path, size, dark):
    browser.open(page, dark=dark, **SIZES[size])
    width = SIZES[size]["width"]
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000  # something was drawn
    ground = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    ink = browser.run("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (sum(ground) < 150 and sum(ink) > 600) if dark else (sum(ground) > 600 and sum(ink) < 150)
    # Wide things scroll inside their own boxes.
    assert browser.run("$('table').scrollWidth > $('table').clientWidth")
    # A map of each quantity and of the parameter with a gradient: 4 kinds by 40 layers, and the head, in many colours.
    assert browser.run("document.querySelectorAll('.map').length") == 11
    assert (
        browser.run("[...document.querySelectorAll('.map svg')].map((s) => s.querySelectorAll('rect').length)")
        == [161] * 11
    )
    colours = "new Set([...document.querySelectorAll('.map rect')].map((r) => getComputedStyle(r).fill)).size"
    assert browser.run(colours) > 20


def test_search_and_sort(browser, page):
    browser.open(page, **SIZES["desktop"])
    assert browser.run("$('count').textContent") == "281 of 281"
    search(browser, "layers.7. q_PROJ")
    assert browser.run(LINES) == 1 and browser.run(FIRST) == "model.layers.7.self_attn.q_proj.weight"
    assert browser.run("$('count').textContent") == "1 of 281"
    search(browser, "no such tensor")
    assert browser.run(LINES) == 0
    search(browser, "")
    errors = "state.found.map((r) => r.error)"
    button = "[...document.querySelectorAll('thead button')].find((b) => b.textContent === 'error').click()"
    browser.run(button)
    falling = browser.run(errors)
    assert falling == sorted(falling, reverse=True) and len(falling) == 281
    assert browser.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"
    browser.run(button)
    assert browser.run(errors) == sorted(falling)


def test_the_keyboard_reaches_everything(browser, page):
    browser.open(page, **SIZES["desktop"])
    browser.run("$('search').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "table"  # arrow keys scroll it
    browser.press("Tab")
    assert browser.run("document.activeElement.closest('thead') !== null")
    for _ in range(browser.run("columns.length") + 30):  # past the headers, and past the rows that were in sight
        browser.press("Tab")
    number = "Number(document.activeElement.closest('tr').getAttribute('aria-rowindex'))"
    assert browser.run(number) == 32
    name = browser.run("document.activeElement.textContent")
    browser.press("Enter", "\r")
    assert browser.run("$('details').open && $('details-title').textContent") == name
    browser.press("Escape")
    assert browser.run("$('details').open") is False and browser.run("document.activeElement.textContent") == name


def test_tens_of_thousands_of_tensors(browser, tmp_path):
    file = tmp_path / "large.html"
    report = sample_report.of_model(100, experts=197)  # 20,000 tensors
    file.write_text(report_page(report), encoding="utf-8")
    browser.open(file, **SIZES["desktop"])
    assert browser.run("rows.length") == 20_001
    assert browser.run(LINES) < 60
    browser.run("$('table').scrollTop = $('table').scrollHeight; scrolled()")
    last = "[...document.querySelectorAll('#table tbody tr:not(.gap)')].pop().querySelector('td').textContent"
    assert browser.run(last) == list(report["tensors"])[-1] and browser.run(LINES) < 60
    search(browser, "layers.99. q_proj")
    assert browser.run(LINES) == 1
    assert browser.run("document.querySelectorAll('.map rect').length") == 11 * 401


def test_hostile_names_are_text(browser, tmp_path):
    texts = [
        "</script><script>window.hit = 1</script>",
        "<img src=x onerror='window.hit = 1'>",
        "model.layers.0.<b>.weight",
    ]
    tensors = {text: sample_report.entry(i, reason=text) for i, text in enumerate(texts)}
    file = tmp_path / "hostile.html"
    file.write_text(
        report_page(
            sample_report.report(tensors, models=texts[:2], name=texts[0], base=texts[1], recipe_yaml=texts[1])
        ),
        encoding="utf-8",
    )
    browser.open(file, **SIZES["phone"])
    assert browser.run("document.documentElement.scrollWidth") == 390
    browser.run("details(rows[1])")
    assert browser.run("window.hit === undefined && document.querySelectorAll('img, b').length === 0")
    assert browser.run("$('details-title').textContent") == texts[1]
    assert browser.run("$('recipe').textContent") == texts[1] and browser.run("$('title').textContent") == texts[0]


def test_a_merge_of_which_little_is_known(browser, tmp_path):
    bare = {"certificate": None, "captured_energy": [], "interference": [], "task_norms": [], "update_norm": None,
            "ranks": [], "ranks_asked": [], "sparsities": [], "outlier_masses": []}  # fmt: skip
    report = sample_report.report({"w": sample_report.entry(0, shape=(), bytes=2, **bare)})
    file = tmp_path / "bare.html"
    for tensors in (report, sample_report.report({})):
        file.write_text(report_page(tensors), encoding="utf-8")
        browser.open(file, **SIZES["phone"])
        assert "No matrix" in browser.run("$('maps-note').textContent")
        assert browser.run(LINES) == len(tensors["tensors"])


def test_models_parameters_and_advice(browser, page, tmp_path):
    browser.open(page, **SIZES["desktop"])
    assert browser.run("$('models').querySelector('tbody').innerText.split(/\\s+/).slice(0, 2)") == ["org/math", "0.5"]
    assert browser.run("$('models').querySelectorAll('td')[2].textContent") == "1"  # the second model's: the default
    assert browser.run("$('parameters').textContent") == "alpha 0.5 \u2192 1 \u00b7 density mlp: 0.5; others: 1"
    assert "2026-01-02 03:04 UTC" in browser.run("$('run').textContent")
    assert "cpu: task_gram" in browser.run("$('run').textContent")
    assert "tolerance of a float64" in browser.run("$('advice').textContent")
    assert browser.run("$('wide').hidden") is False
    # An element-wise method measures nothing but time; errors that are the same in print have one colour.
    bare = {"certificate": None, "captured_energy": [], "interference": [], "task_norms": [], "update_norm": None,
            "ranks": [], "ranks_asked": [], "sparsities": [], "outlier_masses": [], "parameters": {}}  # fmt: skip
    names = list(sample_report.names(3))
    one = sample_report.entry(0)["certificate"]
    for fields, advice in ((bare, "--norms"), ({"certificate": one | {"error": 2e-3}}, "outside its tolerance")):
        tensors = {name: sample_report.entry(0, **fields) for name in names}
        (tmp_path / "some.html").write_text(report_page(sample_report.report(tensors)), encoding="utf-8")
        browser.open(tmp_path / "some.html", **SIZES["desktop"])
        assert advice in browser.run("$('advice').textContent")
    title = "[...document.querySelectorAll('.map')].find((m) => m.querySelector('h3').textContent === 'Error estimate')"
    assert browser.run(f"new Set([...{title}.querySelectorAll('rect')].map((r) => r.style.fill)).size") == 1


def test_the_cell_of_a_parameter_has_its_details(browser, page):
    browser.open(page, **SIZES["desktop"])
    browser.run("document.querySelector('.map rect').dispatchEvent(new Event('click', {bubbles: true}))")
    assert browser.run("$('details').open && $('details-title').textContent") == "lm_head.weight"
    assert "alpha 0.5" in browser.run("$('details-body').textContent")
    browser.run("$('details').close()")
