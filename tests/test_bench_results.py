"""Rows of results: their file, the hash of the sources, comparisons of runs, and the printer."""

import json
import math
import statistics

import pytest

from benchmarks.against import times_of
from r_tsvm_kernels import bench
from r_tsvm_kernels.bench import Results, exponent, results
from r_tsvm_kernels.bench.table import factor, sheets
from r_tsvm_kernels.errors import ConfigError, OutputExistsError


def test_exponent():
    assert exponent([1, 2, 4], [5, 40, 320]) == pytest.approx(3)
    assert math.isnan(exponent([1], [5]))


def test_results_are_never_overwritten(tmp_path):
    path = tmp_path / "new" / "a.json"
    file = Results(path)
    rows = [bench.row("a", "cpu", "time", [1.0, 2.0, 4.0], shape=(2, 3), options={"tasks": 3}),
            bench.row("a", "cuda", "time", None, notes={"status": "unavailable"})]  # fmt: skip
    file.add(rows[:1])
    file.add(rows[1:])
    assert bench.read_rows(path) == file.rows and len(file.rows) == 2
    assert file.rows[0]["median"] == 2.0 and file.rows[0]["rounds"] == 3 and file.rows[1]["rounds"] == 0
    with pytest.raises(OutputExistsError, match="not overwritten"):
        Results(path)
    assert bench.read_rows(path) == file.rows


def test_a_row_without_a_field_is_refused(tmp_path):
    file = Results(tmp_path / "a.json")
    file.add([bench.row("a", "cpu", "time", 1.0)])
    text = file.path.read_text()
    for field in results.FIELDS:
        assert f'"{field}"' in text
        file.path.write_text(text.replace(f'"{field}"', '"another"'))
        with pytest.raises(ConfigError, match=field):
            bench.read_rows(file.path)


def test_the_hash_is_of_the_code(tmp_path):
    package, native = tmp_path / "r_tsvm_kernels", tmp_path / "csrc"
    for folder in (package / "ops", package / "bench", native):
        folder.mkdir(parents=True)
    files = {package / "ops" / "a.py": '"""Docs."""\n\nx = 1  # why\n', native / "a.cpp": "int x; // why\n",
             package / "bench" / "b.py": "y = 1\n"}  # fmt: skip

    def hash_with(**changed):
        for path, text in files.items():
            path.write_text(changed.get(path.stem + path.suffix.replace(".", "_"), text))
        results.source_hash.cache_clear()
        return results.source_hash(tmp_path)

    before = hash_with()
    assert before == hash_with(a_py='"""Other docs."""\nx = 1\n', a_cpp="int x;\n", b_py="y = 2\n")
    assert len({before, hash_with(a_py="x = 2\n"), hash_with(a_cpp="int y;\n")}) == 3
    results.source_hash.cache_clear()


@pytest.mark.parametrize(
    ("median", "low", "high", "rounds", "words"),
    [
        (2.0, 1.9, 2.1, 5, "2.00 x faster (1.90 - 2.10)"),
        (0.5, 0.4, 0.8, 5, "2.00 x slower (1.25 - 2.50)"),
        (1.02, 0.97, 1.1, 5, "as fast"),  # the quartiles include 1
        (0.999, 0.998, 0.9995, 5, "as fast"),  # never 1.00 x slower
        (0.8, 0.8, 0.8, 1, "1.25 x slower"),
        (2.0, 1.9, 2.1, 3, "2.00 x faster"),  # quartiles of three rounds mean nothing
        (2.0, None, None, 5, "2.00 x faster"),
        (1482.1, 1400.0, 1500.0, 2, "1482 x faster"),
        (12.34, 12.0, 12.5, 4, "12.3 x faster (12.0 - 12.5)"),
    ],
)
def test_ratios_in_words(median, low, high, rounds, words):
    assert factor({"median": median, "q1": low, "q3": high, "rounds": rounds}) == words


def timed(seconds, spread=0.01, rounds=5, provider="cpu", role="ours", **more):
    values = {"median": seconds, "q1": seconds * (1 - spread), "q3": seconds * (1 + spread), "rounds": rounds}
    return bench.row("op", provider, "time", values, role=role, **more)


def verdict_of(before, after, *others):
    """Compare one time of ours, with times of torch as pairs."""
    changes, noise = bench.compare([([before, *(a for a, _ in others)], [after, *(b for _, b in others)])])
    return changes[0], noise


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (timed(1.0), timed(1.2), "slower"),
        (timed(1.0), timed(0.8), "faster"),
        (timed(1.0), timed(1.03), ""),  # apart, but by too little
        (timed(1.0, 0.3), timed(1.2, 0.3), ""),  # within the spread
        (timed(1.0, rounds=1), timed(2.0), ""),  # a single round has no spread
    ],
)
def test_changes_beyond_noise(before, after, verdict):
    change, noise = verdict_of(before, after)
    assert change.verdict == verdict and change.ratio == pytest.approx(after["median"] / before["median"])
    assert noise == 0.05


