"""Files are whole whatever ends the process that writes them."""

import errno
import os
import stat

import pytest

from lte import files
from lte.files import NotWritten, append_line, whole_file, write_whole, writing
from lte.saving import saving
from processes import each_kill, failing, names


def test_a_killed_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "page.html"
    seen = set()
    for _ in each_kill(lambda: write_whole(path, "new"), lambda: path.write_text("old")):
        seen.add(path.read_text())
    assert seen == {"old", "new"}
    assert names(tmp_path) == ["page.html"]  # the last write has cleaned up after those killed


def test_a_killed_append_adds_a_whole_line_or_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    seen = set()
    for _ in each_kill(lambda: append_line(path, '{"b": 2}'), lambda: path.write_text('{"a": 1}\n')):
        seen.add(path.read_text())
    assert seen == {'{"a": 1}\n', '{"a": 1}\n{"b": 2}\n'}
    assert names(tmp_path) == ["rows.jsonl"]


def test_lines_of_several_processes_are_all_there(tmp_path):
    path, children = tmp_path / "rows.jsonl", []
    for child in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            for row in range(25):
                append_line(path, f"{child} {row}")
            os._exit(0)
    assert [os.waitpid(one, 0)[1] for one in children] == [0] * 4
    assert sorted(path.read_text().splitlines()) == sorted(f"{child} {row}" for child in range(4) for row in range(25))


def test_a_line_goes_below_one_without_an_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("first")
    append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("write", [write_whole, append_line])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write, call):
    path = tmp_path / "page.html"
    path.write_text("old\n")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(NotWritten, match=f"{path} could not be written .No space left on device.: free some space"):
        write(path, "new")
    assert path.read_text() == "old\n"
    assert names(tmp_path) == ["page.html"]


def test_a_full_disk_leaves_no_empty_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(NotWritten):
        append_line(tmp_path / "rows.jsonl", "{}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask_or_the_file_before(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "new", "")
        append_line(tmp_path / "lines", "")
    finally:
        os.umask(before)
    for name in ("new", "lines"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask
    (tmp_path / "new").chmod(0o640)
    write_whole(tmp_path / "new", "")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_link_goes_on_pointing_to_its_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for content in ("first", "second"):
        write_whole(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == content


def test_a_pipe_and_a_device_are_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "a")
    append_line(tmp_path / "pipe", "b")
    assert os.read(reader, 10) == b"ab\n"
    os.close(reader)
    write_whole("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_temporary_file_of_a_process_at_work_stays(tmp_path):
    with whole_file(tmp_path / "slow.png") as slow:
        assert slow.suffix == ".png"
        slow.write_text("slow")
        write_whole(tmp_path / "quick", "quick")
    assert (tmp_path / "slow.png").read_text() == "slow"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing/file", "No such file or directory.: make its folder first"),
        ("file/inside", "Not a directory.: a part of its path is a file"),
        ("folder", "Is a directory.: there is a folder of that name"),
        ("n" * 300, "File name too long.: give a shorter name"),
    ],
)
@pytest.mark.parametrize("write", [write_whole, append_line])
def test_a_path_that_cannot_be_is_named(tmp_path, write, path, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(NotWritten, match=f"{path} could not be written .{says}"):
        write(tmp_path / path, "")


@pytest.mark.parametrize(
    "error",
    [
        Exception("File too large (os error 27)"),  # tokenizers; safetensors has a class of its own
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_other_libraries_errors_are_understood(error):
    with pytest.raises(NotWritten, match=r"^there could not be written .*free some space"), writing("there"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("28"), OSError("no number"), KeyError("x")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as found, writing("there"):
        raise error
    assert found.value is error


def test_without_locks_files_and_models_are_written_too(tmp_path, monkeypatch):
    """As on Windows, which has no fcntl."""
    monkeypatch.setattr(files, "fcntl", None)
    write_whole(tmp_path / "a.txt", "one")
    append_line(tmp_path / "a.txt", "two")
    with saving(tmp_path / "m") as fresh:
        (fresh / "config.json").write_text("{}")
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.json"]
