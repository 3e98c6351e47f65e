"""A cache of the values used most recently: each made once, by the first thread that asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """The values most recently asked for, up to a total weight. For many threads at once."""

    def __init__(self, make: Callable[[Key], Value], capacity: int, weigh: Callable[[Value], int]) -> None:
        self._make, self._capacity, self._weigh = make, capacity, weigh
        self._lock = Lock()
        self._entries: OrderedDict[Key, Future[Value]] = OrderedDict()
        self._weight = 0

    def get(self, key: Key) -> Value:
        """The value of `key`; what `make` raises is raised to all who wait, and tried again by the next that asks."""
        with self._lock:
            future = self._entries.get(key)
            is_first = future is None
            if future is None:
                future = self._entries[key] = Future()
            self._entries.move_to_end(key)
        if is_first:
            self._fill(key, future)
        return future.result()

    def forget(self, key: Key) -> None:
        """Make the value anew when it is asked for again. One that is being made stays."""
        if key not in self._entries:  # the common case, without the lock
            return
        with self._lock:
            future = self._entries.get(key)
            if future is not None and future.done():
                self._weight -= self._weigh(self._entries.pop(key).result())

    def _fill(self, key: Key, future: Future[Value]) -> None:
        try:
            value = self._make(key)
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            future.set_exception(error)
            return
        with self._lock:
            future.set_result(value)
            self._weight += self._weigh(value)
            for old in list(self._entries):
                if self._weight <= self._capacity:
                    break
                if old != key and self._entries[old].done():
                    self._weight -= self._weigh(self._entries.pop(old).result())
