"""Write the report of a sweep as one self-contained HTML page: no network, no script, no other files."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..report import page_part, policy_hash
from ..text import printable
from .durations import format_duration
from .plots import Point, plot
from .trial import described, written


def sweep_page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a sweep.

    Everything in the report is untrusted: it reaches the page as escaped text, and the page's content security policy
    allows no script, and no style but its own.

    Args:
        report: the content of ``sweep.json``.
    """
    style = page_part("page.css") + files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src '{policy_hash(style)}'"
    tried = [candidate for candidate in report["candidates"] if candidate["scores"]]
    sections = [
        _section("summary", "Summary", _tiles(report, tried)),
        _section("plots", "Scores", _plots(report, tried)) if tried else "",
        _section("table", "Candidates", _table(report)),
        _failures(report),
        f'<div class="pair">{_recipe(report)}{_section("run", "Run", _facts(report))}</div>',
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(report["name"])}</title>
<style>{style}</style>
</head>
<body>
<header>
  <p class="over">Sweep report</p>
  <h1>{_text(report["name"])}</h1>
  <p class="muted">{_text(report["evaluation"])}</p>
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def _tiles(report: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> str:
    candidates = report["candidates"]
    failed = len(candidates) - len(tried)
    best = next((c for c in tried if c["number"] == report["best"]), None)
    tiles = []
    if best is not None:
        score = report["scores"][0]
        more = "the least" if score["better"] == "min" else "the most"
        tiles.append((f"Best {score['name']}", written(best["scores"][score["name"]]), f"{more} of {len(tried)}", ""))
    count = f"of {report['total']}" + ("" if report["complete"] else "; the time limit came first")
    tiles.append(("Candidates", str(len(candidates)), count, ""))
    tiles.append(("Failed", str(failed), "see below" if failed else "", "warn" if failed else ""))
    merging, evaluating = (sum(c[f"{what}_seconds"] for c in candidates) for what in ("merge", "evaluation"))
    spent = f"merging {format_duration(merging)}, evaluating {format_duration(evaluating)}"
    tiles.append(("Time of the last run", format_duration(report["seconds"]), f"all runs: {spent}", ""))
    shown = "".join(
        f'<div><dt>{_text(label)}</dt><dd class="value {kind}">{_text(value)}</dd>'
        f'<dd class="more">{_text(more)}</dd></div>'
        for label, value, more, kind in tiles
    )
    values = "" if best is None else f"<h3>Best values</h3>{_list(best['values'])}"
    return f'<dl class="tiles">{shown}</dl>{values}'


def _plots(report: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> str:
    first, *others = report["scores"]
    drawn = []
    for axis in report["varied"]:
        log = bool((axis["range"] or {}).get("log"))
        points = [_point(report, c, c["values"][axis["label"]], c["scores"][first["name"]]) for c in tried]
        drawn.append(plot(points, axis["label"], first["name"], envelope=first["better"], log=log))
    for other in others:
        points = [_point(report, c, c["scores"][other["name"]], c["scores"][first["name"]]) for c in tried]
        drawn.append(plot(points, other["name"], first["name"]))
    key = '<p class="key muted"><b class="best">the best</b>'
    key += '<b class="front">no other is better in all scores</b>' if others else ""
    key += "<b>other candidates; lines join the best of each value</b></p>"
    return f'<div class="plots">{"".join(drawn)}</div>{key}'


def _point(report: Mapping[str, Any], candidate: Mapping[str, Any], x: Any, y: float) -> Point:
    kind = "front" if candidate["front"] and len(report["scores"]) > 1 else ""
    kind = "best" if candidate["number"] == report["best"] else kind
    title = f"{candidate['number']}: {described(candidate['values'])}; {described(candidate['scores'])}"
    return Point(x, y, kind, title)


def _table(report: Mapping[str, Any]) -> str:
    labels, scores = [axis["label"] for axis in report["varied"]], [score["name"] for score in report["scores"]]
    candidates = sorted(report["candidates"], key=lambda c: (c["rank"] is None, c["rank"] or 0, c["number"]))
    several = len(scores) > 1
    head = ["place", *labels, *scores, *(["front"] if several else []), "merge", "evaluation", "tried as"]
    rows = []
    for c in candidates:
        cells = [written(c["values"][label]) for label in labels]
        cells += [written(c["scores"][name]) if c["scores"] else "failed" for name in scores]
        cells += ["yes" if c["front"] else ""] if several else []
        cells += [format_duration(c["merge_seconds"]) + " (parts)" * c["from_parts"]]
        cells += [format_duration(c["evaluation_seconds"]), f"{c['number']}"]
        kind = ' class="best"' if c["number"] == report["best"] else ""
        place = f'<th scope="row">{c["rank"] or "-"}</th>'
        rows.append(f"<tr{kind}>{place}{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    titles = "".join(f'<th scope="col">{_text(title)}</th>' for title in head)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div id="candidates" class="scroll" role="region" aria-labelledby="h-table" tabindex="0">{table}</div>'


def _failures(report: Mapping[str, Any]) -> str:
    failed = [candidate for candidate in report["candidates"] if not candidate["scores"]]
    if not failed:
        return ""
    shown = "".join(
        f"<details><summary>{_text(described(c['values']))}: {_text(c['failure'])}</summary>"
        f"<pre>{_lines(c['stderr'] or 'nothing on stderr')}</pre></details>"
        for c in failed
    )
    return _section("failures", "Failures", shown)


def _recipe(report: Mapping[str, Any]) -> str:
    text = report["best_yaml"] or report["recipe_yaml"]
    title = "Recipe of the best" if report["best_yaml"] else "Recipe"
    return _section("recipe", title, f'<pre class="scroll" tabindex="0">{_lines(text)}</pre>')


def _facts(report: Mapping[str, Any]) -> str:
    varied = {
        axis["label"]: (f"{axis['range']['low']} to {axis['range']['high']}" + " (log)" * axis["range"]["log"])
        if axis["range"]
        else ", ".join(map(written, axis["values"]))
        for axis in report["varied"]
    }
    search = report["search"]
    facts = {
        "date": f"{report['date'][:16].replace('T', ' ')} UTC",
        "method": report["method"]["pretty_name"],
        "evaluation": report["evaluation"],
        "search": "grid" if search is None else ", ".join(f"{name} {value}" for name, value in search.items()),
        **{f"values of {label}": values for label, values in varied.items()},
        "device": report["device"],
        **report["versions"],
    }
    return _list(facts)


def _list(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(written(value))}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _section(name: str, title: str, content: str) -> str:
    return f'<section aria-labelledby="h-{name}"><h2 id="h-{name}">{title}</h2>{content}</section>\n'


def _text(text: object) -> str:
    return html.escape(printable(text))


def _lines(text: str) -> str:
    return "\n".join(_text(line) for line in text.splitlines())
