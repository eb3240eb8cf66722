"""What the documentation says of every op, from the ops' own descriptions: the reference, and what runs where."""

from __future__ import annotations

from r_tsvm_kernels import ops
from r_tsvm_kernels.dispatch import Op
from r_tsvm_kernels.dispatch import ops as every_op

TOPICS = (
    "Statistics of task vectors",
    "Selection by magnitude",
    "Sparse task vectors and elections",
    "Random masks",
    "Reweighting and pruning",
    "Products for tensor cores",
)


def _by_topic() -> dict[str, list[Op]]:
    topics = {topic: [op for op in every_op().values() if op.topic == topic] for topic in TOPICS}
    if unknown := {op.topic for op in every_op().values()} - topics.keys():
        raise ValueError(f"no place in the reference for the topic {', '.join(sorted(unknown))}")
    return topics


def reference() -> list[str]:
    """Return the entries of the reference: each op, then what else its folder exports."""
    lines = []
    others = [getattr(ops, name) for name in ops.__all__ if name not in every_op()]
    others = [item for item in others if hasattr(item, "__module__")]
    for topic, members in _by_topic().items():
        lines += [f"## {topic}", ""]
        for op in members:
            folder = op.__module__
            own = [item for item in others if f"{item.__module__}.".startswith(f"{folder}.")]
            for item in [op, *own]:
                lines += [f"::: {item.__module__}.{item.__name__}", ""]
    shared = [item for item in others if item.__module__.rpartition(".")[2] in ("_planes", "_steering")]
    for item in shared:
        lines += [f"::: {item.__module__}.{item.__name__}", ""]
    return lines[:-1]


def support() -> list[str]:
    """Return the table of what runs where, ops with the same backends in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for op in (op for members in _by_topic().values() for op in members):
        cpu = "C++, run and tested" if "cpu" in op.backends else "PyTorch, run and tested"
        cuda = "emulated and compiled" if "cuda" in op.backends else "none"
        triton = "interpreted and compiled" if "triton" in op.backends else "none"
        rows.setdefault((cpu, cuda, triton), []).append(f"`{op.name}`")
    table = [f"| {', '.join(names)} | {' | '.join(states)} |" for states, names in rows.items()]
    return ["| op | CPU | CUDA C++ | Triton |", "|---|---|---|---|", *table]


def operations() -> list[str]:
    """Return the table of all ops with the first sentence of their docstrings."""
    rows = []
    for op in (op for members in _by_topic().values() for op in members):
        summary = (op.__doc__ or "").splitlines()[0].replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{op.name}` | {summary} |")
    return ["| op | what it does |", "|---|---|", *rows]
