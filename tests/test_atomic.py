# SPDX-License-Identifier: Apache-2.0

"""Whole or not there: what a write that fails, or one that succeeds, leaves behind."""

import pytest

from trl_tfpo.common.atomic import atomic_write, check_writable


def test_a_file_is_replaced_whole_or_left_alone(tmp_path):
    """Half a dataset reads like a whole one, and the one that was there before is gone."""
    path = tmp_path / "new" / "rows.jsonl"
    with atomic_write(path) as part:
        part.write_text("first")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.write_text("sec")
        raise RuntimeError
    assert path.read_text() == "first"
    with atomic_write(path) as part:
        part.write_text("second")
    assert path.read_text() == "second" and [x.name for x in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_folder_is_replaced_whole_or_left_alone(tmp_path):
    """Files of an older, larger dataset that stay behind would be read as part of the new one."""
    path = tmp_path / "folder"
    for names in (["a", "b"], ["c"]):
        with atomic_write(path) as part:
            part.mkdir()
            for name in names:
                (part / name).touch()
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.mkdir()
        (part / "d").touch()
        raise RuntimeError
    assert [x.name for x in path.iterdir()] == ["c"] and [x.name for x in tmp_path.iterdir()] == ["folder"]


def test_what_can_be_written_is_asked_before(tmp_path):
    """A night of generation ends at a folder that somebody mistyped."""
    check_writable(tmp_path / "new" / "newer")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "new", "/proc/new"):
        with pytest.raises(ValueError, match=f"must be writable. Got '{folder}': .*; choose another"):
            check_writable(folder)
