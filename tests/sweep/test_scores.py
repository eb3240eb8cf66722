"""Scores: how they are read, and which candidates are best."""

import random

import pytest
import torch

from r_tsvm_kernels import ConfigError
from r_tsvm_kernels.sweep.durations import format_duration, parse_duration
from r_tsvm_kernels.sweep.scores import Objective, as_scores, parse_scores
from r_tsvm_kernels.sweep.trial import Trial


@pytest.mark.parametrize(
    ("output", "scores"),
    [
        ("0.5", {"score": 0.5}),
        ("loading\n  7  \n\n \n", {"score": 7.0}),
        ('noise {"a": 1}\n{"b": 1e-3, "a": -2}\n', {"b": 0.001, "a": -2.0}),
    ],
)
def test_output(output, scores):
    assert parse_scores(output) == scores and list(parse_scores(output)) == list(scores)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "got no output"),
        ("0.5\ndone", "as the last line of stdout, got 'done'"),
        ("71 %", "got '71 %'"),
        ("[1]", "got '[1]'"),
        ("true", "is no number: True"),
        ("NaN", "is not finite"),
        ('{"a": Infinity}', "'a' is not finite"),
        ('{"a": "0.5"}', "'a' is no number: '0.5'"),
        ('{"a": null}', "'a' is no number"),
        ("{}", "no score"),
        ("[" * 10_000, "as the last line"),
        ("1" * 400, "'score' is no number"),
    ],
)
def test_what_is_no_score(output, message):
    with pytest.raises(ValueError, match="o") as caught:
        parse_scores(output)
    assert message in str(caught.value)


def test_what_functions_return():
    assert as_scores(torch.tensor(0.5)) == {"score": 0.5} and as_scores({"a": torch.tensor(2)}) == {"a": 2.0}
    for wrong in (None, "0.5", [1], {1: 2.0}, {}, True):
        with pytest.raises(ValueError, match="score"):
            as_scores(wrong)


def trials(*scores):
    return [Trial(i, {"x": i}, own) for i, own in enumerate(scores, 1)]


def test_the_best():
    found = trials({"a": 1, "b": 5}, {}, {"a": 3, "b": 1}, {"a": 3, "b": 9})
    assert [t.number for t in Objective().ranked(found)] == [4, 3, 1]
    assert [t.number for t in Objective.parse(None, minimize=True).ranked(found)] == [1, 3, 4]
    assert [t.number for t in Objective().ranked(trials({"a": 1}, {"a": 1}))] == [1, 2]
    assert [t.number for t in Objective.parse("b").ranked(found)] == [4, 1, 3]
    assert [t.number for t in Objective.parse(["b:min"]).ranked(found)] == [3, 1, 4]
    assert Objective.parse(["b:min"]).ordered(found) == ["b", "a"] and Objective().ordered([]) == []
    with pytest.raises(ConfigError, match="no score 'aa'; did you mean 'a'"):
        Objective.parse("aa").check({"a": 1, "b": 2})
    for wrong in (["a", "a:min"], [""], ":min"):
        with pytest.raises(ConfigError, match="each once"):
            Objective.parse(wrong)


@pytest.mark.parametrize("names", [[], ["a", "b:min"], ["b:max", "a:min"]])
@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_no_other_beats(names, seed):
    rng = random.Random(seed)
    found = trials(*({"a": rng.randrange(6), "b": rng.randrange(6)} for _ in range(40)), {})
    objective = Objective.parse(names)
    costs = {t.number: [objective.cost(t, name) for name in ("a", "b")] for t in found if t.scores}
    expected = {
        n for n, own in costs.items()
        if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in costs.values())
    }  # fmt: skip
    assert objective.front(found) == expected and 0 < len(expected) < 40
    assert objective.ranked(found)[0].number in expected


def test_durations():
    assert [parse_duration(text) for text in ("2h", "1h30m", "90s", "90", 1.5, 1e-6, 1e20, " 1D 2 h ", "0.5m")] == [
        7200, 5400, 90, 90, 1.5, 1e-6, 1e20, 93600, 30,
    ]  # fmt: skip
    for wrong in ("", "h", "-1", "0", "1x", "1m1h", "nan", "inf", True):
        with pytest.raises(ConfigError, match="duration such as 2h"):
            parse_duration(wrong)
    assert [format_duration(seconds) for seconds in (0.01234, 119, 120, 7200)] == [
        "0.0123 s", "119 s", "2.0 min", "2.0 h",
    ]  # fmt: skip
