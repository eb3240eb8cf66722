"""Plugin for other libraries' own tests: `pytest -p with_backend` runs them with our backend installed.

RTSVM_BACKEND_IN names the library: mergekit (the default) or fusion_bench.
"""

import os

from r_tsvm_kernels.integrations import fusion_bench, mergekit

LIBRARIES = {
    "mergekit": (mergekit, mergekit.install, mergekit.uninstall),
    "fusion_bench": (fusion_bench, fusion_bench.accelerate, fusion_bench.restore),
}
integration, install, uninstall = LIBRARIES[os.environ.get("RTSVM_BACKEND_IN", "mergekit")]


def pytest_configure(config):
    install()


def pytest_terminal_summary(terminalreporter):
    calls = ", ".join(f"{name} {number}" for name, number in sorted(integration.calls().items()))
    terminalreporter.write_line(f"calls of our kernels and methods: {calls or 'none'}")


def pytest_unconfigure(config):
    uninstall()
