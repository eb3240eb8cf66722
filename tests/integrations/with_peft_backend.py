"""Plugin for PEFT's own tests: `pytest -p with_peft_backend` runs them with our backend installed."""

from r_tsvm_kernels.integrations import peft


def pytest_configure(config):
    peft.install()


def pytest_terminal_summary(terminalreporter):
    calls = ", ".join(f"{name} {number}" for name, number in sorted(peft.calls().items()))
    terminalreporter.write_line(f"layers by our backend: {calls or 'none'}")


def pytest_unconfigure(config):
    peft.uninstall()
