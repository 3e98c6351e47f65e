"""Where the parts meet: pretrain(config) from shards to a finished run and its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitscale import __version__
from vitscale.augment.pipeline import Augment
from vitscale.checkpoint.store import Checkpoint, open_checkpoint, open_newest, save_checkpoint
from vitscale.config.check import check_config, has_classes, pair
from vitscale.config.load import dump_config, load_config
from vitscale.config.schema import RunConfig, as_dict
from vitscale.data.batch import Replacement
from vitscale.data.classes import class_names
from vitscale.data.crop import RandomCrop
from vitscale.data.decode import choose_decoder
from vitscale.data.index import ShardIndex, open_index, require_labels
from vitscale.data.loader import Loader
from vitscale.data.order import Order
from vitscale.engine.backend import Backend, Engine, Inputs, load_weights, peak_memory
from vitscale.engine.loop import LoopCalls, TrainState, train
from vitscale.engine.preempt import StopRequest
from vitscale.engine.records import Records
from vitscale.errors import CheckpointError, ConfigError, LaunchError, VitscaleError
from vitscale.evaluation.figures import draw_curves
from vitscale.export.checkpoint import export_run
from vitscale.interop.loading import start_from
from vitscale.launch.torchrun import folder_of
from vitscale.models.auto import build_model, initialize, model_keys
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED, RunFolder, write_atomically
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.outbox import flat_params
from vitscale.world import World


def pretrain(config: RunConfig, world: World) -> int:
    """Train, or go on where this run stopped; the exit code (DONE or STOPPED).

    Start order: this run's newest good checkpoint > checkpoint.resume_from > model.init_from > scratch.
    """
    check_config(config, world)
    folder = folder_of(config)
    with contextlib.ExitStack() as stack:
        if world.is_main:
            stack.enter_context(folder.held())
            if not world.supervised:  # else the launcher has cleared both, and what came since then counts
                folder.clear_exit()
                folder.stop.unlink(missing_ok=True)
        try:
            return _Pretraining(config, world, folder).run()
        except VitscaleError as error:
            # The first rank to fail says why; the others fail because of it, or with the same words.
            error.told = not folder.write_exit(BAD_INPUT, None, str(error))
            raise
        except Exception as error:
            if not folder.write_exit(FAILED, None, f"{type(error).__name__}: {error}"):
                said = folder.read_exit()  # another rank failed first: its peers' closed connections are no news
                assert said is not None
                return int(said["code"])
            raise


class _Pretraining:
    """One start of a run, from its config to its end."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder) -> None:
        self.config, self.world, self.folder = config, world, folder
        # Rank 0 scans the shards before it joins the others: a missing one is told at once.
        index = self._open_index() if world.is_main else None
        self.backend = Backend(config, world)
        self.ranks = self.backend.ranks
        self.ranks.barrier()
        # Not before: a rank that waits in C++ for the others could not answer a TERM.
        self.stop = StopRequest(folder.path, looks=world.local_rank == 0, clears=world.is_main)
        self.index = index or self._open_index()
        self.config = config = self._with_class_names()
        self.decoder = choose_decoder(config.data.decode)
        self._preflight()
        data, train = config.data, config.train
        self.order = Order(self.index.samples, config.run.seed, train.global_batch, data.lanes, data.window)
        self.total_steps = train.steps or max(1, int((train.epochs or 0) * self.order.batches_per_epoch))

    def run(self) -> int:
        with torch.device("meta"):  # `initialize` gives it memory; torch's own initial values are never drawn
            model = build_model(self.config)
        initialize(model, self.config.run.seed)
        self.parameters = sum(p.numel() for p in model.parameters())  # ZeRO-3 leaves none of them whole
        checkpoint, state = self._start(model)
        if self.world.is_main:
            self._describe(model)
        done = state.step >= self.total_steps
        if not (done and self.ranks.gather(self.world.is_main and self._is_finished(state))[0]):
            with Records(self.folder, self.config, self.world, self.total_steps, state.step) as records:
                done = done or self._train(model, checkpoint, state, records)
                if done:
                    self._finish(state)
                records.status = "FINISHED" if done else "KILLED"
        self._say(f"{'done' if done else 'stopped'}: step {state.step} of {self.total_steps}")
        code = DONE if done else STOPPED
        self.stop.honour()
        if self.world.is_main:
            self.folder.write_exit(code, state.step, "done" if done else "stopped on request")
        self.ranks.barrier()
        self.backend.close()
        return code

    def _train(
        self, model: ViTPreTrainedModel, checkpoint: Checkpoint | None, state: TrainState, records: Records
    ) -> bool:
        if self.world.is_main:
            self._tell_changes()
            write_atomically(self.folder.config, dump_config(self.config))
        engine = self.backend.wrap(model, self.config)
        if checkpoint is not None:
            engine.restore(checkpoint)
        with self._loader(state.samples) as loader:
            calls = LoopCalls(lambda state: self._save(engine, state, records), records.log, records.record)
            feed = _feed(loader, self.config, self.backend.device)
            return train(engine, feed, state, self.total_steps, self.config, calls, self.stop)

    def _tell_changes(self) -> None:
        """The keys that differ from those of the run's last start."""
        if not self.folder.config.exists():
            return
        try:
            last = load_config(self.folder.config)
        except ConfigError as error:  # written by another version: news, but no reason to stop
            self._say(f"config: the one of the last start cannot be compared: {error}")
            return
        before, now = flat_params(as_dict(last)), flat_params(as_dict(self.config))
        for key, value in now.items():
            if before.get(key) != value and key not in ("train.steps", "train.epochs"):  # told as the new total
                self._say(f"config: {key} was {before.get(key)}, is {value}")

    def _open_index(self) -> ShardIndex:
        data = self.config.data
        if not data.train:
            raise ConfigError("data.train is empty: give the shards, say data.train='/data/train-{000000..000099}.tar'")
        index = open_index(data.train, data.index, self.folder.path, label=data.label)
        if self.config.objective.needs_labels:
            require_labels(index, data.label)
        return index

    def _with_class_names(self) -> RunConfig:
        """The config, and in it the names of classes that have none, where they lie beside the shards."""
        config, model = self.config, self.config.model
        if not has_classes(config) or not config.objective.needs_labels or model.id2label is not None:
            return config
        names = class_names(self.index.paths)
        if names is None or len(names) != model.num_labels:
            return config
        return replace(config, model=replace(model, id2label=tuple(names)))

    def _preflight(self) -> None:
        """All ranks must have the same folder, config, data and code, or they would train different runs."""
        mine = {
            "run folder": f"held by {self.folder.holder()}",
            "config": _digest(self.config),
            "index": self.index.digest,
            "decoder": self.decoder,
            "version of vitscale": __version__,
        }
        for rank, theirs in enumerate(self.ranks.gather(mine)):
            for what, value in theirs.items():
                if value != mine[what]:
                    raise LaunchError(
                        f"rank {rank} has another {what} ({value}) than rank {self.ranks.rank} ({mine[what]}): "
                        "start all ranks with one command on one shared folder"
                    )

    def _start(self, model: ViTPreTrainedModel) -> tuple[Checkpoint | None, TrainState]:
        """Where the run starts from, in the order that `pretrain` tells; `model` has the weights after it."""
        config = self.config
        checkpoint = open_newest(self.folder.checkpoints, self.ranks, self._say)
        if checkpoint is None and config.checkpoint.resume_from:
            checkpoint = open_checkpoint(Path(config.checkpoint.resume_from), self.ranks)
        if checkpoint is not None:
            return checkpoint, self._resumed(checkpoint, model)
        if config.model.init_from:
            report = start_from(model, Path(config.model.init_from))
            self._say(f"start: weights of {config.model.init_from}")
            for what, names in (("new here", report.fresh), ("of it not used", report.unused)):
                self._say(f"  {what}: {', '.join(names) or 'nothing'}")
        else:
            self._say("start: from scratch")
        return None, TrainState()

    def _resumed(self, checkpoint: Checkpoint, model: nn.Module) -> TrainState:
        config, saved = self.config, checkpoint.state
        self._say(f"start: {checkpoint.folder}, step {saved['step']} of {self.total_steps}")
        for name, value in self._what_decides_the_order().items():
            if saved["order"][name] != value:
                raise CheckpointError(
                    f"{checkpoint.folder}: was saved with {name}={saved['order'][name]}, this run has {value}: samples "
                    "would be repeated or skipped; set it back, or start another run.name with model.init_from"
                )
        here = model_keys(config)
        differing = [f"{key} (saved {saved['model'].get(key)}, here {here.get(key)})"
                     for key in sorted(here.keys() | saved["model"].keys()) if saved["model"].get(key) != here.get(key)]
        if differing:
            raise CheckpointError(
                f"{checkpoint.folder}: is of another model: {', '.join(differing)}; set them back, "
                "or start another run.name"
            )
        if saved["total_steps"] != self.total_steps:  # also where other data made the epochs longer
            self._say(f"steps: {saved['total_steps']} before, {self.total_steps} now; lr follows the new total")
        if saved["decoder"] != self.decoder:
            self._say(f"decoder: {saved['decoder']} before, {self.decoder} now; pixels may differ in their last bits")
        load_weights(model, checkpoint)
        return TrainState(**{name: saved[name] for name in TrainState.__dataclass_fields__})

    def _what_decides_the_order(self) -> dict[str, Any]:
        config = self.config
        return {
            "run.seed": config.run.seed,
            "train.global_batch": config.train.global_batch,
            "data.lanes": config.data.lanes,
            "data.window": config.data.window,
            "the index": self.index.digest,
        }

    def _loader(self, samples: int) -> Loader:
        config = self.config
        return Loader(
            index=self.index,
            order=self.order,
            crop=RandomCrop(config.augment.crop_scale, config.augment.crop_ratio),
            data=config.data,
            num_channels=config.model.num_channels,
            seed=config.run.seed,
            world=self.world,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            start=samples,
            needs_labels=config.objective.needs_labels,
            num_labels=config.model.num_labels if has_classes(config) else None,
            image_size=pair(config.model.image_size),
        )

    def _save(self, engine: Engine, state: TrainState, records: Records) -> None:
        records.sync()  # a checkpoint must not know of rows that a power cut can take
        manifest = asdict(state) | {
            "adam_step": engine.adam_step,
            "total_steps": self.total_steps,
            "order": self._what_decides_the_order(),
            "model": model_keys(self.config),
            "world_size": self.world.world_size,
            "zero_stage": engine.stage,
            "precision": self.config.train.precision,
            "decoder": self.decoder,
            "config": _digest(self.config),
            "vitscale": __version__,
        }
        keep = self.config.checkpoint.keep
        save_checkpoint(self.folder.checkpoints, state.step, engine.pieces(), manifest, self.ranks, keep)

    def _is_finished(self, state: TrainState) -> bool:
        """Whether an earlier start has got as far as its summary, which is written last."""
        if not self.folder.summary.exists() or not self.folder.model.exists():
            return False
        return json.loads(self.folder.summary.read_text(encoding="utf-8")).get("steps") == state.step

    def _finish(self, state: TrainState) -> None:
        """At the end, by rank 0: the model as others open it, the loss curve, a summary."""
        peaks = self.ranks.gather(peak_memory(self.backend.device))
        if not self.world.is_main:
            return
        out = export_run(self.folder.path)
        rows = JsonlFile(self.folder.metrics).rows()
        draw_curves(rows, self.folder.figures / "loss.png")
        summary = {
            "run": self.config.run.name,
            "steps": state.step,
            "samples": state.samples,
            "images": self.index.total,
            "epochs": state.step / self.order.batches_per_epoch,
            "loss": rows[-1]["loss"] if rows else None,
            "parameters": self.parameters,
            "peak_memory_bytes": peaks,
            "world_size": self.world.world_size,
            "zero_stage": self.config.parallel.zero_stage,
            "precision": self.config.train.precision,
            "device": self.world.device,
            "decoder": self.decoder,
            "skipped_steps": state.skipped,
            "bad_samples": state.bad,
            "model": str(out),
            "vitscale": __version__,
        }
        write_atomically(self.folder.summary, json.dumps(summary, indent=2) + "\n")

    def _describe(self, model: nn.Module) -> None:
        """What is about to run, for the terminal."""
        config, world, order = self.config, self.world, self.order
        self._say(f"run: {self.folder.path} (vitscale {__version__})")
        self._say(f"model: {type(model).__name__}, {self.parameters:,} parameters")
        self._say(
            f"data: {self.index.total:,} samples in {len(self.index.names)} shards, "
            f"{order.batches_per_epoch} steps an epoch, decoded by {self.decoder}"
        )
        self._say(
            f"train: {self.total_steps} steps of {config.train.global_batch} images "
            f"({self.total_steps / order.batches_per_epoch:.1f} epochs), {world.world_size} rank(s) on {world.device}, "
            f"ZeRO {config.parallel.zero_stage}, {config.train.precision}"
        )

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)


@dataclass(frozen=True)
class _FedBatch:
    """A micro-batch as the loop wants it."""

    inputs: Inputs
    names: tuple[str, ...]
    replaced: tuple[Replacement, ...]
    epoch: int


def _feed(loader: Loader, config: RunConfig, device: torch.device) -> Iterator[_FedBatch]:
    """Decoded batches, augmented on the device, as the model's keyword arguments."""
    augment = Augment(config.augment, pair(config.model.image_size), config.model.num_channels, str(device), train=True)
    for batch in loader:
        inputs = {
            "pixel_values": augment(batch),
            "sample_key": torch.from_numpy(batch.sample_keys).to(device),
        }
        if config.objective.needs_labels:
            inputs["labels"] = torch.from_numpy(batch.labels).to(device)
        yield _FedBatch(inputs, batch.names, batch.replaced, batch.epoch)


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]
