from __future__ import annotations

from vitscale.tracking.outbox import Outbox, flat_params


def test_what_is_not_sent_is_there_after_a_restart(tmp_path):
    outbox = Outbox(tmp_path, {"host": "a"})
    (tmp_path / "figures").mkdir()
    outbox.add_standard()
    outbox.add_standard()
    again = Outbox(tmp_path, {"version": "1"})
    assert again.key == outbox.key
    assert again.tags == {"host": "a", "version": "1"}
    assert again.artifacts() == [tmp_path / "figures"]
    again.set_status("KILLED")
    again.uploaded(*again.artifacts())
    third = Outbox(tmp_path, {})
    assert (third.status, third.artifacts()) == ("KILLED", [])


def test_the_end_brings_the_files_that_every_run_has(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {}")
    (tmp_path / "figures").mkdir()
    outbox = Outbox(tmp_path, {})
    outbox.set_status("RUNNING")
    assert outbox.artifacts() == []
    outbox.set_status("FINISHED")
    assert outbox.artifacts() == [tmp_path / "config.yaml", tmp_path / "figures"]


def test_a_moved_run_finds_its_files(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    Outbox(tmp_path / "old", {}).add_standard()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = Outbox(tmp_path / "new", {})
    assert moved.artifacts() == [tmp_path / "new" / "summary.json"]


def test_a_torn_outbox_is_a_new_one(tmp_path):
    (tmp_path / "mlflow_outbox.json").write_text('{"key": "ab')
    assert len(Outbox(tmp_path, {}).key) == 32


def test_flat_params():
    config = {"a": {"b": 1, "c": [0.9, 0.95], "d": None}, "uri": "http://u:p@h", "sources": [{"pattern": "x"}]}
    assert flat_params(config) == {
        "a.b": "1",
        "a.c": "[0.9, 0.95]",
        "a.d": "null",
        "uri": "http://***@h",
        "sources": '[{"pattern": "x"}]',
    }
