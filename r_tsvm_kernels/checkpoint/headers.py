"""Read headers of safetensors files and index files as untrusted data.

Every claim of a file is checked: lengths against its size, shapes against lengths, names for printable characters. No
allocation depends on a header alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, QuantisedRefusedError
from ..files import open_regular
from .checksums import checksum

# Names in safetensors headers.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# Narrow formats of quantised checkpoints, which torch cannot compute with: F4, F6_E2M3, F8_E8M0, I4, ...
_NARROW = re.compile(r"[FIU][1-8](_E\d+M\d+[A-Z]*)?")

# The format's own limit on a header. The largest real ones have a few megabytes.
MAX_JSON_BYTES = 100_000_000
# Bounds the number of Python objects that parsing makes. A tensor takes about five commas in a header, one in an index.
MAX_JSON_COMMAS = 1_000_000
# The same for tokenizers: Gemma 3 has 262,144 tokens and 514,906 merges, each a list of two texts.
MAX_TOKENIZER_COMMAS = 4_000_000
_MERGES = re.compile(rb'"merges"\s*:\s*(?=\[)')
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]]', re.DOTALL)
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class TensorHeader:
    """Place, dtype and shape of a tensor.

    Attributes:
        file: the file that holds it.
        dtype: dtype of its values.
        shape: shape of the tensor.
        offset: offset of its first byte in the file. In a pickle, which has no such order: from the first value.
        nbytes: size of its values in bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        """The tensors in files that hold the values: this one, or a weight and its scales."""
        return (self,)

    @property
    def written_as(self) -> torch.dtype:
        """The dtype of an output, if the recipe sets none."""
        return self.dtype


