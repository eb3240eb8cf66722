from importlib import import_module

import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, available, layout_names

from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.ops import elect_and_sum, elect_and_sum_many

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@every_backend
@given(
    shapes=st.lists(SHAPES, max_size=6),
    signatures=st.lists(st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3), min_size=1, max_size=2),
    layout=layout_names,
    elect=st.sampled_from(["none", "sum", "count"]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_one_call_each(backend, shapes, signatures, layout, elect, normalize, seed):
    torch.manual_seed(seed)
    groups = []
    for index, shape in enumerate(shapes):
        base, *tuned = (torch.randn(shape).to(dtype) for dtype in signatures[index % len(signatures)])
        base.view(-1)[:1] = -0.0
        groups.append((LAYOUTS[layout](base) if shape else base, [base.clone(), *tuned]))
    options = {"elect": elect, "normalize": normalize, "alpha": 0.7, "backend": backend}
    got = elect_and_sum_many(groups, [1.0, 0.5, 2.0], **options)
    assert len(got) == len(groups)
    for mine, (base, tuned) in zip(got, groups, strict=True):
        assert mine.is_contiguous()
        assert same_bits(mine, elect_and_sum(base, tuned, [1.0, 0.5, 2.0], **options))


def test_one_call_per_signature_of_dtypes(monkeypatch):
    calls = []

    def counted(base, *arguments, **options):
        calls.append(base.dtype)
        return elect_and_sum(base, *arguments, **options)

    monkeypatch.setattr(import_module("r_tsvm_kernels.ops.elect_and_sum.many"), "elect_and_sum", counted)
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    elect_and_sum_many([(torch.ones(3, dtype=d), [torch.ones(3, dtype=d)]) for d in dtypes], [1.0])
    assert calls == [torch.float32, torch.bfloat16]


def test_what_it_refuses():
    x = torch.ones(3)
    with pytest.raises(ShapeError, match=r"elect_and_sum_many: tuned\[1\]"):
        elect_and_sum_many([(x, [x, x]), (x, [x, torch.ones(4)])], [1.0, 1.0])
    with pytest.raises(ShapeError, match="at least one"):
        elect_and_sum_many([(x, [])], [])
    with pytest.raises(DTypeError, match="elect_and_sum_many"):
        elect_and_sum_many([(x, [x.int()])], [1.0])
    with pytest.raises(ConfigError, match="2 tasks but 1 numbers"):
        elect_and_sum_many([(x, [x]), (x, [x, x])], [1.0])
    with pytest.raises(ConfigError, match="none, sum, count, unweighted"):
        elect_and_sum_many([(x, [x])], [1.0], elect="total")
    with pytest.raises(BackendUnavailableError, match="elect_and_sum"):
        elect_and_sum_many([(x, [x])], [1.0], backend="abacus")
