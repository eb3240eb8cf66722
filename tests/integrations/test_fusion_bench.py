"""FusionBench with our backend. It is not a dependency: `make test-integrations` runs this where it is installed."""

import importlib.util
import sys

import pytest
import torch
from compare import assert_as_accurate, same_bits

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import IntegrationError
from r_tsvm_kernels.integrations import fusion_bench as integration

pytestmark = pytest.mark.filterwarnings("ignore")  # FusionBench and lightning warn about many things of their own
ABSENT = importlib.util.find_spec("fusion_bench") is None
needs_fusion_bench = pytest.mark.skipif(ABSENT, reason="FusionBench is not installed: run make test-integrations")


@pytest.fixture
def accelerated():
    integration.install()
    yield
    integration.uninstall()


# --- absent or unexpected versions ---------------------------------------------------------------------


def test_absence_is_an_error_that_says_what_to_install(found_version, capsys):
    found_version(None)
    with pytest.raises(IntegrationError, match=r"pip install fusion-bench==0\.2\.33"):
        integration.MergeAlgorithm  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_name"):
        integration.no_such_name  # noqa: B018
    assert main(["fusion-bench", "method=rtsvm/rtsvm"]) == 2
    assert "fusion-bench is not installed" in capsys.readouterr().err


@needs_fusion_bench
def test_a_missing_function_is_an_error_and_changes_nothing(monkeypatch):
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    before = TSVM_utils.compute_and_sum_svd_mem_reduction
    monkeypatch.delattr(iso_utils, "iso_cts")
    with pytest.raises(IntegrationError, match=r"not built as expected .*iso_cts.*tested: 0\.2\.33"):
        integration.install()
    assert TSVM_utils.compute_and_sum_svd_mem_reduction is before


@needs_fusion_bench
def test_install_can_be_repeated_and_undone():
    from fusion_bench.method.dare import ties_merging as dare
    from fusion_bench.method.isotropic_merging import iso, iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils
    from fusion_bench.method.ties_merging import ties_merging_utils

    def state():
        return [
            *(TSVM_utils.compute_and_sum_svd_mem_reduction, iso_utils.iso_c, iso_utils.iso_cts, iso.iso_c, iso.iso_cts),
            *(ties_merging_utils.ties_merging, dare.ties_merging),
        ]

    before = state()
    for _ in range(2):
        integration.install()
        integration.install()
        assert all(new is not old for new, old in zip(state(), before, strict=True))
        integration.uninstall()
        integration.uninstall()
        assert all(new is old for new, old in zip(state(), before, strict=True))


@needs_fusion_bench
def test_a_module_imported_in_the_meantime_is_restored_too(accelerated, monkeypatch):
    import fusion_bench.method.isotropic_merging.iso_utils as utils

    late = type(sys)("fusion_bench.late")
    late.iso_c = utils.iso_c
    monkeypatch.setitem(sys.modules, late.__name__, late)
    integration.uninstall()
    assert late.iso_c is utils.iso_c and not hasattr(late.iso_c, "func")


# --- FusionBench's functions on our solvers ----------------------------------------------------------------------


def task_vectors(dtype=torch.float32, tasks=3):
    shapes = {"matrix": (40, 24), "wide": (17, 50), "excluded[0]": (12, 12), "bias": (31,), "conv": (4, 3, 2, 2)}
    return [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(tasks)]


def function(name):
    from fusion_bench.method.isotropic_merging import iso_utils
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    if name == "tsvm":
        return lambda v, **kw: TSVM_utils.compute_and_sum_svd_mem_reduction(v, accelerator="cpu", **kw)
    if name == "iso_c":
        return lambda v, **kw: iso_utils.iso_c(v, accelerator="cpu", **kw)
    return lambda v, **kw: iso_utils.iso_cts(v, common_space_fraction=0.7, accelerator="cpu", **kw)


def doubled(vectors):
    return [{name: tensor.double() for name, tensor in vector.items()} for vector in vectors]


@needs_fusion_bench
@pytest.mark.parametrize("tasks", [1, 3, 8])
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_results_are_as_accurate_as_fusion_benchs(method, tasks):
    vectors = task_vectors(tasks=tasks)
    exclude = ["excluded[0]"]
    exact, theirs = (function(method)(v, exclude_keys=exclude) for v in (doubled(vectors), vectors))
    before = integration.calls().get(method, 0)
    integration.install()
    ours = function(method)(vectors, exclude_keys=exclude)
    integration.uninstall()
    assert integration.calls()[method] == before + len(vectors[0])
    assert ours.keys() == theirs.keys()
    for name in exact:
        assert_as_accurate(ours[name], theirs[name], exact[name], what=name)


