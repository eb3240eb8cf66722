import math

import pytest
import torch
from cases import check, check_on_another_stream
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_magnitude_ranks import shapes
from test_random_mask import word
from variants import (
    DTYPES,
    LAYOUTS,
    VALUES,
    every_backend,
    every_dtype,
    every_model_shape,
    large,
    layout_names,
    on_devices,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import (
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    magnitude_ranks,
    ranked_mask,
)
from r_tsvm_kernels.ops.ranked_mask.cases import TABLES, table

native_backend = some_backends(ranked_mask, "cpu")


@every_backend(ranked_mask, reference=False)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(VALUES)),
    chances=st.sampled_from(TABLES),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    layouts=st.lists(layout_names, min_size=2, max_size=2),
    with_base=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_equals_the_reference(backend, data, kind, chances, dtypes, layouts, with_base, seed):
    torch.manual_seed(seed % 1000)
    shape = data.draw(shapes(backend))
    base = torch.randn(shape) if with_base and "subnormal" not in kind else torch.zeros(shape)
    x = LAYOUTS[layouts[0]]((base + VALUES[kind](shape)).to(dtypes[0]))
    base = LAYOUTS[layouts[1]](base.to(dtypes[1])) if with_base else None
    probabilities = table(shape[-1], chances, seed % 1000)
    got = ranked_mask(x, probabilities, seed=seed, substream=seed % 2**32, base=base, backend=backend)
    assert got.is_contiguous()
    assert same_bits(got, ranked_mask(x, probabilities, seed=seed, substream=seed % 2**32, base=base, backend="torch"))


@native_backend
@pytest.mark.parametrize("chances", TABLES[:4])
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "ties", "mostly zero", "all equal"])
@pytest.mark.parametrize("cols", [257, 4096, 14336])
def test_long_rows(backend, cols, kind, chances):
    x, probabilities = VALUES[kind]((5, cols)), table(cols, chances)
    got = ranked_mask(x, probabilities, seed=11, substream=3, backend=backend)
    assert same_bits(got, ranked_mask(x, probabilities, seed=11, substream=3, backend="torch"))


@every_backend(ranked_mask)
@every_dtype
def test_is_the_mask_of_ranked_keep(backend, dtype):
    base = torch.randn(31, 301).to(dtype)
    x = (base.double() + 0.01 * torch.randn(31, 301)).to(dtype)
    probabilities = della_probabilities(301, 0.3, 0.2)
    ranked = RankedSparsifier(magnitude_ranks(x, base=base), probabilities, rescale=False)
    mask = ranked_mask(x, probabilities, seed=5, substream=1, base=base, backend=backend)
    by_ranks = elect_and_sum(base, [x], [1.0], sparsifiers=[Sparsifier(ranked=ranked, seed=5, substream=1)])
    assert same_bits(elect_and_sum(base, [x], [1.0], sparsifiers=[Sparsifier(mask=mask)]), by_ranks)


@every_backend(ranked_mask)
def test_each_rank_survives_as_often_as_its_probability_says(backend):
    rows, probabilities = 300 if simulated(backend) else 20_000, della_probabilities(5, 0.5, 0.4)
    x = torch.tensor([3.0, -1.0, 0.5, 8.0, 0.0]).expand(rows, 5)
    share = ranked_mask(x, probabilities, seed=1, backend=backend).double().mean(0).cpu()
    expected = probabilities[[3, 2, 1, 4, 0]]
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()).all()


@native_backend
@pytest.mark.parametrize("shape", [(300, 1001), (100_000, 3), (2, 70_001), (299, 65)], ids=str)
def test_number_of_threads_does_not_matter(backend, shape):
    x, probabilities = torch.randn(shape).bfloat16(), della_probabilities(shape[1], 0.5, 0.3)
    expected = ranked_mask(x, probabilities, seed=9, backend="torch")
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert same_bits(ranked_mask(x, probabilities, seed=9, backend=backend), expected)


@every_backend(ranked_mask)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,), (1, 1)], ids=str)
def test_nothing_and_single_elements(backend, shape):
    mask = ranked_mask(
        torch.ones(shape), torch.ones(shape[-1], dtype=torch.float64, device="cpu"), seed=0, backend=backend
    )
    assert same_bits(mask, torch.ones(shape, dtype=torch.bool))


