"""The CUDA and Triton kernels on a GPU: the bits of the references, sizes of real models, more than 2^31 elements."""

import pytest
import torch
from compare import relative_error, same_bits
from test_random_mask import word

from r_tsvm_kernels.ops import (
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
    random_mask,
    ranked_mask,
    task_gram,
    task_spread,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels on a GPU: needs a CUDA device"),
]

large = pytest.mark.xdist_group("large")  # one after the other: each takes tens of GB
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
SHAPES = [(1, 1), (3, 5), (129, 1031), (4096, 4096), (14336, 4096)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def group(shape, dtype, tasks=3):
    base = 0.02 * torch.randn(shape, device="cuda")
    return base.to(dtype), [(base + 1e-3 * torch.randn(shape, device="cuda")).to(dtype) for _ in range(tasks)]


equal = same_bits  # on the device: copying 60 million elements takes longer than the kernels


@every_backend
@every_shape
@every_dtype
def test_ranks(backend, shape, dtype):
    base, (x, *_) = group(shape, dtype)
    for origin in (None, base):
        assert equal(*(magnitude_ranks(x, base=origin, backend=which) for which in (backend, "torch")))


@every_backend
@every_shape
@every_dtype
@pytest.mark.parametrize("elect", ["none", "sum", "count", "unweighted"])
def test_merging(backend, shape, dtype, elect):
    base, tuned = group(shape, dtype)
    cols = shape[-1]
    rules = {
        "all": [Sparsifier()] * 3,
        "mask": [Sparsifier(mask=random_mask(shape, 0.3, seed=5, substream=t, device="cuda")) for t in range(3)],
        "ties": [Sparsifier(largest=magnitude_select(t, kept_count(0.3, t.numel()), base=base)) for t in tuned],
        "dare": [Sparsifier(keep_probability=0.3, rescale=1 / 0.3, seed=7, substream=t) for t in range(3)],
        "della": [
            Sparsifier(
                seed=7,
                substream=t,
                ranked=RankedSparsifier(magnitude_ranks(x, base=base), della_probabilities(cols, 0.4, 0.2)),
            )
            for t, x in enumerate(tuned)
        ],
    }
    if elect == "unweighted":
        del rules["della"]
    for keep in rules.values():
        options = {"elect": elect, "normalize": True, "alpha": 0.7, "sparsifiers": keep}
        assert equal(
            *(elect_and_sum(base, tuned, [1.0, 0.5, -2.0], backend=which, **options) for which in (backend, "torch"))
        )


@every_shape
@every_dtype
def test_masks_by_rank_and_coefficients(shape, dtype):
    base, tuned = group(shape, dtype, tasks=9)
    mask = random_mask(shape, 0.7, seed=5, device="cuda")
    for number in (1, 3, 9):
        for options in ({}, {"base": base, "mask": mask}):
            got, expected = (task_gram(tuned[:number], backend=which, **options) for which in ("triton", "torch"))
            assert relative_error(got, expected) < 1e-13 and equal(got, got.T)
            assert equal(got, task_gram(tuned[:number], backend="triton", **options))
        assert equal(*(task_spread(base, tuned[:number], backend=which) for which in ("triton", "torch")))
    chances, drawn = della_probabilities(shape[-1], 0.4, 0.3), {"seed": 2**40 + 5, "substream": 3}
    for origin in (None, base):
        assert equal(
            *(ranked_mask(tuned[0], chances, **drawn, base=origin, backend=which) for which in ("triton", "torch"))
        )


@every_backend
def test_masks_have_the_same_bits_everywhere(backend):
    mask = random_mask((4097, 1025), 0.3, seed=2**40 + 5, substream=3, device="cuda", backend=backend)
    assert torch.equal(mask.cpu(), random_mask((4097, 1025), 0.3, seed=2**40 + 5, substream=3, backend="torch"))


@large
@every_backend
def test_more_elements_than_a_32_bit_index_counts(backend):
    numel = 2**31 + 5003
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    selection = magnitude_select(x, 2, backend=backend)
    merged = elect_and_sum(
        torch.zeros_like(x), [x], [1.0], sparsifiers=[Sparsifier(largest=selection)], backend=backend
    )
    assert merged[-3:].tolist() == [0.0, -2.0, 3.0] and not merged[:-3].any()


@large
@every_backend
def test_more_elements_are_written_than_a_32_bit_index_counts(backend):
    numel = 2**31 + 5003
    mask = random_mask((numel,), 0.5, seed=77, substream=3, device="cuda", backend=backend)
    last = range(numel - 9, numel)
    assert mask[-9:].tolist() == [word(77, 3, index) < 2**31 for index in last]


@large
@every_backend
def test_more_elements_are_ranked_than_a_32_bit_index_counts(backend):
    x = torch.zeros(2**19 + 2, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(4096)
    ranks = magnitude_ranks(x, backend=backend)
    assert torch.equal(ranks[-2:], magnitude_ranks(x[-2:], backend="torch"))


@large
def test_more_elements_have_masks_and_coefficients_than_a_32_bit_index_counts():
    numel = 2**31 + 4096
    base = torch.zeros(numel // 4096, 4096, dtype=torch.bfloat16, device="cuda")
    x = base.clone()
    x[-1, -3:] = torch.tensor([1.0, -2.0, 3.0])
    mask = x != 1
    assert task_gram([x, base], base=base, mask=mask, backend="triton").tolist() == [[13.0, 0.0], [0.0, 0.0]]
    spread = task_spread(base, [x, base], backend="triton")
    assert spread[-1, -3:].tolist() == [0.5, 2.0, 4.5] and not spread[:-1].any()
    del mask, spread
    x[-1] = torch.randn(4096)
    probabilities = della_probabilities(4096, 0.5, 0.5)
    got = ranked_mask(x, probabilities, seed=77, substream=3, base=base, backend="triton")[-1, -9:]
    chances = probabilities[magnitude_ranks(x[-1:].cpu())[0, -9:].long()].tolist()
    words = [word(77, 3, index) for index in range(numel - 9, numel)]
    assert got.tolist() == [w < round(chance * 2**32) for w, chance in zip(words, chances, strict=True)]


@every_backend
def test_on_another_stream_and_in_other_layouts(backend):
    """The inputs are made late on that stream; nothing but the order on it makes the kernels wait for them."""
    shape = (300, 515)
    wide, (tuned, _, _) = group((shape[0], 2 * shape[1]), torch.bfloat16)
    probabilities = della_probabilities(shape[0], 0.4, 0.3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        base, x = (2 * t for t in (wide, tuned))
        base, x = base[:, ::2].mT, x[:, ::2].mT
        got = [
            magnitude_ranks(x, base=base, backend=backend),
            elect_and_sum(base, [x, x], [1.0, 2.0], elect="sum", backend=backend),
            task_spread(base, [x, base], backend="triton"),
            ranked_mask(x, probabilities, seed=5, base=base, backend="triton"),
            task_gram([x, 2 * x], base=base, mask=x > 0, backend="triton"),
        ]
    stream.synchronize()
    base, x = (2 * wide)[:, ::2].mT, (2 * tuned)[:, ::2].mT
    expected = [
        magnitude_ranks(x, base=base, backend="torch"),
        elect_and_sum(base, [x, x], [1.0, 2.0], elect="sum", backend="torch"),
        task_spread(base, [x, base], backend="torch"),
        ranked_mask(x, probabilities, seed=5, base=base, backend="torch"),
    ]
    assert all(map(equal, got[:-1], expected))
    assert relative_error(got[-1], task_gram([x, 2 * x], base=base, mask=x > 0, backend="torch")) < 1e-13
