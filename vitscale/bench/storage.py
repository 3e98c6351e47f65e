"""What storage costs: shards from the disk and from servers on this machine, and the first samples of a shard.

`python -m vitscale.bench.storage JSON` is the process that reads from the servers: where S3 is, its environment says.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vitscale.bench.laps import Lap, cpu_seconds, lap_figures, quiet
from vitscale.bench.photographs import open_loader
from vitscale.bench.rounds import in_turns
from vitscale.config.schema import Data, RunConfig, Train
from vitscale.data.index import ShardIndex
from vitscale.data.loader import fetched_ahead
from vitscale.data.mixture import training_order
from vitscale.data.shards import Shards
from vitscale.prepare.writer import ImageBytes, PackedSample, write_shards
from vitscale.world import child_environment

DISK, BUCKET = "disk", "bench"
_KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}
_JPEG = b"\xff\xd8\xff\xe0"  # how one begins
Serve = Callable[[Path, Connection], None]


def one_lane(batch: int) -> RunConfig:
    """Shards are entered one after the other, as by each of many lanes."""
    return RunConfig(data=Data(lanes=1, window=batch), train=Train(global_batch=batch, micro_batch=batch))


def measure_sources(folder: Path, batch: int, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Figures of an epoch of the shards in `folder` from each source, and why others were left out.

    An epoch is measured from its first batch on; where the cache is cold, it begins with an empty one.
    """
    servers: dict[str, Serve] = {"http": _serve_http, "s3": _serve_s3}
    left_out = {}
    if not all(map(importlib.util.find_spec, ("moto", "boto3", "obstore"))):  # not imported: the server is a fork
        del servers["s3"]
        left_out["s3"] = "not installed: pip install 'moto[server]' boto3 obstore"
    with contextlib.ExitStack() as running:
        urls = {name: running.enter_context(_server(serve, folder)) for name, serve in servers.items()}
        place = {"AWS_ENDPOINT_URL": urls["s3"], "AWS_ALLOW_HTTP": "true"} if "s3" in urls else {}
        roots = {name: f"s3://{BUCKET}" if name == "s3" else url for name, url in urls.items()}
        done = subprocess.run(
            [sys.executable, "-m", "vitscale.bench.storage", json.dumps([str(folder), roots, batch, rounds])],
            env=child_environment() | _KEYS | place, stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    laps = {name: [Lap(*lap) for lap in own] for name, own in json.loads(done.stdout.splitlines()[-1]).items()}
    return lap_figures(laps, DISK), left_out


def _epochs(folder: Path, roots: dict[str, str], batch: int, rounds: int) -> dict[str, list[Lap]]:
    config = one_lane(batch)
    with tempfile.TemporaryDirectory(dir=folder) as caches:
        epochs = {DISK: partial(_epoch, folder, config, str(folder))}
        for name, root in roots.items():
            warm, cold = (replace(config, data=replace(config.data, cache=f"{caches}/{name}{i}")) for i in (0, 1))
            epochs |= {
                f"{name}, cache warm": partial(_epoch, folder, warm, root),
                f"{name}, cache cold": partial(_epoch, folder, cold, root, Path(str(cold.data.cache))),
                f"{name}, no cache": partial(_epoch, folder, config, root),
            }
        laps = in_turns(epochs, 1 + rounds)
    return {name: own[1:] for name, own in laps.items()}  # the first fills caches and makes tables


def _epoch(folder: Path, config: RunConfig, root: str, emptied: Path | None = None) -> Lap:
    if emptied is not None:
        shutil.rmtree(emptied, ignore_errors=True)
    shards = len(list(folder.glob("*.tar")))
    pattern = f"{root}/bench-{{000000..{shards - 1:06d}}}.tar"
    with open_loader(folder, config, pattern, f"{root}/index.json") as loader:
        loader.release(next(loader))
        cpu, began, images = cpu_seconds(), time.perf_counter(), 0
        total = int(ShardIndex.load(folder / "index.json").total)
        while images + 2 * config.train.micro_batch <= total:
            batch = next(loader)
            images += len(batch)
            loader.release(batch)
        return Lap((time.perf_counter() - began) / images, (cpu_seconds() - cpu) / images)


@contextlib.contextmanager
def _server(serve: Serve, folder: Path) -> Iterator[str]:
    """The URL of a server of `folder`, in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(serve, folder, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here.recv()
    finally:
        process.kill()
        process.join()


def _serve(serve: Serve, folder: Path, tell: Connection) -> None:
    quiet()  # a line a request
    serve(folder, tell)


def _serve_http(folder: Path, tell: Connection) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_GET(self) -> None:
            """Ranges, which Python's own server does not know."""
            path = folder / Path(self.path).name if self.path.count("/") == 1 else folder  # no tables, as in the bucket
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or size - 1) + 1, size)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(end - start))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
            self.end_headers()
            with open(path, "rb") as file:
                while start < end:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tell.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def _serve_s3(folder: Path, tell: Connection) -> None:
    server = importlib.import_module("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    key, secret, region = _KEYS.values()
    client = importlib.import_module("boto3").client(
        "s3", endpoint_url=url, region_name=region, aws_access_key_id=key, aws_secret_access_key=secret
    )
    client.create_bucket(Bucket=BUCKET)
    for path in (*folder.glob("*.tar"), folder / "index.json"):
        client.upload_file(str(path), BUCKET, path.name)
    tell.send(url)
    tell.recv()  # until it is killed


def measure_new_shards(folder: Path, samples: int, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to read a batch within shards and where it enters one, of `samples` small samples each."""
    image = ImageBytes("jpg", _JPEG + np.random.default_rng(0).bytes(1000))
    shards = [[PackedSample(f"{i:06d}", image, len(image.data), str(i % 10)) for i in range(samples)] for _ in range(8)]
    index, config = write_shards(shards, folder, "small"), one_lane(batch)
    order = training_order(config, index.samples, index.sources)
    ahead, kept = fetched_ahead(order, samples, batch, 1)
    times, enters = [], []
    for _ in range(rounds):
        reading, seen, taken = Shards(index, "cls", kept), set[int](), []
        for number in range(order.batches_per_epoch):
            began = time.perf_counter()
            reading.fetch(order.shards_ahead(number, 0, batch, ahead).tolist())
            ids = order.refs(number, 0, batch).ids
            for sample_id in ids.tolist():
                reading.read(sample_id)
            taken.append(time.perf_counter() - began)
            enters.append(not seen.issuperset(ids >> 32))
            seen |= set((ids >> 32).tolist())
        times.append(taken)
    least = np.min(times, axis=0)[1:] * 1000  # the machine's other work falls on a batch in one round, not in all
    enter = np.array(enters[1 : len(times[0])])
    within = statistics.median(least[~enter].tolist())
    return {
        "shards_entered": int(enter.sum()),
        "ms_within": within,
        "ms_entering": statistics.median(least[enter].tolist()),
        "most_extra_ms": float(least[enter].max()) - within,
    }


if __name__ == "__main__":
    folder, roots, batch, rounds = json.loads(sys.argv[1])
    found = _epochs(Path(folder), roots, batch, rounds)
    print(json.dumps({name: [[lap.seconds, lap.cpu_seconds] for lap in own] for name, own in found.items()}))
