import os
import socket
import stat

import pytest

from r_tsvm_kernels import CheckpointError, files


@pytest.fixture
def places(tmp_path):
    """Things at which a file is expected."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()  # noqa: PTH109
        os.chdir(tmp_path)  # the path of a socket is short
        server.bind("socket")
        os.chdir(before)
        yield tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "a folder, not a regular file"),
        ("pipe", "a pipe, not a regular file"),
        ("socket", "a socket, not a regular file"),
        ("/dev/null", "a device, not a regular file"),
        ("/dev/zero", "a device, not a regular file"),
        ("loop", "Too many levels"),
        ("dangling", "No such file"),
        ("n" * 300, "too long"),
        ("a\0b", "not a path"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_only_regular_files_are_read(places, name, message):
    for read in (files.open_regular, lambda path: files.read_regular(path, 10)):
        with pytest.raises(OSError, match=message):
            read(os.path.join(places, name))  # noqa: PTH118


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert files.read_regular(tmp_path / "link", 3) == b"abc"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        files.read_regular(tmp_path / "link", 2)


def test_usable_paths(places):
    for name in ("folder", "pipe", "nowhere", "dangling", "folder/x"):
        assert files.usable_path(places / name) == places / name
    for name, message in (
        ("loop", "cannot be looked up"),
        ("loop/x", "cannot be"),
        ("n" * 300, "too long"),
        ("\0", "not a path"),
    ):
        with pytest.raises(CheckpointError, match=message):
            files.usable_path(places / name)
        assert not files.exists(places / name)


def test_writing_replaces_a_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    os.link(tmp_path / "precious", tmp_path / "hard")
    (tmp_path / ".link.new").symlink_to("precious")
    for name in ("link", "hard", "new"):
        files.write_text(tmp_path / name, "ä")
        assert (tmp_path / name).read_bytes() == "ä".encode() and not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "link", "hard", "new"}
    umask = os.umask(0o027)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_writing_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "file", "new\udcff")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_publishing_overwrites_nothing(tmp_path, monkeypatch, links):
    if not links:

        def link(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    source = tmp_path / "source"
    (tmp_path / "taken").write_text("taken")
    (tmp_path / "dangling").symlink_to("elsewhere")
    for name in ("taken", "dangling"):
        source.write_text("new")
        with pytest.raises(FileExistsError):
            files.publish(source, tmp_path / name)
        assert source.read_text() == "new"
    files.publish(source, tmp_path / "free")
    assert (tmp_path / "free").read_text() == "new"
    assert source.exists() == links == files.same_file(source, tmp_path / "free")
    assert (tmp_path / "taken").read_text() == "taken" and not (tmp_path / "elsewhere").exists()
