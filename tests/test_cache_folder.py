"""The user's cache: where it is, and files that are there whole or not at all."""

from pathlib import Path

import pytest

from halfweight.cache_folder import cache_folder, write_whole


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "halfweight"
    for unset in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), monkeypatch.undo):
        unset()
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert cache_folder() == Path.home() / ".cache" / "halfweight"


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "table.json"
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_whole(path, b"first")

    def full(self, target):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
