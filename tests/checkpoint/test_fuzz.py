"""Hostile checkpoints: mutated headers and index files from a fixed seed, each a clear error or a valid checkpoint.

The oracle is the safetensors library: files that it refuses must be refused here, and accepted files must be read as it
reads them.
"""

import json
import os
import random
import resource
import struct
import time

import pytest
import torch
from checkpoints import digest, save, state_dict
from compare import same_bits
from safetensors import SafetensorError
from safetensors.torch import load

from r_tsvm_kernels import CheckpointError
from r_tsvm_kernels.checkpoint import Checkpoint
from r_tsvm_kernels.cli import main

SECONDS = 2.0
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).half(), "c": torch.tensor(True)}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "BOOL", "shape": [], "data_offsets": [32, 33]},
}
DATA = b"".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in TENSORS.values())
ODD_VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**300, 1.0, 2.5, 1e308, float("nan"),
    float("inf"), "", "F32", "f32", "F4", "\x00", "\ud800", "../a", "a" * 5000, [], [[]], [0, 0], [-1, 2],
    [2**62, 4, 0], [2**32, 2**32], [1] * 1000, {}, {"dtype": "F32"}, [24, 0], [0, 24, 32], [True, True], ["0", "24"],
]  # fmt: skip
ODD_NAMES = ["", "\x00", "a\x00b", "../../etc/passwd", "/etc/passwd", "x" * 10_000, "\x1b[2J", "\ud800", "__metadata__"]
# By hand: what no random change is likely to find. Raw header texts, without the length before them.
HEADER_TEXTS = {
    "empty": b"",
    "not an object": b"[]",
    "null": b"null",
    "spaces": b" " * 1000,
    "space first": b" {}",
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 500_000,
    "deep in a tensor": b'{"a":{"dtype":' + b"[" * 1_000_000,
    "twice": json.dumps(HEADER).encode()[:-1] + b',"c":{"dtype":"BOOL","shape":[],"data_offsets":[32,33]}}',
    "key twice": b'{"c":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
    "bad utf-8": b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "utf-16": '{"c":{"dtype":"U8","shape":[33],"data_offsets":[0,33]}}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"c":{"dtype":"U8","shape":[33],"data_offsets":[0,33]}}',
    "long number": b'{"c":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,33]}}',
    "many commas": b'{"c":[' + b"[]," * 3_000_000 + b"[]]}",
    "many tensors": b"{"
    + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(20_000))
    + b"}",
    "not finished": json.dumps(HEADER).encode()[:-5],
    "something after": json.dumps(HEADER).encode() + b"x",
    "two objects": json.dumps(HEADER).encode() * 2,
    "zeros after": json.dumps(HEADER).encode() + b"\x00" * 8,
}  # fmt: skip


