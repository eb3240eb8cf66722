import time

import pytest

from r_tsvm_kernels.safe_yaml import load_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [x, 0.5, true, null]", {"a": 1, "b": ["x", 0.5, True, None]}),
        ("a: 1e-1\nb: -2E+3\nc: [1e2, 0.1e1]", {"a": 0.1, "b": -2000.0, "c": [100.0, 1.0]}),
        ("a: 1e\nb: e5\nc: 1e5x\nd: .e5", {"a": "1e", "b": "e5", "c": "1e5x", "d": ".e5"}),
        ("[1.e2, .5e1, 1.5E2]", [100.0, 5.0, 150.0]),
        ("- &x {a: 1, b: 2}\n- {<<: *x, a: 3}\n- *x", [{"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 1, "b": 2}]),
        ("<<: {a: 1}\n<<: {b: 2}", {"a": 1, "b": 2}),
        ("", None),
    ],
    ids=ascii,
)  # fmt: skip
def test_values(text, expected):
    assert load_yaml(text) == expected


def aliases(first, line):
    """Twenty lines, each of ten aliases of the one before."""
    return "\n".join([first, *(line.format(i=i, ten=",".join([f"*a{i - 1}"] * 10)) for i in range(1, 20))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is given twice"),
        ("a: {b: 1, b: 1}", "line 1, column 11: the key 'b' is given twice"),
        ("- x: &x {a: 1}\n- {<<: *x, a: 2, a: 3}", "the key 'a' is given twice"),
        ("a: &a [*a]", "an alias inside what it stands for"),
        ("a: &a\n  b: {c: *a}", "an alias inside what it stands for"),
        (aliases("a0: &a0 [1, 2]", "a{i}: &a{i} [{ten}]"), "aliases written out"),
        (aliases("a0: &a0 {b: 1}", "a{i}: &a{i} {{<<: [{ten}]}}"), "aliases written out"),
        ("[" * 5000, "nested deeper than 32 levels"),
        ("{a: " * 5000, "nested deeper than 32 levels"),
        ("\n".join(" " * i + "a:" for i in range(600)), "nested deeper than 32 levels"),
        ("x" * 500_001, "longer than 500000 characters"),
        ("a: [", "line 1, column 5: expected"),
        ("a: *nowhere", "undefined alias"),
        ("--- 1\n--- 2", "another document"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 2026-13-45", "cannot be read: month"),
        ("a: !!int x", "cannot be read"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("? [a]\n: b", "unhashable key"),
        ("a: \0", "special characters"),
        ("a: \udcff", "special characters"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_refused_in_one_line_and_at_once(text, message):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        load_yaml(text)
    assert message in str(error.value) and str(error.value).isprintable()
    assert time.monotonic() - start < 5


def test_the_bounds_leave_room_for_large_recipes():
    text = "\n".join(f"k{i}: [{{value: 0.1, filter: a}}, {{value: 0.2}}]" for i in range(1000))
    assert len(load_yaml(text)) == 1000
    assert load_yaml("[" * 31 + "1" + "]" * 31)
