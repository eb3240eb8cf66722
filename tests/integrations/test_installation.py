"""What all integrations share: versions, patches and fallbacks."""

import importlib
import importlib.util
import types
import warnings

import pytest

from r_tsvm_kernels.errors import ConvergenceError, IntegrationError, NonFiniteError
from r_tsvm_kernels.integrations.installation import Installation, Replacements, falling_back

TESTED = {"mergekit": "0.1.5", "fusion_bench": "0.2.33", "peft": "0.21.2", "sd_mecha": "1.1.8"}
HOSTS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is absent"))
    for name in TESTED
]


def integration(name):
    return importlib.import_module(f"r_tsvm_kernels.integrations.{name}")


# --- the hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TESTED)
def test_absence_is_an_error_that_says_what_to_install(found_version, name):
    found_version(None)
    with pytest.raises(IntegrationError, match=rf"pip install {name.replace('_', '-')}=={TESTED[name]}$"):
        integration(name).install()
    integration(name).uninstall()  # there is nothing to undo


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.filterwarnings("ignore")  # hosts warn about many things of their own
def test_an_untested_version_warns_once(found_version, name):
    found_version("9.9.9")
    message = f"{name.replace('_', '-')} 9.9.9 was never tested with r_tsvm_kernels; tested: {TESTED[name]}"
    try:
        with pytest.warns(RuntimeWarning) as caught:
            integration(name).install()
        assert [w.filename for w in caught if str(w.message) == message] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            integration(name).install()
    finally:
        integration(name).uninstall()


# --- the mechanism -------------------------------------------------------------------------------------------------


def host():
    return types.SimpleNamespace(double=lambda x: 2 * x, triple=lambda x: 3 * x)


def replace_with(value):
    return lambda original: lambda x: value


def installation_of(owner, names=("double", "triple")):
    def patch(value):
        return Replacements([(owner, name, replace_with(value)) for name in names])

    return Installation("host", ["1.0"], patch)


def test_an_installation_is_repeated_changed_and_undone(found_version):
    found_version("1.0")
    owner = host()
    before = vars(owner).copy()
    installed = installation_of(owner)
    installed.install(7)
    first = vars(owner).copy()
    assert owner.double(1) == owner.triple(1) == 7
    installed.install(7)
    assert vars(owner) == first
    installed.install(8)
    assert owner.double(1) == owner.triple(1) == 8
    for _ in range(2):
        installed.uninstall()
        assert vars(owner) == before


def test_a_host_that_lacks_something_is_left_as_it_is(found_version):
    found_version("1.1")
    owner = host()
    before = vars(owner).copy()
    with (
        pytest.warns(RuntimeWarning, match=r"host 1\.1 was never tested"),
        pytest.raises(IntegrationError, match=r"host 1\.1 is not built as expected .*absent.*; tested: 1\.0; run: pip"),
    ):
        installation_of(owner, ("double", "absent")).install(7)
    assert vars(owner) == before


def test_calls_are_counted():
    installed = installation_of(host())
    assert installed.calls() == {}
    for name in ("ties", "dare", "ties"):
        installed.count(name)
    assert installed.calls() == {"ties": 2, "dare": 1}


def test_what_we_do_not_take_is_left_to_the_host():
    left = []

    def ours(x):
        if x == 3:
            raise NonFiniteError("infinite")
        if x == 4:
            raise ConvergenceError("no")
        return None if x == 2 else 10 * x

    run = falling_back(ours, left=lambda: left.append(1))(host().double)
    assert [run(1), run(2), run(3), len(left)] == [10, 4, 6, 2]
    with pytest.raises(ConvergenceError):
        run(4)
    assert falling_back(ours, (NonFiniteError, ConvergenceError))(host().double)(4) == 8
