"""Every implementation against Random123's published vectors and a Philox in Python integers."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import check
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    BEYOND_32_BITS,
    every_backend,
    large,
    on_devices,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DeviceError
from r_tsvm_kernels.ops import random_mask
from r_tsvm_kernels.ops.random_mask.reference import philox

native_backend = some_backends(random_mask, "cpu")

ONES = 2**32 - 1
# kat_vectors of Random123: counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def word(seed, stream, index):
    """The random word of an element, by Python's integers."""
    x = [(index // 4) & ONES, index // 4 >> 32, stream, 0]
    key = [seed & ONES, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ key[0], second & ONES, (first >> 32) ^ x[3] ^ key[1], first & ONES]
        key = [(key[0] + 0x9E3779B9) & ONES, (key[1] + 0xBB67AE85) & ONES]
    return x[index % 4]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    words = philox(tuple(torch.tensor([x]) for x in counter), key)
    assert tuple(int(x) for x in words) == expected


@native_backend
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors_in_native_code(backend, counter, key, expected):
    assert backends.native(backend).philox(counter, key[0] | key[1] << 32) == expected


@every_backend(random_mask)
@given(
    data=st.data(),
    keep_probability=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 1 - 2.0**-32, 1e-12])),
    seed=st.integers(0, 2**64 - 1),
    substream=st.integers(0, 2**32 - 1),
)
def test_bits_depend_on_seed_substream_and_index(backend, data, keep_probability, seed, substream):
    more = [127, 128, 129, 257] if simulated(backend) else [2047, 2049, 4100]
    numel = data.draw(st.one_of(st.integers(0, 70), st.sampled_from(more)))
    got = random_mask((numel,), keep_probability, seed=seed, substream=substream, backend=backend)
    limit = round(keep_probability * 2**32)
    assert got.dtype == torch.bool
    assert got.tolist() == [word(seed, substream, index) < limit for index in range(numel)]


@every_backend(random_mask)
def test_the_shape_does_not_change_a_bit(backend):
    flat = random_mask((60,), 0.4, seed=11, substream=2, backend=backend)
    assert torch.equal(random_mask((3, 4, 5), 0.4, seed=11, substream=2, backend=backend), flat.view(3, 4, 5))
    assert torch.equal(random_mask((37,), 0.4, seed=11, substream=2, backend=backend), flat[:37])
    assert random_mask((), 1.0, seed=11, backend=backend).shape == ()
    assert random_mask((3, 0), 0.5, seed=11, backend=backend).shape == (3, 0)


@native_backend
def test_number_of_threads_does_not_change_a_bit(backend):
    expected = random_mask((200_003,), 0.3, seed=5, substream=1, backend="torch")
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert torch.equal(random_mask((200_003,), 0.3, seed=5, substream=1, backend=backend), expected)


@every_backend(random_mask)
def test_zero_and_one_are_exact(backend):
    shape = (3000,) if simulated(backend) else (100_000,)
    assert not random_mask(shape, 0.0, seed=3, backend=backend).any()
    assert random_mask(shape, 1.0, seed=3, backend=backend).all()


@every_backend(random_mask)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_looks_random(backend, probability):
    n = 4000 if simulated(backend) else 400_000
    first, second = (random_mask((n,), probability, seed=42, substream=s, backend=backend) for s in (0, 1))
    other = random_mask((n,), probability, seed=43, backend=backend)

    def check(hits, expected, count):
        assert abs(int(hits.sum()) - expected * count) < 5 * math.sqrt(expected * (1 - expected) * count)

    check(first, probability, n)
    check(first & second, probability**2, n)
    check(first & other, probability**2, n)
    for lag in (1, 2, 3, 4, 64):
        check((first[:-lag] & first[lag:])[:: 2 * lag], probability**2, len(range(0, n - lag, 2 * lag)))


def test_what_it_refuses():
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="probability"):
            random_mask((4,), probability, seed=0)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match="seed"):
            random_mask((4,), 0.5, seed=seed)
    for substream in (-1, 2**32):
        with pytest.raises(ConfigError, match="substream"):
            random_mask((4,), 0.5, seed=0, substream=substream)
    with pytest.raises(DeviceError):
        random_mask((4,), 0.5, seed=0, device="meta")
    with pytest.raises(BackendUnavailableError, match="random_mask"):
        random_mask((4,), 0.5, seed=0, backend="abacus")


@every_backend(random_mask, reference=False)
def test_cases(backend):
    check(random_mask, backend)


@on_devices(random_mask)
@pytest.mark.parametrize("shape", [(4097, 1025), (14336, 4096)], ids=str)
def test_sizes_of_models_have_the_bits_of_a_cpu(backend, shape):
    masks = [
        random_mask(shape, 0.3, seed=2**40 + 5, substream=3, device=device, backend=which)
        for device, which in (("cuda", backend), ("cpu", None))
    ]
    assert torch.equal(masks[0].cpu(), masks[1])


@large
@on_devices(random_mask)
def test_more_elements_than_a_32_bit_index_counts(backend):
    mask = random_mask((BEYOND_32_BITS,), 0.5, seed=77, substream=3, backend=backend)
    last = range(BEYOND_32_BITS - 9, BEYOND_32_BITS)
    assert mask[-9:].tolist() == [word(77, 3, index) < 2**31 for index in last]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC: apt-get install g++")
def test_every_instruction_set_has_the_same_words(tmp_path):
    """Those that this processor has; the others share their source with one of them, or are the portable loop."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    (tmp_path / "words.cpp").write_text(
        f"""#include "{csrc}/cpu/random_words.cpp"
#include <cstdio>
#include <initializer_list>
using namespace r_tsvm;
int main() {{
  int compared = 0;
  for (const uint64_t first : {{uint64_t{{0}}, uint64_t{{4}}, (uint64_t{{1}} << 34) - 200, (uint64_t{{1}} << 63)}}) {{
    for (const int64_t start : {{0, 12, 256}}) {{
      const RandomMask mask{{0, 0x9e3779b97f4a7c15u, 0xfffffffeu, first}};
      uint32_t expected[512] = {{}}, found[512];
      random_words_anywhere(mask, start, 300, expected);
      const auto compare = [&](auto run) {{
        run(mask, start, 300, found);
        for (int i = 0; i < 300; ++i) {{
          if (found[i] != expected[i]) return std::printf("word %d differs\\n", i), void();
        }}
        ++compared;
      }};
#if defined(RTSVM_SEVERAL_ISAS)
      if (__builtin_cpu_supports("x86-64-v4")) compare(v4::random_words);
      if (__builtin_cpu_supports("x86-64-v3")) compare(v3::random_words);
#endif
      compare(random_words);
    }}
  }}
  return compared >= 12 ? 0 : 1;
}}
""",
        encoding="utf-8",
    )
    command = ["g++", "-std=c++17", "-O3", f"-I{csrc / 'include'}", f"-I{csrc / 'cpu'}", "words.cpp", "-o", "words"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "words"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
