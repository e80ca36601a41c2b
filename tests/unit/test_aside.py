"""What is written aside is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.aside import aside


def write(path: Path, text: str, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
        path /= "inside.txt"
    path.write_text(text)


def read(path: Path) -> str:
    return (path / "inside.txt" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_new_takes_the_place_of_the_old_when_it_is_whole(tmp_path, kind):
    target = tmp_path / "made" / "thing"
    for text in ("old", "new"):
        with aside(target) as beside:
            write(beside, text, kind)
            assert not target.exists() or read(target) == "old"
        assert read(target) == text and [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_alone(tmp_path, kind, error):
    target = tmp_path / "thing"
    write(target, "old", kind)
    with pytest.raises(error), aside(target) as beside:
        write(beside, "half", kind)
        raise error
    assert read(target) == "old" and [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_no_hindrance(tmp_path, kind):
    write(tmp_path / "thing.writing", "left", "folder")
    with aside(tmp_path / "thing") as beside:
        write(beside, "new", kind)
    assert read(tmp_path / "thing") == "new" and len([*tmp_path.iterdir()]) == 1


def test_a_file_takes_no_folders_place(tmp_path):
    write(tmp_path / "thing", "old", "folder")
    with pytest.raises(OSError), aside(tmp_path / "thing") as beside:
        write(beside, "new", "file")
    assert read(tmp_path / "thing") == "old" and len([*tmp_path.iterdir()]) == 1