@needs_fusion_bench
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_half_precision_is_rounded_once(method):
    vectors = task_vectors(torch.bfloat16)
    exact = function(method)(doubled(vectors))
    integration.install()
    ours = function(method)(vectors)  # FusionBench's Iso-C and Iso-CTS fail: torch has no SVD in bfloat16
    integration.uninstall()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=1e-4 * float(exact[name].abs().max()))


@needs_fusion_bench
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts"])
def test_what_we_do_not_take_is_left_to_fusion_bench(method):
    vectors = doubled(task_vectors())
    expected = function(method)(vectors)
    before = integration.calls()
    integration.install()
    for name, tensor in function(method)(vectors).items():
        assert same_bits(tensor, expected[name])
    assert integration.calls() == before
    integration.uninstall()
    vectors = task_vectors()
    vectors[1]["bias"][3] = torch.inf
    expected = function(method)(vectors)["bias"]
    integration.install()
    torch.testing.assert_close(function(method)(vectors)["bias"], expected, rtol=0, atol=0, equal_nan=True)
    integration.uninstall()
    assert not expected.isfinite().all()


@needs_fusion_bench
def test_single_task_models_are_left_to_fusion_bench(accelerated):
    merged, single = function("tsvm")(task_vectors(), return_single_task_models=True)
    assert len(single) == 3 and single[0].keys() == merged.keys()


# --- TIES --------------------------------------------------------------------------------------------------------


def ties(rows, threshold, how):
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    return ties_merging(rows, reset_thresh=threshold, merge_func=how)


def both(rows, threshold, how):
    """FusionBench's TIES, and it with our backend; how often our kernel was called."""
    theirs, before = ties(rows, threshold, how), integration.calls().get("elect_and_sum", 0)
    integration.install()
    ours = ties(rows, threshold, how)
    integration.uninstall()
    return theirs, ours, integration.calls().get("elect_and_sum", 0) - before


@needs_fusion_bench
@pytest.mark.parametrize("how", ["sum", "mean", "dis-mean"])
@pytest.mark.parametrize("threshold", [20, 0.2, 1, 0.999, 0, 73.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_is_fusion_benchs(dtype, threshold, how):
    rows = torch.randn(3, 1009).to(dtype)
    if threshold == 1:
        rows = rows[:, :1000]
        with pytest.raises(RuntimeError):  # all elements: the smallest but one too many
            ties(rows, threshold, how)
        integration.install()
        with pytest.raises(RuntimeError):
            ties(rows, threshold, how)
        integration.uninstall()
        return
    theirs, ours, calls = both(rows, threshold, how)
    assert calls == 1 and ours.dtype == theirs.dtype and ours.count_nonzero()
    precision = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours, theirs, rtol=precision, atol=1e-6)


@needs_fusion_bench
@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("lean", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("tasks", [2, 4])
def test_ties_among_magnitudes_and_sums_of_zero_go_as_in_fusion_bench(tasks, lean, how):
    rows = torch.randint(-3, 4, (tasks, 5000)).float()
    if lean:
        rows[0, : int(5000 * abs(lean))] = 9 * lean / abs(lean)
    else:
        rows = torch.cat([rows, -rows], dim=1)  # as many positive as negative sums: no majority
    for threshold in (15, 60):
        theirs, ours, calls = both(rows, threshold, how)
        assert calls == 1 and int(((rows != 0).any(0) & (rows.sum(0) == 0)).sum()) > 100
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@needs_fusion_bench
def test_ties_that_we_do_not_take_is_left_to_fusion_bench():
    rows = torch.randn(3, 100)
    infinite = rows.clone()
    infinite[1, 5] = torch.inf
    for given, how in ((rows, "max"), (rows.double(), "sum"), (infinite, "sum")):
        theirs, ours, calls = both(given, 20, how)
        assert calls == 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    integration.install()
    assert ties(rows.requires_grad_(), 20, "sum").requires_grad
    with pytest.raises(ValueError, match="not defined"):
        ties(rows.detach(), 20, "median")
    integration.uninstall()
