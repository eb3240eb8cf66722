"""Fixtures: an empty cache, checks in this process."""

import pytest
import simulated_device

from r_tsvm_kernels import verdicts
from r_tsvm_kernels.verdicts import children


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; verdicts count, and nothing is known yet."""
    monkeypatch.setenv("RTSVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RTSVM_SELFCHECK", "on")
    verdicts.forget()
    yield tmp_path / "cache" / "selfcheck"
    verdicts.forget()


@pytest.fixture
def checks(monkeypatch):
    """Checks run in this process; the list of what was checked."""
    done = []

    def run_checks(device, kernels, deadline=None, progress=None):
        done.append(kernels)
        return simulated_device.run_here(device, kernels)

    monkeypatch.setattr(children, "run_checks", run_checks)
    return done
