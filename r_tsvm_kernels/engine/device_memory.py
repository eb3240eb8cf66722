"""Keep the promise of `--device-memory`, which counts what the driver counts: context, libraries, caches, tensors.

Torch keeps what it has reserved for later tensors, apart for each stream. It gives back what is unused before it
exceeds a limit of its own; here this limit is the budget without the context, whose memory torch does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import MemoryBudgetError
from ..plan import MergePlan
from ..sizes import format_size
from ..text import some
from .scheduling import CONTEXT_BYTES, Schedule, smallest_schedule


@contextmanager
def within_budget(device: torch.device, schedule: Schedule) -> Iterator[None]:
    """Limit what torch reserves on a GPU inside a ``with`` block, if the schedule has a limit.

    Args:
        device: that merges; on a CPU nothing happens.
        schedule: of the merge.

    Raises:
        MemoryBudgetError: tensors that the process holds already leave too little; the message names the smallest
            budget.
    """
    if device.type != "cuda" or schedule.device_limit is None:
        yield
        return
    torch.cuda.empty_cache()
    held, total = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    # Workspaces of libraries stay after an earlier merge, and are used again.
    others = max(0, held - (schedule.device_program_bytes - CONTEXT_BYTES))
    if (smallest := schedule.peak_device_bytes + others) > schedule.device_limit:
        raise MemoryBudgetError(
            f"this process holds {format_size(held)} on {device} already: the merge needs a device memory budget of at "
            f"least {format_size(smallest)} ({smallest} bytes), got {format_size(schedule.device_limit)}; free the "
            "tensors, or raise the budget"
        )
    # Versions of torch before 2.8 cannot tell; only what has set a fraction itself sees a difference.
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    allowed = schedule.device_limit - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, before), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def out_of_memory(
    plan: MergePlan, names: Sequence[str], device: torch.device, schedule: Schedule, error: Exception
) -> MemoryBudgetError:
    """Return the error for tensors that a GPU had no memory for although nothing else was merged.

    Args:
        plan: the merge.
        names: of the tensors, which are merged together.
        device: the GPU.
        schedule: of the merge.
        error: what torch said.
    """
    smallest, limit = smallest_schedule(plan, on_gpu=True), schedule.device_limit
    free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    had = free + held + smallest.device_program_bytes if limit is None else limit
    needed = smallest.peak_device_bytes
    if had >= needed:  # the estimate was too low
        needed = had + (had >> 3)
    advice = ["raise --device-memory"] if limit is not None else []
    advice += ["end other programs on the GPU"] if free + held + smallest.device_program_bytes < needed else []
    advice += ["set a smaller `workspace` in the recipe"] if len(names) > 1 else []
    return MemoryBudgetError(
        f"{some(names)}: {device} is out of memory, with nothing else merged on it: {format_size(free)} are free, and "
        f"the merge needs by estimate a device memory budget of at least {format_size(needed)} ({needed} bytes)"
        f"{'' if limit is None else f', got {format_size(limit)}'}; {', '.join([*advice, 'or use --device cpu'])} "
        f"({str(error).partition(chr(10))[0]})"
    )