@dataclass(frozen=True)
class FileState:
    """State of a file at opening, which shows whether it has changed since.

    Attributes:
        path: path of the file.
        size: size in bytes.
        mtime_ns: time of the last change of its contents.
        ctime_ns: time of the last change of its contents or attributes, which programs cannot set back.
        header_checksum: checksum of its header, or of a whole JSON file.
    """

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    header_checksum: str

    def same_file(self, now: os.stat_result) -> bool:
        """Whether size and times are unchanged."""
        return (self.size, self.mtime_ns, self.ctime_ns) == (now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def file_state(path: Path, stat: os.stat_result, header: bytes) -> FileState:
    """Return the state of a file from its stat and the bytes of its header."""
    return FileState(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, checksum(header))


def read_headers(file: Path) -> tuple[dict[str, TensorHeader], FileState]:
    """Read the header of a safetensors file.

    Returns:
        The tensors in the order of the file, and the state of the file.

    Raises:
        CheckpointError: not a whole and valid safetensors file; the message names the file and what is wrong.
    """
    try:
        with open_regular(file) as stream:
            stat = os.fstat(stream.fileno())
            first = stream.read(8)
            if first == b"version ":  # https://git-lfs.github.com/spec/v1
                raise ValueError("it is a pointer of Git LFS to the weights; fetch them: git lfs pull")
            length = int.from_bytes(first, "little")
            if stat.st_size < 8 or not 2 <= length <= stat.st_size - 8:
                raise ValueError(f"it has {stat.st_size} bytes and announces a header of {length}; truncated?")
            if length > MAX_JSON_BYTES:
                raise ValueError(f"its header has {length} bytes, at most {MAX_JSON_BYTES} are allowed")
            raw = stream.read(length)
        if not raw.startswith(b"{"):
            raise ValueError("its header does not begin with {")
        headers = _parse_header(file, raw, 8 + length, stat.st_size)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    return headers, file_state(file, stat, raw)


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata in the header of a safetensors file that `read_headers` has accepted.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            content = _parse_json(stream.read(min(length, MAX_JSON_BYTES)), strict=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
    metadata: dict[str, str] = content.get("__metadata__", {})
    return metadata


def read_json(file: Path, *, strict: bool = False) -> tuple[dict[str, Any], FileState]:
    """Read a JSON object of bounded size; `strict` refuses names that occur twice, and NaN.

    Raises:
        CheckpointError: not readable, not JSON, too large, or not an object.
    """
    data, state = _read(file, strict)
    return _object(file, data), state


def read_tokenizer_json(file: Path, *, merges: bool = True) -> tuple[dict[str, Any], FileState]:
    """Read a JSON object of a tokenizer, which may be larger; without its `merges`, it takes a third of the memory.

    Raises:
        CheckpointError: as `read_json`.
    """
    data, state = _read(file, False, MAX_TOKENIZER_COMMAS, (lambda raw: raw) if merges else without_merges)
    return _object(file, data), state


def without_merges(raw: bytes) -> bytes:
    """Return the JSON text of a tokenizer with an empty list of merges."""
    first, last = merges_of(raw)
    return raw[:first] + b"[]" + raw[last:] if last else raw


def merges_of(raw: bytes) -> tuple[int, int]:
    """Return where the list of merges begins and ends in the JSON text of a tokenizer; zeros if it has none."""
    found = _MERGES.search(raw)
    depth = 0
    for bracket in _BRACKETS.finditer(raw, found.end()) if found else ():
        depth += {b"[": 1, b"]": -1}.get(bracket[0], 0)
        if found and not depth:
            return found.end(), bracket.end()
    return 0, 0


def read_json_list(file: Path) -> tuple[list[Any], FileState]:
    """Read a JSON list of bounded size, without names that occur twice, or NaN.

    Raises:
        CheckpointError: not readable, not JSON, too large, or not a list.
    """
    data, state = _read(file, strict=True)
    if not isinstance(data, list):
        raise CheckpointError(f"{file}: expected a JSON list, got {type(data).__name__}")
    return data, state


def _object(file: Path, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _read(
    file: Path,
    strict: bool,
    most_commas: int = MAX_JSON_COMMAS,
    reduced: Callable[[bytes], bytes] = lambda raw: raw,
) -> tuple[Any, FileState]:
    try:
        with open_regular(file) as stream:
            stat = os.fstat(stream.fileno())
            raw = stream.read(MAX_JSON_BYTES + 1)
        return _parse_json(reduced(raw), strict, most_commas), file_state(file, stat, raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error


def check_name(name: str) -> None:
    """Refuse tensor names that are empty, too long, or would upset a terminal or a file.

    Raises:
        ValueError: with the name, shortened.
    """
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"{name[:40]!a} is not a valid tensor name (1 to {MAX_NAME_LENGTH} printable characters)")


def _parse_header(file: Path, raw: bytes, start: int, file_size: int) -> dict[str, TensorHeader]:
    """Check every entry, and check that together they cover the file from `start` to its end without gaps."""
    entries = _parse_json(raw, strict=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    headers = [(name, _parse_entry(file, name, entry, start)) for name, entry in entries.items()]
    headers.sort(key=lambda item: (item[1].offset, item[1].nbytes))
    end = start
    for name, header in headers:
        if header.offset != end:
            problem = "overlaps the tensor before it" if header.offset < end else "leaves a hole before it"
            raise ValueError(f"{name} {problem}: it begins at byte {header.offset} instead of {end}")
        end += header.nbytes
    if end != file_size:
        raise ValueError(f"it has {file_size} bytes, its header describes {end}; truncated?")
    return dict(headers)


def _parse_entry(file: Path, name: str, entry: object, start: int) -> TensorHeader:
    check_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and _NARROW.fullmatch(dtype) and dtype not in DTYPES:
        raise QuantisedRefusedError(
            f"{file}: {name} has dtype {dtype}, of quantised weights; dequantise the checkpoint"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {ascii(dtype)[:40]}, which cannot be merged")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"the shape of {name} must be a list of at most {MAX_DIMENSIONS} sizes")
    # Zeros are left out, so that strides fit as well.
    if math.prod(max(size, 1) for size in shape) * 16 >= 2**63:
        raise ValueError(f"the shape of {name} is larger than any file")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {name} must be two sizes")
    begin, end = offsets
    nbytes = DTYPES[dtype].itemsize * math.prod(shape)
    if end - begin != nbytes:
        raise ValueError(f"{name} has {end - begin} bytes, its shape and dtype need {nbytes}")
    return TensorHeader(file, DTYPES[dtype], tuple(shape), start + begin, nbytes)


def _are_sizes(value: object) -> bool:
    # Not isinstance: True is an int there.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _parse_json(raw: bytes, strict: bool, most_commas: int = MAX_JSON_COMMAS) -> Any:
    """Parse within the limits; every failure is a ValueError."""
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    if raw.count(b",") > most_commas:
        raise ValueError(f"more than {most_commas} entries")
    text = raw.decode("utf-8")
    try:
        if strict:
            return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:40]!a} occurs more than once")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")
