"""Every backend of every op on the cases that the op lists, against the reference on the same device."""

from cases import check
from variants import every_backend

from r_tsvm_kernels.dispatch import ops


class TestTaskSpread:
    @every_backend(ops()["task_spread"], reference=False)
    def test_cases(self, backend):
        check(ops()["task_spread"], backend)
