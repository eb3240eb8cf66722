"""Which version of another library seems to be installed."""

import pytest

from r_tsvm_kernels.integrations import installation


@pytest.fixture
def found_version(monkeypatch):
    """A function that sets the version that is found of every library; None: there is none."""

    def find(answer):
        def version(name):
            if answer is None:
                raise installation.PackageNotFoundError(name)
            return answer

        monkeypatch.setattr(installation, "version", version)

    installation._warn_once.cache_clear()
    yield find
    installation._warn_once.cache_clear()
