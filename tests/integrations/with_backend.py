"""Plugin for mergekit's own tests: `pytest -p with_backend` runs them with our backend installed."""

from r_tsvm_kernels.integrations import mergekit


def pytest_configure(config):
    mergekit.install()


def pytest_terminal_summary(terminalreporter):
    calls = ", ".join(f"{name} {number}" for name, number in sorted(mergekit.calls().items()))
    terminalreporter.write_line(f"calls of our kernels and methods: {calls or 'none'}")


def pytest_unconfigure(config):
    mergekit.uninstall()
