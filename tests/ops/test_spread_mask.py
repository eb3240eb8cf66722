import pytest
import torch
from cases import check
from hypothesis import given
from hypothesis import strategies as st
from variants import every_backend, group, laid_out_groups, some_backends, torch_threads

from r_tsvm_kernels.errors import ShapeError
from r_tsvm_kernels.ops import MagnitudeSelection, spread_mask, spread_select, task_spread

native_backend = some_backends(spread_mask, "cpu")


@every_backend(spread_mask, reference=False)
def test_cases(backend):
    check(spread_mask, backend)


@every_backend(spread_mask)
@given(models=laid_out_groups(), share=st.floats(0, 1), threads=st.integers(1, 3))
def test_is_the_mask_of_the_spread(backend, models, share, threads):
    base, tuned = models
    kept = []

    def keep(differing):
        kept.append(int(share * differing))
        return kept[0]

    selection = spread_select(base, tuned, keep)
    with torch_threads(threads):
        mask = spread_mask(base, tuned, selection, backend=backend)
    assert mask.dtype == torch.bool and mask.is_contiguous() and int(mask.sum()) == kept[0]
    assert mask.equal(selection.mask(task_spread(base, tuned)))


@native_backend
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ties", [0, 1, 32767, 32768, 40000, 100000, 10**9])
def test_the_first_ties_of_many_chunks_are_selected(backend, threads, ties):
    # The native kernel marks chunks of 32768 elements side by side, and settles their ties afterwards.
    base = torch.zeros(431, 433)
    tuned = [torch.ones_like(base), -torch.ones_like(base)]
    tuned[0].view(-1)[::5] = 2.0  # above the threshold
    tuned[0].view(-1)[1::5] = 0.0  # below it
    selection = MagnitudeSelection(torch.tensor(2.0, dtype=torch.float64), torch.tensor(ties))
    with torch_threads(threads):
        mask = spread_mask(base, tuned, selection, backend=backend).flatten()
    spread = task_spread(base, tuned).flatten()
    tied = (spread == 2).nonzero()[:, 0]
    assert 0 < len(tied) < len(spread)
    wanted = spread > 2
    wanted[tied[:ties]] = True
    assert mask.equal(wanted)


@every_backend(spread_mask)
def test_refuses_tensors_that_do_not_match(backend):
    base, tuned = group((6, 7), [torch.float32] * 3)
    selection = spread_select(base, tuned, lambda differing: differing)
    with pytest.raises(ShapeError, match="spread_mask"):
        spread_mask(base, [tuned[0], tuned[1][:3]], selection, backend=backend)