def file_of(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def mutated_headers():
    """Yield (what was changed, content of the file)."""
    rng = random.Random(20261124)
    good = file_of(HEADER)
    for name, text in HEADER_TEXTS.items():
        yield name, file_of(text)
    for length in (0, 1, 7, len(good), len(good) - 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001):
        yield f"length {length}", file_of(HEADER, length=length)
    for size in range(0, len(good), 13):
        yield f"first {size} bytes", good[:size]
    for extra in (b"x", b"\x00" * 4096):
        yield f"{len(extra)} bytes more", good + extra
    for _ in range(60):
        damaged = bytearray(good)
        places = [rng.randrange(len(good) - len(DATA)) for _ in range(rng.choice([1, 1, 2, 5]))]
        for place in places:
            damaged[place] = rng.choice([rng.randrange(256), *rng.choices(b'0123456789{}[]":,-.eFIa', k=3)])
        yield f"bytes {places}", bytes(damaged)
    for field in ("dtype", "shape", "data_offsets"):
        for value in ODD_VALUES:
            yield f"{field} {value!r:.40}", file_of(HEADER | {"b": HEADER["b"] | {field: value}})
    for value in ODD_VALUES:
        yield f"entry {value!r:.40}", file_of(HEADER | {"b": value})
        yield f"metadata {value!r:.40}", file_of(HEADER | {"__metadata__": value})
    for name in ODD_NAMES:
        yield (
            f"name {name!r:.40}",
            file_of({key: value for key, value in HEADER.items() if key != "b"} | {name: HEADER["b"]}),
        )
    for name, offsets in [
        ("a", [0, 23]), ("a", [1, 25]), ("b", [23, 31]), ("b", [25, 33]), ("b", [0, 8]), ("c", [33, 34]),
        ("c", [31, 32]), ("b", [32, 24]), ("b", [2**63, 2**63 + 8]), ("c", [-1, 0]),
    ]:  # fmt: skip
        yield f"{name} at {offsets}", file_of(HEADER | {name: HEADER[name] | {"data_offsets": offsets}})
    yield "unknown key", file_of(HEADER | {"b": HEADER["b"] | {"strides": [1]}})
    yield "no data", file_of(HEADER, b"")
    yield "unchanged", good


HEADERS = list(mutated_headers())


def open_and_load(path, **options):
    checkpoint = Checkpoint(path, **options)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def attempt(path, **options):
    """Return the tensors or the error, which must be raised in time and be one line that names the file."""
    start = time.process_time()
    try:
        return open_and_load(path, **options)
    except CheckpointError as error:
        assert path.name in str(error) and str(error).isprintable() and len(str(error)) < 5000
        return error
    finally:
        assert time.process_time() - start < SECONDS


def test_the_corpus_is_large_enough():
    assert len(HEADERS) >= 250 and len({content for _, content in HEADERS}) >= 250
    assert len(INDEXES) >= 50


def test_mutated_headers(tmp_path):
    file = tmp_path / "model.safetensors"
    accepted = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, content in HEADERS:
        file.write_bytes(content)
        result = attempt(file)
        if isinstance(result, CheckpointError):
            continue
        accepted.append(what)
        try:
            expected = load(content)
        except SafetensorError as error:
            pytest.fail(f"{what}: accepted, but the library says {error}")
        assert result.keys() == expected.keys(), what
        assert all(same_bits(result[name], tensor) for name, tensor in expected.items()), what
    assert "unchanged" in accepted and len(accepted) < len(HEADERS) / 4
    # In KiB. The largest file of the corpus has 10 MB; a size that a header merely claims must not be allocated.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024
    assert list(tmp_path.iterdir()) == [file]


def mutated_indexes():
    """Yield (what was changed, function from the good index to the content of the file)."""
    rng = random.Random(7)

    def text_of(index):
        return json.dumps(index).encode()

    def with_entry(name, value):
        return lambda good: text_of(good | {"weight_map": good["weight_map"] | {name: value}})

    for value in ODD_VALUES:
        yield f"map {value!r:.40}", lambda good, value=value: text_of(good | {"weight_map": value})
        yield f"file {value!r:.40}", with_entry("scale", value)
    for value in [
        "..", ".", "/", "/etc/passwd", "../model.safetensors", "../outside.safetensors", "sub/model.safetensors",
        "a\\b.safetensors", "nul\x00.safetensors", "x" * 5000 + ".safetensors", "model.bin", "fifo.safetensors",
        "folder.safetensors", "loop.safetensors", "broken.safetensors", "zero.safetensors", "text.safetensors",
        "~/model.safetensors", "file:///etc/passwd", "new\nline.safetensors",
    ]:  # fmt: skip
        yield f"file {value!r:.40}", with_entry("scale", value)
    for name in ODD_NAMES:
        yield f"name {name!r:.40}", with_entry(name, "model-00001-of-00002.safetensors")
    for what in ("deep lists", "deep objects", "many commas", "bad utf-8", "not an object", "null", "empty"):
        yield what, lambda good, what=what: HEADER_TEXTS[what]
    yield "twice", lambda good: text_of(good).replace(b'"weight_map": {', b'"weight_map": {"scale": "x.safetensors", ')
    yield "maps twice", lambda good: text_of(good)[:-1] + b', "weight_map": {}}'
    for _ in range(20):
        place, byte = rng.random(), rng.randrange(256)
        yield (
            f"byte {place}",
            lambda good, place=place, byte=byte: (
                text_of(good)[: int(place * len(text_of(good)))]
                + bytes([byte])
                + text_of(good)[int(place * len(text_of(good))) + 1 :]
            ),
        )


INDEXES = list(mutated_indexes())


def hostile_folder(tmp_path):
    """A sharded model with links, a pipe, a folder and broken files beside it."""
    folder = save(tmp_path / "m", state_dict(0), 2)
    (tmp_path / "outside.safetensors").write_bytes(file_of(HEADER))
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "text.safetensors").write_text("no safetensors")
    return folder


def test_mutated_indexes(tmp_path):
    folder = hostile_folder(tmp_path)
    file = folder / "model.safetensors.index.json"
    good = json.loads(file.read_text())
    refused = 0
    for what, change in INDEXES:
        file.write_bytes(change(good))
        result = attempt(folder)
        refused += isinstance(result, CheckpointError)
        # What is accepted is the model itself: a change of what is not needed, e.g. of the metadata.
        if not isinstance(result, CheckpointError):
            assert result.keys() == state_dict(0).keys(), what
    assert refused > len(INDEXES) * 0.8


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_mutated_pickles(tmp_path):
    """Torch does not detect every damage, e.g. of a value, so the promise is only an error or tensors."""
    file = tmp_path / "model.bin"
    torch.save(TENSORS, file)
    good = file.read_bytes()
    header = good.index(b"data.pkl")
    rng = random.Random(3)
    refused = 0
    for number in range(200):
        damaged = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(header, header + 400) if number % 2 else rng.randrange(len(good))
            damaged[place] = rng.randrange(256)
        file.write_bytes(damaged)
        refused += isinstance(attempt(file, allow_pickle=True), CheckpointError)
    assert 50 < refused < 200


HANDFUL = [
    "deep objects",
    "length 18446744073709551615",
    "twice",
    "first 65 bytes",
    "name '../../etc/passwd'",
    "a at [1, 25]",
]


@pytest.mark.parametrize("what", [*HANDFUL, "file '../outside.safetensors'"])
def test_the_command_line_ends_with_an_error_and_writes_nothing(tmp_path, monkeypatch, capsys, what):
    base = tmp_path / "base.safetensors"
    base.write_bytes(file_of(HEADER))
    tuned = tmp_path / "tuned.safetensors"
    if what in dict(HEADERS):
        tuned.write_bytes(dict(HEADERS)[what])
    else:
        tuned = hostile_folder(tmp_path)
        index = tuned / "model.safetensors.index.json"
        index.write_bytes(dict(INDEXES)[what](json.loads(index.read_text())))
    before = sorted(tmp_path.rglob("*"))
    contents = digest(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = main(["merge", "--base", str(base), "--model", str(tuned), "--method", "task_arithmetic", "out"])
    shown = capsys.readouterr().err
    assert code in (1, 2) and shown.startswith("rtsvm merge: error:"), shown
    assert sorted(tmp_path.rglob("*")) == before and digest(tmp_path) == contents