def test_torch_is_the_control_of_one_comparison():
    torch_rows = [timed(1.0, provider="eager", role="torch"), timed(0.44, provider="eager", role="torch")]
    change, noise = verdict_of(timed(1.0), timed(0.5), torch_rows)
    assert change.verdict == "" and noise == pytest.approx(1 / 0.44 - 1)  # no more than torch's own change
    change, _ = verdict_of(timed(1.0), timed(0.2), torch_rows)
    assert change.verdict == "faster"


def test_only_what_is_in_both_is_compared():
    wrong = bench.row("wrong", "cpu", "time", None)
    assert bench.compare([([timed(1.0), wrong], [timed(1.0, dtype="other"), wrong])])[0] == []


def test_turns():
    def verdict(*ratios, others=(1.02,) * 3, role="ours"):
        turns = []
        for speed, ratio, other in zip((1, 3, 2), ratios, others, strict=True):
            pairs = [(timed(speed, role=role), timed(speed * ratio, role=role))]
            pairs += [(timed(speed, provider="eager", role="torch"),
                       timed(speed * other, provider="eager", role="torch"))]  # fmt: skip
            turns.append(tuple(list(side) for side in zip(*pairs, strict=True)))
        (change, other), noise = bench.compare(turns)
        assert change.ratio == pytest.approx(statistics.median(ratios)) and other.verdict == ""
        yardsticks = [statistics.median(others), statistics.median(ratios) if role != "ours" else 1.0]
        assert noise == pytest.approx(max(0.05, max(yardsticks) - 1))
        return change.verdict

    assert verdict(1.2, 1.3, 1.25) == "slower"
    assert verdict(0.8, 0.7, 0.8) == "faster"
    assert verdict(0.7, 1.4, 1.1) == ""  # the turns do not agree
    assert verdict(1.04, 1.03, 1.04) == ""  # too small
    assert verdict(1.2, 1.3, 1.25, others=(1.4, 1.3, 1.2)) == ""  # no more than torch's
    assert verdict(0.7, 0.7, 0.7, others=(1.4, 1.3, 1.2)) == "faster"
    assert verdict(1.2, 1.3, 1.25, role="peer") == ""


def test_results_of_another_schema_are_refused(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"schema": 99, "rows": []}))
    with pytest.raises(ConfigError, match="schema 2"):
        bench.read_rows(file)


def test_older_commits_can_be_compared_with():
    found = {"name": "op", "matrix": "m", "shape": [2, 3], "dtype": "d", "tasks": 3, "provider": "cpu", "role": "ours",
             "status": "timed", "seconds": {"median": 1.0, "q1": 1.0, "q3": 1.0, "rounds": 2}}  # fmt: skip
    report = {"schema": 1, "date_utc": "", "cpu": "c", "gpu": None, "threads": 2, "versions": {}, "device": "cpu",
              "rows": [found, found | {"status": "wrong"}]}  # fmt: skip
    now = bench.row("op", "cpu", "time", 2.0, shape=(2, 3), dtype="d",
                    options={"matrix": "m", "tasks": 3, "device": "cpu"})  # fmt: skip
    ((change,), _) = bench.compare([(times_of(report), [now])])
    assert change.ratio == 2.0


def test_the_printer():
    def rows(name, ours, eager, status=None, **options):
        case = {"shape": (64, 32), "dtype": "float32", "options": {"matrix": "m", **options}}
        notes = {"status": status, "reason": "error"} if status else {}
        return [
            bench.row(name, "cpu", "time", None if status else [ours] * 5, notes=notes, **case),
            bench.row(name, "eager", "time", [eager] * 5, role="reference", **case),
            *([] if status else [bench.row(name, "cpu", "speed-up", [eager / ours] * 5, notes={"against": "eager"},
                                           **case)]),
        ]  # fmt: skip

    where = {"date": "2026-01-02", "machine": {}, "versions": {}}
    found = [row | where | {"sources": "now"} for row in rows("quick", 0.1, 0.2)]
    found += [row | where | {"sources": "before"} for row in rows("slow", 0.4, 0.2)]
    found += [row | where | {"sources": "now"} for row in rows("bad", 0.1, 0.2, "wrong")]
    (sheet,) = sheets(found, "role", ("speed-up",), current="now")
    assert sheet.title == "m, 64x32, float32"
    assert sheet.columns == ["case", "ours", "eager torch", "speed-up", "rounds"]
    assert sheet.lines == [
        ["quick", "100 ms cpu", "200 ms", "2.00 x faster (2.00 - 2.00)", "5"],
        ["slow †", "400 ms cpu", "200 ms", "2.00 x slower (2.00 - 2.00)", "5"],
        ["bad; cpu WRONG", "no kernel", "200 ms", "", "5"],
    ]
    (sheet,) = sheets(found[:3] + rows("quick", 1.0, 1.0, tasks=2)[:1], "provider")
    assert sheet.title == "quick, m, 64x32, float32"  # what all lines share is no column
    assert sheet.columns == ["tasks", "cpu", "eager", "cpu against eager", "rounds"]
    assert sheet.lines[1] == ["2", "1.00 s", "", "", "5"]
