"""The benchmark of lists measures what it says, at a size that takes a moment."""

from __future__ import annotations

import json

from benchmarks import lists
from fieldmark.data import shards


def test_a_list_is_indexed_divided_and_drawn_from(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_LOOKED_UP", 0)  # as the benchmark does, and here is undone
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table, out = tmp_path / "list.parquet", tmp_path / "told.json"
    lists.write_list(table, 1000)
    lists.divide_list(str(table), str(out))
    assert {"index", "split", "fingerprint"} < set(json.loads(out.read_text()))
    [split] = (tmp_path / "splits").iterdir()
    assert len(split.read_text().splitlines()) == 1001
    lists.draw_updates(str(table), str(out))
    assert json.loads(out.read_text())["an update"][0] > 0
