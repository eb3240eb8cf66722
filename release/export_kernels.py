"""Export `ops` and `linalg` as a kernel for the Hugging Face hub, which needs torch, NumPy and, on GPUs, triton alone.

    python release/export_kernels.py OUT [--repository USER/NAME]

OUT gets the layout that the library `kernels` loads: ``build/torch-cpu``, ``torch-cuda`` and ``torch-rocm``, all with
the same Python files. Each holds the package with relative imports only, so that several versions can be loaded
beside each other. Left out are the native modules, everything that reads or writes checkpoints, and the
self-checks: on a GPU an op runs in torch, unless its call or `use_backend` names ``triton``.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "r_tsvm_kernels"
NAME = PACKAGE.name
WANTED = ("ops", "linalg")
# Loaded by name only: `dispatch` looks for them in the folder of the op.
BY_NAME = ("reference.py", "triton_kernel.py")
# What may be imported beside torch and the standard library; those of `ON_DEMAND` by functions that never run here.
ALLOWED = {"torch", "triton", "numpy"}
ON_DEMAND = {"verdicts/store.py": {"filelock", "pydantic"}}
VARIANTS = {
    "torch-cpu": {"type": "cpu"},
    "torch-cuda": {"type": "cuda", "archs": ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]},
    "torch-rocm": {"type": "rocm", "archs": ["gfx90a", "gfx942"]},
}
INIT = '''"""Fast, exact kernels for merging models: operations on tensors (`ops`) and spectral merges (`linalg`)."""

__version__ = "{version}"

from . import errors, linalg, ops
from .dispatch import use_backend

__all__ = ["__version__", "errors", "linalg", "ops", "use_backend"]
'''
OUTER = f'''"""See `{NAME}` beside this file: the loader gives this package a name of its own."""

from .{NAME} import __version__, errors, linalg, ops, use_backend

__all__ = ["__version__", "errors", "linalg", "ops", "use_backend"]
'''
CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernels, model merging]
---
# {name}

Kernels for merging fine-tuned models: operations on tensors (`ops`) and spectral merges (`linalg`), from
r_tsvm_kernels {version}.

```python
import torch
from kernels import get_kernel

kernel = get_kernel("{repository}", version=0, trust_remote_code=True)
base = torch.randn(512, 512)
tasks = [0.01 * torch.randn(512, 512) for _ in range(3)]
merged = base + kernel.linalg.tsv_merge(tasks, [64] * 3).matrix
```

Everything runs in PyTorch. Kernels in Triton are used on a GPU where a call (`backend="triton"`) or
`kernel.use_backend("triton")` names them: no GPU kernel of this package has run on a GPU yet. Python 3.10 and NumPy are
needed.
"""


def closure() -> list[Path]:
    """Return the files of the package that `WANTED` needs, relative to it.

    Raises:
        SystemExit: one imports what is not allowed.
    """
    todo = [PACKAGE / name / "__init__.py" for name in WANTED]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        if path.name == "__init__.py" and path.parent.parent.name == "ops":
            todo += [file for name in BY_NAME if (file := path.with_name(name)).is_file()]
        for line, module in imported(path):
            if isinstance(module, Path):
                todo.append(module)
            elif module not in sys.stdlib_module_names and module not in allowed(path):
                raise SystemExit(f"{path}:{line}: imports {module}; the export may only import {sorted(ALLOWED)}")
    found |= {path.parent / "__init__.py" for path in found} - {PACKAGE / "__init__.py"}
    return sorted(path.relative_to(PACKAGE) for path in found if path.is_file())


def allowed(path: Path) -> set[str]:
    """Return the libraries that a file may import."""
    return ALLOWED | ON_DEMAND.get(path.relative_to(PACKAGE).as_posix(), set())


def imported(path: Path) -> list[tuple[int, Path | str]]:
    """Return what a file imports, with the line: files of the package, and names of other modules.

    Imports for type checkers count only where the package imports itself: they are not run.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found: list[tuple[int, Path | str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.lineno, str(node.module).partition(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split("."))
            names = [base, *(base / alias.name for alias in node.names)]
            found += [(node.lineno, file) for name in names if (file := file_of(name)) is not None]
    return found


def file_of(module: Path) -> Path | None:
    """Return the file of a module of the package; None if it is a name inside one, or the package itself."""
    for file in (module.with_suffix(".py"), module / "__init__.py"):
        if file.is_file() and file != PACKAGE / "__init__.py":
            return file
    return None


def version() -> str:
    """Return the version of the package."""
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return str(next(line.split('"')[1] for line in text.splitlines() if line.startswith("__version__")))


def commit() -> str:
    """Return the short hash of the commit of this tree; ``unknown`` outside of a checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(out: Path, repository: str) -> None:
    """Write the kernel into a folder that does not exist yet."""
    files = closure()
    for variant, backend in VARIANTS.items():
        folder = out / "build" / variant
        for file in files:
            (folder / NAME / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / file, folder / NAME / file)
        (folder / NAME / "__init__.py").write_text(INIT.format(version=version()), encoding="utf-8")
        (folder / "__init__.py").write_text(OUTER, encoding="utf-8")
        (folder / "metadata.json").write_text(json.dumps(metadata(folder, backend), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    card = CARD.format(name=NAME, version=version(), repository=repository)
    (out / "README.md").write_text(card, encoding="utf-8")


def metadata(folder: Path, backend: dict[str, object]) -> dict[str, object]:
    """Return the description of a variant; version 0 stands for alpha."""
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*.py"))
    }
    return {
        "name": NAME.replace("_", "-"),
        "id": f"_{NAME}_{backend['type']}_{commit()}",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": digests},
    }


def main() -> None:
    """Export into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the kernel; must not exist yet")
    parser.add_argument("--repository", default=f"USER/{NAME}", help="where it will be on the hub, for its card")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it or choose another folder")
    write(arguments.out, arguments.repository)
    print(f"{len(closure())} files, {len(VARIANTS)} variants: {arguments.out}")


if __name__ == "__main__":
    main()