@every_backend(ranked_mask)
@pytest.mark.parametrize("cols", [4, 300])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, cols, bad):
    x, probabilities = torch.ones(3, cols), della_probabilities(cols, 0.5, 0.1)
    x[1, 2] = x[2, 0] = bad
    for tensor, base in ((x, None), (torch.zeros(3, cols), x)):
        with pytest.raises(NonFiniteError, match=f"2 of {3 * cols}"):
            ranked_mask(tensor, probabilities, seed=0, base=base, backend=backend)


def test_what_it_refuses():
    x, p = torch.ones(2, 4), della_probabilities(4, 0.5, 0.1)
    for wrong in (p[:3], p[None], torch.ones((), dtype=torch.float64)):
        with pytest.raises(ShapeError, match="one probability per column"):
            ranked_mask(x, wrong, seed=0)
    with pytest.raises(ShapeError, match="rows of less"):
        ranked_mask(torch.tensor(1.0), p, seed=0)
    with pytest.raises(DTypeError, match="int64"):
        ranked_mask(x.long(), p, seed=0)
    with pytest.raises(DTypeError, match="must be float64"):
        ranked_mask(x, p.float(), seed=0)
    for wrong in (p + 1, p - 1, p * math.nan):
        with pytest.raises(ConfigError, match=r"ranked_mask: .*\[0, 1\]"):
            ranked_mask(x, wrong, seed=0)
    with pytest.raises(ConfigError, match=r"\.cpu\(\)"):
        ranked_mask(x, p.to("meta"), seed=0)
    with pytest.raises(ConfigError, match="ranked_mask: seed"):
        ranked_mask(x, p, seed=-1)
    with pytest.raises(ConfigError, match="ranked_mask: substream"):
        ranked_mask(x, p, seed=0, substream=2**32)
    with pytest.raises(ShapeError):
        ranked_mask(x, p, seed=0, base=torch.ones(4, 2))
    with pytest.raises(BackendUnavailableError, match="ranked_mask"):
        ranked_mask(x, p, seed=0, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native, x = backends.native(backend), (0, 1, 4, 4, 1)
    for cols in (0, 3):
        with pytest.raises(RuntimeError, match="ranked_mask: not whole rows"):
            native.ranked_mask(x, None, (0, cols), (0, 0), (0, 0), 1)
    with pytest.raises(RuntimeError, match="ranked_mask: the tensors differ in size"):
        native.ranked_mask(x, (0, 1, 5, 5, 1), (0, 4), (0, 0), (0, 0), 1)


@every_backend(ranked_mask, reference=False)
def test_cases(backend):
    check(ranked_mask, backend)


@on_devices(ranked_mask)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base, x = 0.02 * torch.randn(shape), 1e-3 * torch.randn(shape)
    base, x = base.to(dtype), (base + x).to(dtype)
    chances, drawn = della_probabilities(shape[-1], 0.4, 0.3), {"seed": 2**40 + 5, "substream": 3}
    for origin in (None, base):
        masks = (ranked_mask(x, chances, **drawn, base=origin, backend=which) for which in (backend, "torch"))
        assert same_bits(*masks)


@on_devices(ranked_mask)
def test_on_another_stream(backend):
    chances = della_probabilities(300, 0.4, 0.3)
    check_on_another_stream(
        ranked_mask, backend, lambda base, x, which: ranked_mask(x, chances, seed=5, base=base, backend=which)
    )


@large
@on_devices(ranked_mask)
def test_more_elements_than_a_32_bit_index_counts(backend):
    rows, chances = 2**19 + 1, della_probabilities(4096, 0.5, 0.5)
    base, x = torch.zeros(2, rows, 4096, dtype=torch.bfloat16).unbind()
    x[-1] = torch.randn(4096)
    got = ranked_mask(x, chances, seed=77, substream=3, base=base, backend=backend)[-1, -9:]
    own = chances[magnitude_ranks(x[-1:].cpu())[0, -9:].long()].tolist()
    words = [word(77, 3, index) for index in range(rows * 4096 - 9, rows * 4096)]
    assert got.tolist() == [w < round(chance * 2**32) for w, chance in zip(words, own, strict=True)]
