"""The loop on real ranks over gloo: what they tell each other of a step is agreed one step later, or before a row."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from tests.engine.test_loop import Feed, make_loop
from tests.engine.test_ranks import in_world
from vitscale.engine.exchange import Agreement, Consumed, StepExchange
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import DataError

TIMEOUT = timedelta(seconds=60)


def _ranks(rank: int, world_size: int, port: int, backend: str) -> ProcessRanks:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(backend, timeout=TIMEOUT)
    return ProcessRanks(TIMEOUT)


def _train(rank: int, world_size: int, port: int, backend: str, answers: Any) -> None:
    """Rank 1 is asked to stop during step 5, between rows; micro-batches 1 and 8 (of steps 1 and 5) are bad on rank 0
    and 1; then a loop whose bad samples, all on the last rank, are too many."""
    ranks = _ranks(rank, world_size, port, backend)
    feed = Feed([], [1, 8] if rank < 2 else [], f"rank{rank}")
    parts: dict[str, Any] = {"engine_parts": {"ranks": ranks}, "log": 4, "trace": True}
    loop, events, rows = make_loop(100, feed=feed, stop_at=5 if rank == 1 else None, **parts)
    done = loop.run()
    tasks = [event for event in events if event.split()[0] in ("log", "save")]
    bad = Feed([], range(99) if rank == world_size - 1 else [], f"rank{rank}")
    loop, _, quarantined = make_loop(100, feed=bad, max_bad_fraction=0.0, **parts | {"trace": False})
    with pytest.raises(DataError, match="4 bad samples") as caught:
        loop.run()
    answers.put((rank, done, tasks, rows, vars(loop.state), str(caught.value), quarantined))
    ranks.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_stop_is_agreed_one_step_late_by_all(world_size: int) -> None:
    answers = in_world(world_size, "gloo", _train)
    for rank, done, tasks, rows, state, error, _ in answers:
        assert not done
        assert tasks == ["save 3", "log 4", "save 6"]
        metrics = [row for file, row in rows if file == "metrics.jsonl"]
        assert [(row["step"], row["loss"], row["bad_samples"]) for row in metrics] == [(4, 6.5, 2)]
        assert state["step"] == 2, "the bound of 3 is met by the second step, whose row is due"
        assert error == answers[0][5], "one rank has the bad samples, and all name the same one"
        if rank:
            assert {file for file, _ in rows} == {"metrics.jsonl"}
    (_, _, _, rows, _, _, quarantined), *_ = answers
    traced = [row for file, row in rows if file == "trace.jsonl"]
    assert [row["step"] for row in traced] == [1, 2, 3, 4, 5, 6]
    for step, row in enumerate(traced, 1):
        names = [(f"rank{rank}/{number}a", f"rank{rank}/{number}b")
                 for rank in range(world_size) for number in (2 * step - 2, 2 * step - 1)]  # fmt: skip
        assert row["sample_keys"] == [name for pair in names for name in pair]
    replaced = [row["step"] for file, row in rows if file == "quarantine.jsonl"]
    assert replaced == [1, 1, 5, 5]
    assert [row["step"] for file, row in quarantined if file == "quarantine.jsonl"] == [1, 1, 2, 2]


def test_what_was_agreed_is_told_once() -> None:
    exchange = StepExchange(ProcessRanks(TIMEOUT), ("label", "decode"))
    assert exchange.finish() is None
    consumed = [Consumed(["a"], [], 0, 2), Consumed(["b"], [], 0, 1)]
    exchange.start(7, 0.5, {"stop": False, "save": True}, consumed, retries=4)
    assert exchange.finish() == Agreement(7, 0.5, frozenset({"save"}), {"label": 0, "decode": 0}, 7)
    assert exchange.finish() is None
