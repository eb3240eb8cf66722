"""The shards of an output, all on disk at their full size from the start."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor

from ..checkpoint import Checkpoint, ShardFile, ShardLayout, write_index
from ..errors import CheckpointError, DiskFullError
from ..plan import MergePlan
from ..system import SHARED_BLOCK, allocated


def layouts(plan: MergePlan) -> list[ShardLayout]:
    """Return the layout of every shard of a plan."""
    specs = plan.specs
    if plan.decomposed:
        return [
            ShardLayout(file, {name: specs[name] for name in names}, f"{file.removesuffix('.safetensors')}/")
            for file, names in plan.shards.items()
        ]
    return [
        ShardLayout(
            file,
            {name: specs[name] for name in names},
            plan.base.module(names[0]).prefix if names else "",  # some modules have a file without tensors
            plan.base.metadata(names),
            _begin(plan, names),
        )
        for file, names in plan.shards.items()
    ]


def _begin(plan: MergePlan, names: Sequence[str]) -> int | None:
    """Return where the first tensor of a shard must begin for the most bytes to be shared with the files of inputs.

    A file system that shares blocks needs the same offset within a block in both files (`copy_at`).
    """
    found: Counter[int] = Counter()
    end = 0
    for name in names:
        source, size = plan.copied_from(name) if name in plan.tensors else None, plan.specs[name].nbytes
        place = None if source is None else source.place(name)
        if place is not None and size >= 2 * SHARED_BLOCK:
            found[(place - end) % SHARED_BLOCK] += size
        end += size
    begin = max(found, key=lambda begin: (found[begin], -begin), default=None)
    return None if begin is None or begin % 8 else begin


def write_indexes(folder: Path, layouts: list[ShardLayout]) -> None:
    """Write the index of every folder below `folder` that has several shards."""
    groups: dict[PurePosixPath, list[ShardLayout]] = {}
    for layout in layouts:
        groups.setdefault(PurePosixPath(layout.file_name).parent, []).append(layout)
    for place, group in groups.items():
        if len(group) > 1:
            files = {name: PurePosixPath(x.file_name).name for x in group for name in x.stored_names.values()}
            specs = {x.stored_names[name]: spec for x in group for name, spec in x.specs.items()}
            stem = next(iter(files.values())).rsplit("-", 3)[0]
            write_index(folder / place / f"{stem}.safetensors.index.json", specs, files)


class Shards:
    """Open shards. Tensors are written in any order, by any thread.

    Args:
        folder: folder of the shards.
        layouts: layouts of all shards.
        create: create shards that are missing or do not match their layout; values of their tensors are undefined.

    Raises:
        DiskFullError: there is no space for all shards.
        CheckpointError: writing failed; or, without `create`, a shard is missing or does not match its layout.
    """

    def __init__(self, folder: Path, layouts: list[ShardLayout], *, create: bool = False) -> None:
        if create:
            _check_space(folder, layouts)
        self._files: dict[str, ShardFile] = {}
        self._file_of: dict[str, ShardFile] = {}
        self._unsynced: set[str] = set()
        try:
            for layout in layouts:
                if create:
                    (folder / layout.file_name).parent.mkdir(parents=True, exist_ok=True)
                file = (_open_or_create if create else ShardFile.open)(folder / layout.file_name, layout)
                self._files[layout.file_name] = file
                self._file_of.update(dict.fromkeys(layout.specs, file))
        except BaseException:
            self.close()
            raise

    def layout(self, name: str) -> ShardLayout:
        """Return the layout of the shard that holds a tensor."""
        return self._file_of[name].layout

    def write(self, name: str, tensor: Tensor, first_row: int | None = None) -> None:
        """Write a tensor, or its rows from `first_row` on.

        Raises:
            DiskFullError, CheckpointError: writing failed.
        """
        file = self._file_of[name]
        file.write(name, tensor, first_row)
        self._unsynced.add(file.layout.file_name)

    def copy(self, name: str, source: Checkpoint, rows: tuple[int, int] | None) -> bool:
        """Copy a tensor, or rows of it, from the file of a checkpoint; return whether that is possible.

        Raises:
            InputChangedError, CheckpointError: the source cannot be read, or has changed.
            DiskFullError, CheckpointError: writing failed.
        """
        file, first = self._file_of[name], None if rows is None else rows[0]
        done = source.copy_rows(name, rows, lambda opened, offset, count: file.copy(name, opened, offset, count, first))
        if done:
            self._unsynced.add(file.layout.file_name)
        return done

    def checksum(self, name: str) -> str:
        """Return the checksum of the bytes on disk of a tensor."""
        return self._file_of[name].read_checksum(name)

    def sync(self) -> None:
        """Put everything written so far safely on disk.

        Raises:
            DiskFullError, CheckpointError: writing failed.
        """
        while self._unsynced:
            self._files[self._unsynced.pop()].sync()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


def _open_or_create(path: Path, layout: ShardLayout) -> ShardFile:
    try:
        return ShardFile.open(path, layout)
    except CheckpointError:
        path.unlink(missing_ok=True)
        return ShardFile.create(path, layout)


def _check_space(folder: Path, layouts: list[ShardLayout]) -> None:
    """Raise `DiskFullError` unless the disk has space for the shards."""
    here = [folder / layout.file_name for layout in layouts]
    reserved = sum(allocated(file.stat()) for file in here if file.exists())
    needed = sum(layout.size for layout in layouts) - reserved
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{folder}: {needed:,} more bytes are needed and {free:,} are free; make room, or choose another disk"
        )
