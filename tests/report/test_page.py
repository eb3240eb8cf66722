"""The page, the summary and the card as texts; tests/report/test_browser.py opens the page."""

import json
import re
from html.parser import HTMLParser

import pytest
import sample_report
import yaml

from r_tsvm_kernels.parameters import split_layer
from r_tsvm_kernels.report import inherited_terms, model_card, plain, report_page, short_name, summary, time_per_stage
from r_tsvm_kernels.report.page import kinds

HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "{{data}}", "&lt;b&gt;",
    "\u2028`${alert(1)}`", "]]>", "\\u003c\"'",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.tags, self.data, self.scripts, self._inside = [], "", [], None

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id", tag) if tag == "script" else None
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is not None:
            self.scripts[-1] += data


def parsed(page):
    tags = Tags()
    tags.feed(page)
    return tags


def test_hostile_names_are_data():
    plainest = parsed(report_page(sample_report.of_model(1)))
    tensors = {text: sample_report.entry(i, reason=text) for i, text in enumerate(HOSTILE)}
    report = sample_report.report(
        tensors, models=HOSTILE[:2], name=HOSTILE[0], base=HOSTILE[2], recipe_yaml="\n".join(HOSTILE)
    )
    page = report_page(report)
    found = parsed(page)
    assert found.tags == plainest.tags and len(found.scripts) == 2
    assert found.scripts[1] == plainest.scripts[1]
    data = json.loads(found.scripts[0])
    assert [row[0] for row in data["rows"]] == HOSTILE and data["name"] == HOSTILE[0]
    assert data["recipe_yaml"] == report["recipe_yaml"]
    assert "<title>rtsvm: &lt;/script&gt;" in page


def test_the_page_needs_nothing_from_elsewhere():
    page = report_page(sample_report.of_model(2))
    tags = parsed(page).tags
    assert not any({"src", "href", "style", "onclick"} & attributes.keys() for _, attributes in tags)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\b", page)
    (policy,) = [a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_the_page_says_what_the_report_says():
    report = sample_report.of_model(3, experts=2)
    data = json.loads(parsed(report_page(report)).scripts[0])
    rows = [dict(zip(data["fields"], row, strict=True)) for row in data["rows"]]
    assert [row["name"] for row in rows] == list(report["tensors"])
    for row, entry in zip(rows, report["tensors"].values(), strict=True):
        assert row["ranks"] == entry["ranks"] and row["interference"] == pytest.approx(entry["interference"], rel=1e-4)
        assert row["error"] == pytest.approx(entry["certificate"]["error"], rel=1e-4)
        assert row["basis_condition"] == [None, 2.0]  # there is no NaN in JSON
        assert (row["gap"], row["arbitrary"]) == (entry["certificate"]["gap"], entry["certificate"]["arbitrary"])
    assert {row["kind"] for row in rows} == {None, *(kind.format("*") for kind in sample_report.KINDS)}
    assert {row["layer"] for row in rows} == {None, 0, 1, 2}
    assert [row["parameters"]["alpha"] for row in rows[:2]] == [0.5, 0.51]
    assert data["summary"] == plain(report["summary"])


def test_kinds_and_layers():
    assert split_layer("model.layers.12.mlp.experts.3.w1.weight") == ("model.layers.", 12, "mlp.experts.3.w1.weight")
    assert split_layer("conv2d.weight") is None
    names = ["encoder.block.0.q.weight", "decoder.block.1.experts.12.q.bias", "lm_head.weight"]
    assert kinds(dict.fromkeys(names)) == {
        names[0]: ("encoder.block.q", 0), names[1]: ("decoder.block.experts.*.q.bias", 1),
    }  # fmt: skip
    assert kinds({"h.7.weight": 0}) == {"h.7.weight": ("weight", 7)}


def test_the_summary():
    tensors = {
        "a": sample_report.entry(0),
        "b": sample_report.entry(3),
        "d": sample_report.entry(7, task_norms=[], update_norm=None, captured_energy=[], interference=[], stages={}),
        "c": sample_report.entry(1, treatment="base", certificate=None, captured_energy=[], interference=[],
                                 task_norms=[], update_norm=None, stages={"read": [1.0, 0.5]}),
    }  # fmt: skip
    found = summary(tensors)
    assert found["treatments"] == {"merge": 3, "base": 1}
    assert found["escalated"] == 1 and found["arbitrary"] == 1
    assert found["largest_error"] == {"tensor": "d", "error": pytest.approx(8e-7), "tolerance": 1e-4}
    assert found["task_norms"] == pytest.approx([0.5**0.5] * 2) and found["update_norm"] == pytest.approx(0.125**0.5)
    assert found["captured_energy"] == {"mean": pytest.approx(0.9375), "least": pytest.approx(0.9)}
    assert time_per_stage(tensors)["read"] == {"wall": pytest.approx(1.2), "cpu": pytest.approx(0.6)}
    nothing = summary({})
    assert nothing["tensors"] == 0 and nothing["largest_error"] is None and nothing["task_norms"] is None


def test_plain_leaves_numbers_alone():
    assert plain({"a": [1, 2.5, float("nan")], "b": (True, None, float("-inf"), "NaN")}) == {
        "a": [1, 2.5, None], "b": [True, None, None, "NaN"],
    }  # fmt: skip


# --- the card


def test_a_card_with_hostile_names():
    recipe = "models:\n- model: '```'\n- model: |\n    ````\n    # heading\n"
    text = model_card(recipe, "R-TSVM", "https://example.org", "a`b", ["x\n# y", "<b>"], hub_ids=["o/a: b\n- c"])
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["base_model"] == ["o/a: b\n- c"]
    body = text.split("\n---\n", 1)[1]
    assert body.split("`````yaml\n")[1].split("\n`````")[0] == recipe.strip()
    assert "`` a`b ``" in body and "* `x # y`" in body and "* `<b>`" in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# Merge of `x # y, <b>`"]


def test_a_card_without_a_base():
    text = model_card("{}", "linear", "https://example.org", None, ["a", "b"])
    assert "as the base" not in text and "base_model" not in text


@pytest.mark.parametrize(
    ("card", "terms"),
    [
        ("---\nlicense: mit\nbase_model: x\n---\n", {"license": "mit"}),
        ("---\r\nlicense: [mit, apache-2.0]\r\n---\r\ntext", {"license": ["mit", "apache-2.0"]}),
        ("\ufeff---\nlicense: other\nlicense_name: n\nlicense_link: l\n---",
         {"license": "other", "license_name": "n", "license_link": "l"}),
        ("---\nlicense: {a: b}\nlicense_name: 3\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("license: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_terms_of_the_base(tmp_path, card, terms):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert inherited_terms(tmp_path / "README.md") == terms


@pytest.mark.parametrize(
    ("model", "name"),
    [("/a/b/math", "math"), ("./math/", "math"), ("org/math", "math"), ("org/math@v1/x", "math"),
     ("in/x.safetensors", "x"), ("/a/b@c", "b@c"), ("/", "/")],
)  # fmt: skip
def test_short_names(model, name):
    assert short_name(model) == name
