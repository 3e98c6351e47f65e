"""The device feed on a GPU: the CPU's values, beside what the device computes, from memory that is pinned in place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.data.makers import encoded, write_tar
from tests.data.test_loader import SETTINGS, loader, ready
from vitscale.augment.feed import DeviceFeed
from vitscale.augment.pipeline import Augment
from vitscale.config.augmentation import Augmentation
from vitscale.data.batch import Batch
from vitscale.data.crop import CenterCrop
from vitscale.data.index import ShardIndex, build_index
from vitscale.data.loader import Loader
from vitscale.data.order import SequentialOrder

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SECOND = 1_500_000_000  # cycles, about


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Sizes that let the memories grow, some to several times of their first."""
    random = np.random.default_rng(0)
    sides = [40, 60, 900, 200, 1500, 100, 1000, 50, 30, 1700, 80, 1200]
    images = [np.kron(random.integers(0, 256, (10, 10, 3), np.uint8), np.ones((side // 10, side // 10, 1), np.uint8))
              for side in sides]  # fmt: skip
    members = [(f"{i}.{kind}", data) for i, image in enumerate(images)
               for kind, data in (("jpg", encoded(image)), ("cls", str(i).encode()))]  # fmt: skip
    return build_index([str(write_tar(tmp_path_factory.mktemp("shards") / "a.tar", members))])


def opened(index: ShardIndex) -> Loader:
    data = replace(SETTINGS, prefetch=2)
    return loader(index, order=SequentialOrder(index.samples, 2), batch=2, micro=2, crop=CenterCrop(1.0), data=data)


def feed_of(batches: Loader, device: torch.device) -> DeviceFeed[Batch]:
    return DeviceFeed(batches, Augment(Augmentation(), (96, 64), 3, str(device), train=True, labels=True), device)


@contextmanager
def both(index: ShardIndex) -> Iterator[tuple[DeviceFeed[Batch], DeviceFeed[Batch]]]:
    """The same batches on the CPU and on the GPU."""
    with ExitStack() as stack:
        feeds = [feed_of(stack.enter_context(opened(index)), device) for device in (torch.device("cpu"), CUDA)]
        on_cpu, on_gpu = map(stack.enter_context, feeds)
        yield on_cpu, on_gpu


@pytest.mark.parametrize("ahead", [False, True])
def test_gives_the_cpus_values(index: ShardIndex, ahead: bool) -> None:
    with both(index) as (on_cpu, on_gpu):
        for _ in range(6):
            expected, given = next(on_cpu), next(on_gpu)
            torch.cuda._sleep(SECOND // 50)  # as if the device computed
            if ahead:
                on_gpu.run_ahead()
            assert given.names == expected.names
            for name, value in expected.inputs.items():
                assert given.inputs[name].device.type == "cuda"
                torch.testing.assert_close(given.inputs[name].cpu(), value, rtol=0, atol=1e-4)
        with pytest.raises(StopIteration):
            next(on_gpu)


def test_runs_beside_what_the_device_computes(index: ShardIndex) -> None:
    with opened(index) as batches, feed_of(batches, CUDA) as feed:
        for _ in range(3):
            next(feed)  # kernels are loaded, memories are pinned
        torch.cuda.synchronize()
        feed.read_seconds()
        assert ready(batches)
        torch.cuda._sleep(2 * SECOND)
        computed = torch.cuda.Event()
        computed.record()
        feed.run_ahead()
        assert isinstance(feed._ahead, tuple)
        feed._ahead[1].synchronize()
        assert not computed.query(), "the batch is ready before the device is done with what was queued"
        next(feed)
        torch.cuda.synchronize()
        seconds = feed.read_seconds()
        assert seconds["data"] < 0.1  # of the two seconds or so
        assert seconds["augment"] > 0


class Slow(Loader):
    def __next__(self) -> Batch:
        time.sleep(0.3)
        return super().__next__()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_devices_wait_is_what_the_loader_took_beyond_the_computing(index: ShardIndex, ahead: bool) -> None:
    with opened(index) as batches, feed_of(batches, CUDA) as feed:
        for _ in range(2):
            next(feed)
        torch.cuda.synchronize()
        feed.read_seconds()
        batches.__class__ = Slow
        for computing, waited in ((0, True), (2 * SECOND, False)):
            torch.cuda._sleep(computing)
            if ahead:
                assert ready(batches)
                feed.run_ahead()
            next(feed)
            torch.cuda.synchronize()
            assert (feed.read_seconds()["data"] > 0.25) == waited


def test_memories_are_pinned_in_place_while_the_feed_is_open(index: ShardIndex) -> None:
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    with opened(index) as batches:
        with feed_of(batches, CUDA) as feed:
            for _ in feed:
                feed.run_ahead()
                for number, memory in feed._streams._pinned.items():
                    assert torch.from_numpy(memory).is_pinned()
                    seen[number].add(memory.nbytes)
        assert all(len(sizes) > 1 for sizes in seen.values()), "both memories grew"
        for memory in batches._memories:
            assert not torch.from_numpy(memory.mapped).is_pinned()


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(
    index: ShardIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    cudart = torch.cuda.cudart()
    with both(index) as (on_cpu, on_gpu):
        pin = on_gpu._streams.pin

        def pinned_by_another(number: int, memory: np.ndarray) -> None:
            """CUDA refuses what is pinned already."""
            torch.cuda.check_error(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
            pin(number, memory)
            torch.cuda.check_error(cudart.cudaHostUnregister(memory.ctypes.data))

        on_gpu._streams.pin = pinned_by_another
        for _ in range(4):
            expected, given = next(on_cpu).inputs["pixel_values"], next(on_gpu).inputs["pixel_values"]
            torch.testing.assert_close(given.cpu(), expected, rtol=0, atol=1e-4)
    assert capsys.readouterr().err.count("cannot be pinned") == 1


def test_a_batch_lasts_while_it_is_computed_with(index: ShardIndex) -> None:
    """Its memory is not given to the next ones before the stream that computes has read it."""
    with opened(index) as batches, feed_of(batches, CUDA) as feed:
        fed = next(feed)
        expected = fed.inputs["pixel_values"].clone()
        torch.cuda.synchronize()
        torch.cuda._sleep(SECOND // 2)
        late = fed.inputs["pixel_values"] * 1
        del fed
        for _ in range(3):
            feed.run_ahead()
            next(feed)
        assert torch.equal(late, expected)
