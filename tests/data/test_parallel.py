from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from vitscale.data.parallel import on_shards
from vitscale.files.store import FileStat

_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Shard:
    path: str
    stat: FileStat


def _takes_the_lock(shard: _Shard) -> bool:
    return _LOCK.acquire(timeout=0.5)


def test_what_a_thread_has_locked_is_free_in_the_processes() -> None:
    """As in a rank, whose threads write, listen and beat: a fork would have their locks and not them."""
    done = threading.Event()

    def hold() -> None:
        with _LOCK:
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        while not _LOCK.locked():
            time.sleep(0.001)
        shards = [_Shard(f"/shards/{number}.tar", FileStat(1, 0)) for number in range(2)]
        assert any(on_shards(_takes_the_lock, shards, "trying", workers=2))
    finally:
        done.set()
        thread.join()
