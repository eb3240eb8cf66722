import pytest

from r_tsvm_kernels import ConfigError
from r_tsvm_kernels.sizes import format_size, parse_size


@pytest.mark.parametrize(
    "size, text",
    [
        (1, "1B"),
        (999, "999B"),
        (1000, "1.000KB"),
        (1_000_001, "1.001MB"),
        (5 * 10**9, "5.000GB"),
        (10**13, "10000.000GB"),
    ],
)
def test_sizes_as_written(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize("size", [1, 17, 1023, 123_456, 318_960_128, 5_000_000_001, 2**43 + 1])
def test_what_is_written_is_never_too_small(size):
    assert size <= parse_size(format_size(size)) <= size * 1.001 + 1


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5.2GB", "5XB", "GB", "1e9"])
def test_not_a_size(text):
    with pytest.raises(ConfigError, match="expected a size such as 5GB"):
        parse_size(text)
