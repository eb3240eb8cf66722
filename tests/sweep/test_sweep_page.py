"""The page of a sweep: complete, safe, and one file."""

import base64
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from browser import BINARY, Browser
from swept import models

from r_tsvm_kernels import sweep_checkpoints
from r_tsvm_kernels.sweep.page import sweep_page
from r_tsvm_kernels.sweep.plots import HEIGHT, WIDTH, Point, plot

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&\"'\x1b"
VOID = {"meta", "link", "br", "img", "input"}


class Strict(HTMLParser):
    """Collects tags and text; refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A sweep with two scores and a failure."""
    folder = tmp_path_factory.mktemp("sweep")
    scores = iter([{"accuracy": a, "loss": b} for a, b in ((1, 1), (3, 2), (2, 9), (5, 3))] + [ValueError("<sad>")])

    def evaluate(path):
        found = next(scores)
        if isinstance(found, Exception):
            raise found
        return found

    config = models(folder / "in")
    grids = {"alpha": [0.25, 0.5, 1, 2, 4]}
    sweep_checkpoints(config, folder / "out", evaluate=evaluate, grids=grids, score=["accuracy", "loss:min"])
    page = (folder / "out" / "sweep.html").read_text()
    found = json.loads((folder / "out" / "sweep.json").read_text())
    assert page == sweep_page(found)
    return found


def test_it_is_complete_and_needs_nothing(report):
    page = sweep_page(report)
    found = parsed(page)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "img", "iframe", "object", "base", "form")]
    assert not any(name in ("src", "href", "style") or name.startswith("on") for _, a in found.tags for name in a)
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"
    assert "url(" not in style and "@import" not in style
    for words in ("Sweep of Task Arithmetic of expert0, expert1", "Best accuracy", "Failures", "ValueError: <sad>",
                  "merge_method: task_arithmetic", "Traceback"):  # fmt: skip
        assert words in found.text, words
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
    assert len(rows) == 1 + 5 and "failed" in rows[-1]
    assert [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)[:5] for row in rows[1:3]] == [
        ["1", "2", "5", "3", "yes"], ["2", "0.5", "3", "2", "yes"],
    ]  # fmt: skip
    assert "best_yaml" not in found.text and report["candidates"][0]["front"] and not report["candidates"][2]["front"]


def test_plots_show_every_candidate(report):
    svgs = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", sweep_page(report))]
    assert len(svgs) == 2  # alpha, and the other score
    for svg in svgs:
        circles = svg.findall("circle")
        assert len(circles) == 4 and [c.get("class") for c in circles].count("best") == 1
        assert all(0 < float(c.get("cx")) < WIDTH and 0 < float(c.get("cy")) < HEIGHT for c in circles)
        assert circles[-1].get("class") == "best" and "accuracy=5" in circles[-1].find("title").text
    heights = {c.find("title").text[0]: float(c.get("cy")) for c in svgs[0].findall("circle")}
    assert sorted(heights, key=heights.get) == ["4", "2", "3", "1"]  # larger scores are higher up
    assert svgs[0].find("polyline") is not None and svgs[1].find("polyline") is None


def coordinates(svg):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).findall("circle")]


def test_axes():
    def points(*xy):
        return [Point(x, y, "", f"{x}") for x, y in xy]

    (a, ya), (b, _), (c, _), (d, yd) = coordinates(
        plot(points((0.01, 1), (0.1, 2), (1, 3), (10, 4)), "x", "y", log=True)
    )
    assert b - a == pytest.approx(c - b, abs=0.2) and c - b == pytest.approx(d - c, abs=0.2) and ya > yd
    names = plot(points(("full", 1), ("sparsity", 2), ("full", 3)), "rank", "y", envelope="max")
    (one, _), (two, _), (three, top) = coordinates(names)
    assert one == three < two and ">sparsity</text>" in names
    line = ET.fromstring(names).find("polyline").get("points").split()
    assert len(line) == 2 and line[0] == f"{one:.1f},{top:.1f}"
    assert len(coordinates(plot(points((1, 1)), "x", "y"))) == 1  # nothing to divide by
    assert len(coordinates(plot(points((0, 0), (0, 0)), "x", "y", log=True))) == 2
    many = plot(points(*((i / 7, i) for i in range(50))), "x", "y")
    assert 4 <= many.count('class="across"') <= 9
    for value in (True, [0, 1], {"filter": "mlp", "value": 1}, "ü" * 40):
        ET.fromstring(plot(points((value, 1), (0.5, 2)), "x", "y"))


def test_hostile_text_is_text(report):
    changed = json.loads(json.dumps(report).replace("alpha", "ALPHA"))
    for key in ("name", "evaluation", "best_yaml"):
        changed[key] = HOSTILE
    changed["varied"][0]["label"] = changed["scores"][0]["name"] = HOSTILE
    for candidate in changed["candidates"]:
        candidate["values"] = {HOSTILE: HOSTILE}
        candidate["failure"] = candidate["failure"] and HOSTILE
        candidate["stderr"] = candidate["stderr"] and HOSTILE
        if candidate["scores"]:
            candidate["scores"] = {HOSTILE: candidate["scores"]["accuracy"], "loss": 1.0}
    page = sweep_page(changed)
    before, after = parsed(sweep_page(report)), parsed(page)
    assert {tag for tag, _ in after.tags} <= {tag for tag, _ in before.tags}
    assert "<script" not in page and "<img" not in page and "\x1b" not in page
    assert html.escape("</pre><script>alert(1)</script>") in page


def test_a_sweep_of_which_nothing_is_known(report):
    bare = report | {"candidates": [], "best": None, "best_yaml": None, "scores": [], "complete": False}
    assert "the time limit came first" in parsed(sweep_page(bare)).text
    failed = report | {"candidates": report["candidates"][4:], "best": None, "best_yaml": None, "scores": []}
    assert "ValueError: <sad>" in parsed(sweep_page(failed)).text


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits(report, tmp_path, width, dark):
    (tmp_path / "sweep.html").write_text(sweep_page(report), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(tmp_path / "sweep.html", width=width, height=844, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("document.querySelectorAll('circle').length") == 8 and browser.problems == []
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
    finally:
        browser.close()
