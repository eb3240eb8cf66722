import json
import os

import pytest

from r_tsvm_kernels import JournalError
from r_tsvm_kernels.engine.journal import Finished, Journal, Stored, read_journal
from r_tsvm_kernels.engine.lines import as_line

FINGERPRINT = {"format": 1, "recipe": {"alpha": [0.5, 1.0]}, "models": ["base", "größer"]}


def entry(number, value=1.0):
    stored = Stored(f"w{number}", "model.safetensors", 8 * number, 8, "float32", (2,), "ab" * 16)
    return Finished(f"w{number}", (stored,), ("cd",), {"seconds": value})


@pytest.fixture
def file(tmp_path):
    journal = Journal.create(tmp_path / "journal", FINGERPRINT)
    journal.append([entry(0, float("inf")), entry(1)])
    journal.append([entry(2, 1 / 3)])
    journal.close()
    return tmp_path / "journal"


def test_what_is_written_is_read_back(file):
    entries = {f"w{i}": entry(i, value) for i, value in enumerate((float("inf"), 1.0, 1 / 3))}
    assert read_journal(file) == (FINGERPRINT, entries)
    assert all(json.loads(line)["line"] for line in file.read_text().splitlines())


def test_every_cut_leaves_a_beginning(file):
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        journal = Journal.open(file)
        lines = sum(end <= length for end in ends)
        if lines == 0:
            assert journal is None
            continue
        assert (journal.fingerprint, len(journal.finished)) == (FINGERPRINT, lines - 1)
        journal.append([entry(7)])
        journal.close()
        assert list(read_journal(file)[1]) == [f"w{i}" for i in range(lines - 1)] + ["w7"]


def test_every_flipped_bit_is_noticed(file):
    whole = file.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        if position < last - 1:
            with pytest.raises(JournalError, match=r"line \d is damaged"):
                read_journal(file)
        elif position >= last:  # as if torn
            assert list(read_journal(file)[1]) == ["w0", "w1"]


def test_a_tensor_that_was_done_again_counts_once(file):
    journal = Journal.open(file)
    journal.append([entry(1, 9.0)])
    journal.close()
    _, finished = read_journal(file)
    assert list(finished) == ["w0", "w1", "w2"] and finished["w1"].report["seconds"] == 9.0


def test_what_is_no_journal(tmp_path):
    assert Journal.open(tmp_path / "none") is None
    with pytest.raises(JournalError, match="missing or empty"):
        read_journal(tmp_path / "none")
    (tmp_path / "text").write_text("hello\n[1]\n")
    with pytest.raises(JournalError, match="missing or empty"):
        read_journal(tmp_path / "text")
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(tmp_path)


def test_a_journal_of_another_version(tmp_path):
    journal = Journal.create(tmp_path / "journal", FINGERPRINT)
    journal.close()
    with (tmp_path / "journal").open("ab") as opened:
        opened.write(as_line({"name": "w", "colour": "red", "inputs": []}))
    with pytest.raises(JournalError, match="not a journal of this version"):
        read_journal(tmp_path / "journal")


def test_an_append_that_fails_leaves_the_lines_before(file, monkeypatch):
    journal = Journal.open(file)
    monkeypatch.setattr(os, "fdatasync", _refuse)
    with pytest.raises(OSError, match="no space"):
        journal.append([entry(5)])
    monkeypatch.undo()
    journal.append([entry(6)])
    journal.close()
    assert list(read_journal(file)[1]) == ["w0", "w1", "w2", "w6"]


def _refuse(_):
    raise OSError(28, "no space")
