"""Plugin for other libraries' own tests: `pytest -p with_backend` runs them with our backend installed.

RTSVM_BACKEND_IN names the library: mergekit, fusion_bench or peft.
"""

import os
from importlib import import_module

integration = import_module(f"r_tsvm_kernels.integrations.{os.environ['RTSVM_BACKEND_IN']}")


def pytest_configure(config):
    integration.install()


def pytest_terminal_summary(terminalreporter):
    calls = ", ".join(f"{name} {number}" for name, number in sorted(integration.calls().items()))
    terminalreporter.write_line(f"calls of our kernels and methods: {calls or 'none'}")


def pytest_unconfigure(config):
    integration.uninstall()
