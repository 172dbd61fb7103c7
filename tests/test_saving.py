"""A folder holds the old model or the new one, or is completed, whatever ends the process that saves."""

import errno
import os
import shutil
import stat

import pytest

from lte.files import NotWritten, write_whole
from lte.saving import finish_saving, saving
from processes import each_kill, failing, names

SHARDED = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "tokenizer_config.json": "old",
    "merges.txt": "old",
    "chat_template.jinja": "old",
}
SINGLE = {"config.json": "new", "model.safetensors": "new", "tokenizer_config.json": "new", "tokenizer.json": "new"}
KEPT = {
    "notes.txt": "mine",
    "checkpoint-5/model.safetensors": "mine",
    "checkpoint-5/config.json": "mine",
    "model.fp16.safetensors": "mine",
    "adapter_config.json": "mine",
    "lte_training.json": "mine",
}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def save(folder, files):
    with saving(folder) as fresh:
        put(fresh, files)


def test_a_new_folder(tmp_path):
    save(tmp_path / "some" / "model", SINGLE | {"additional_chat_templates/tools.jinja": "new"})
    assert held(tmp_path / "some" / "model") == SINGLE | {"additional_chat_templates/tools.jinja": "new"}
    assert not any(name.startswith(".") for name in names(tmp_path / "some" / "model"))


@pytest.mark.parametrize(("old", "new"), [(SHARDED, SINGLE), (SINGLE, SHARDED)])
def test_the_old_models_files_go_and_others_stay(tmp_path, old, new):
    put(tmp_path, old | KEPT)
    save(tmp_path, new)
    assert held(tmp_path) == new | KEPT


def test_weights_of_a_variant_replace_only_those_of_that_variant(tmp_path):
    put(tmp_path, SINGLE | {"model.fp16-00001-of-00001.safetensors": "", "model.safetensors.index.fp16.json": ""})
    save(tmp_path, {"config.json": "new", "model.fp16.safetensors": "fp16"})
    assert held(tmp_path) == SINGLE | {"model.fp16.safetensors": "fp16"}


def test_adapters_leave_the_model_beside_them(tmp_path):
    put(tmp_path, SINGLE)
    adapters = {"adapter_config.json": "new", "adapter_model.safetensors": "new"}
    save(tmp_path, adapters)
    assert held(tmp_path) == SINGLE | adapters


@pytest.mark.parametrize(
    ("old", "new"), [(SHARDED, SINGLE), (dict.fromkeys(SINGLE, "old"), dict.fromkeys(SHARDED, "new"))]
)
def test_a_killed_save_leaves_the_old_model_the_new_one_or_none(tmp_path, old, new):
    folder, seen = tmp_path / "model", set()

    def prepare():
        finish_saving(folder)
        save(folder, old)
        put(folder, KEPT)

    for _ in each_kill(lambda: save(folder, new), prepare):
        found = seen_by_others(folder)
        seen.add(found.get("config.json"))
        if "config.json" in found:
            assert found in (old | KEPT, new | KEPT)
        finish_saving(folder)
        if "config.json" in found:
            assert seen_by_others(folder) in (found, new | KEPT)
        else:
            assert seen_by_others(folder) == new | KEPT
    assert seen == {"old", None, "new"}
    assert held(folder) == new | KEPT
    assert not any(name.startswith(".lte") for name in names(folder))


def seen_by_others(folder):
    return {name: content for name, content in held(folder).items() if not name.startswith(".lte")}


def test_completing_can_be_killed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = tmp_path / "model"

    def prepare():
        finish_saving(folder)
        save(folder, SHARDED | KEPT)
        put(folder / ".lte-saved", SINGLE | {".whole": ""})

    for _ in each_kill(lambda: finish_saving(folder), prepare):
        found = seen_by_others(folder)
        if "config.json" in found:
            assert found in (SHARDED | KEPT, SINGLE | KEPT)
        finish_saving(folder)
        assert held(folder) == SINGLE | KEPT


def test_what_cannot_be_completed_is_refused(tmp_path, monkeypatch):
    put(tmp_path, SHARDED)
    put(tmp_path / ".lte-saved", SINGLE | {".whole": ""})
    monkeypatch.setattr(os, "replace", failing(errno.EROFS))
    with pytest.raises(ValueError, match=f"{tmp_path}: saving this model was interrupted.*Read-only file system"):
        finish_saving(tmp_path)


def test_two_processes_save_one_after_the_other(tmp_path):
    children = []
    for child, files in enumerate((SHARDED, SINGLE, SHARDED)):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for _ in range(15):
                    save(tmp_path, {name: str(child) for name in files})
            except BaseException:
                os._exit(1)
            os._exit(0)
    assert [os.waitpid(one, 0)[1] for one in children] == [0] * 3
    found = held(tmp_path)
    assert len(set(found.values())) == 1
    assert set(found) in (set(SHARDED), set(SINGLE))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch, call):
    put(tmp_path / "model", SHARDED)
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    for name in ("model", "new/one"):
        with pytest.raises(NotWritten, match=f"{tmp_path / name} could not be written .No space left on device"):
            save(tmp_path / name, SINGLE)
    monkeypatch.undo()
    assert held(tmp_path / "model") == SHARDED
    assert names(tmp_path / "model") == sorted(SHARDED)
    assert names(tmp_path) == sorted(["model", *(f"model/{name}" for name in SHARDED)])


def test_an_error_of_the_one_who_saves_leaves_the_old_model(tmp_path):
    put(tmp_path, SHARDED)
    with pytest.raises(TypeError):
        save(tmp_path, SINGLE | {"half.json": None})
    assert held(tmp_path) == SHARDED
    assert names(tmp_path) == sorted(SHARDED)


def test_saving_inside_saving(tmp_path):
    put(tmp_path, SHARDED | KEPT)
    with saving(tmp_path) as outer:
        with saving(outer) as inner:
            put(inner, {"config.json": "new", "model.safetensors": "new"})
        put(outer, {"tokenizer_config.json": "new", "tokenizer.json": "new"})
        assert held(tmp_path).items() >= (SHARDED | KEPT).items()
    assert held(tmp_path) == SINGLE | KEPT


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with saving(tmp_path / "model") as fresh:
            put(fresh, SINGLE)
            (fresh / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(NotWritten, match=r"model could not be written .File exists.: there is a file of that name"):
        save(tmp_path / "model", SINGLE)


def test_unfinished_work_goes_on_after_a_kill_at_any_step(tmp_path):
    out, work = tmp_path / "out", tmp_path / "out" / ".work"
    after = []

    def act():
        with saving(out, ".work") as fresh:
            for name, content in SINGLE.items():
                if not (fresh / name).exists():
                    write_whole(fresh / name, content)

    for _ in each_kill(act, lambda: shutil.rmtree(out, ignore_errors=True)):
        finish_saving(out)
        whole = {name: (work / name).stat().st_ino for name in SINGLE if (work / name).exists()}
        act()
        assert held(out) == SINGLE
        assert all((out / name).stat().st_ino == inode for name, inode in whole.items())
        after.append(len(whole))
    assert {*after} >= {0, 1, 2, 3, 4}


def fail(folder, error):
    with saving(folder, ".work") as fresh:
        put(fresh, SINGLE)
        raise error


def test_bad_input_leaves_no_unfinished_work(tmp_path):
    with pytest.raises(ValueError, match="bad"):
        fail(tmp_path / "out", ValueError("bad"))
    assert names(tmp_path) == []
    with pytest.raises(OSError, match="full"):
        fail(tmp_path / "out", OSError("full"))
    assert held(tmp_path / "out" / ".work") == SINGLE
