import pytest

from r_tsvm_kernels.text import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0/weight [b]", "model.layers.0/weight [b]"),
        ("größe 模型 ½", "größe 模型 ½"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb\r\t\x07\x7f\x9b", "a\\nb\\r\\t\\x07\\x7f\\x9b"),
        ("safe\u202egnp.exe", "safe\\u202egnp.exe"),
        ("a\u2028b\u200bc", "a\\u2028b\\u200bc"),
        ("m\udcffdel\udc80", "m\\xffdel\\x80"),  # bytes of a path that is not UTF-8
        ("\ud800", "\\ud800"),
        (ValueError("a\nb"), "a\\nb"),
    ],
    ids=ascii,
)
def test_what_a_terminal_stumbles_over_is_escaped(text, expected):
    assert printable(text) == expected
    assert expected.isprintable() and expected.encode()
