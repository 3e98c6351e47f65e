"""A run from its shards to its trained weights: the parts of the package put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from vitscale import __version__, heartbeat
from vitscale.augment.feed import DeviceFeed
from vitscale.augment.pipeline import Augment
from vitscale.checkpoint.store import Checkpoint
from vitscale.config.check import one_to_choose, too_few_lanes
from vitscale.config.load import dump_config
from vitscale.config.schema import RunConfig
from vitscale.config.step import auto_keys
from vitscale.data.index import ShardIndex
from vitscale.data.loader import Loader
from vitscale.data.subset import Subset
from vitscale.engine import digest
from vitscale.engine.compile_cache import keep_compiled, load_compiled
from vitscale.engine.engine import Engine
from vitscale.engine.guard import Diverged
from vitscale.engine.loop import PeriodicTask, TrainingLoop, TrainState, every_n_steps
from vitscale.engine.pace import Pace, SlowRanks
from vitscale.engine.preempt import StopRequest
from vitscale.engine.records import Records
from vitscale.engine.room import Room, peak_memory, room
from vitscale.evaluation.figures import draw_curves
from vitscale.evaluation.validation import HeldOut
from vitscale.faults import fault_point
from vitscale.files.atomic import write_atomically
from vitscale.files.header import CAUSES
from vitscale.launch.snapshot import code_version, commit
from vitscale.lease import NOBODY, FolderLost, Lease, folder_gone
from vitscale.models.auto import new_model
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.run.auto import prove
from vitscale.run.export import export_run
from vitscale.run.preflight import room_warning
from vitscale.run.probes import Probes
from vitscale.run.report import report
from vitscale.run.rollback import after_divergence, refuse_the_same_end
from vitscale.run.saves import Saves
from vitscale.run.scoring import Scoring
from vitscale.run.session import Session, open_session
from vitscale.run.start import find_checkpoint, keep_shards, say_changed_keys, start
from vitscale.run.training_data import training_loader
from vitscale.run_folder import DONE, STOP_REASON, STOPPED, RunFolder
from vitscale.tracking.jsonl import JsonlFile
from vitscale.tracking.meters import Meters
from vitscale.tracking.startup import StartUp, as_line, slowest
from vitscale.world import World


class Job:
    """One start of a run: pretraining, and what other kinds of run share with it. Making it does no I/O.

    Another kind of run overrides some of `prepare`, `look_at_data`, `build`, `engine`, `loader`, `augment`, `tasks` and
    `finish`.
    """

    adapts = False  # whether weights of another image size or other channels are made to fit

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder.at(config.run.dir, config.run.name, world.attempt)
        self.chosen = auto_keys(config)  # what this start decides
        self.room: Room | None = None  # what this rank had before it made anything
        self._startup = StartUp()
        self._startup_seconds: dict[str, float] = {}  # of its parts, on the slowest rank of each
        self.lease: Lease | None = None  # rank 0's
        self.owner: str | None = None  # who this run has agreed to hold the folder
        self._written: frozenset[int] = frozenset()  # steps of the checkpoints that this start has saved
        self._reader_memory = 0  # the most that the process which reads for this rank has had

    def run(self) -> int:
        """From joining the process group to leaving it; DONE, or STOPPED with a checkpoint saved."""
        with StopRequest(self.folder, self.world) as stop:
            return self._run(stop)

    def _run(self, stop: StopRequest) -> int:
        startup = self._startup
        startup.done("imports")
        if self.world.is_main:
            refuse_the_same_end(self.folder, self.config)
            self.prepare()
        session = open_session(self.config, self.world, self.folder, startup, stop, self.look_at_data, self.adapts)
        self.owner, self.config = session.folder.owner(), session.config
        self.room = room(self.world, session.backend.device)
        fault_point("joined")
        checkpoint, probes = find_checkpoint(session), Probes(session)
        model = self.build(session, drawn=checkpoint is None or probes.wants("untrained"))
        parameters = model.num_parameters()  # ZeRO-3 leaves none of them whole
        probes.baseline("untrained", model)
        startup.done("model")
        state = start(session, model, checkpoint)
        startup.done("weights")
        if checkpoint is None and session.config.model.init_from:
            probes.baseline("the start", model)
        fault_point("restored")
        self._describe(session, model, parameters)
        done = state.is_done(session.total_steps)
        if not (done and self._is_finished(session, state)):
            with self._records(session, state) as records:
                done = done or self._train(session, model, checkpoint, state, records)
                if done:
                    self.finish(session, state, parameters)
                records.status = "FINISHED" if done else "KILLED"
        session.say(f"{'done' if done else 'stopped'}: step {state.step} of {session.total_steps}{_of_best(state)}")
        if done:
            session.say(f"the weights are in {session.folder.model}, what came of it in {session.folder.report}")
        session.stop.clear()
        code = DONE if done else STOPPED
        if self.world.is_main:
            self.folder.write_exit(code, state.step, "done" if done else STOP_REASON)
        session.ranks.barrier()
        session.backend.close()
        return code

    def prepare(self) -> None:
        """What rank 0 does before it looks for the data."""

    def look_at_data(
        self, config: RunConfig, index: ShardIndex, training: Subset | None, held_out: HeldOut | None
    ) -> Any:
        """What rank 0 finds in the data before it joins the others: `data_facts` of the session."""

    def build(self, session: Session, drawn: bool) -> ViTPreTrainedModel:
        """The model on the CPU with its initial values, the same on every rank; without them if not `drawn`."""
        return new_model(session.config, session.config.run.seed, drawn)

    def engine(self, session: Session, model: ViTPreTrainedModel) -> Engine:
        """The engine that trains `model`. See Backend.wrap for learning rates by parameter, and what is not decayed."""
        return session.backend.wrap(model, session.config)

    def loader(self, session: Session, samples: int) -> Loader:
        """This rank's training batches after so many global samples of the order."""
        return training_loader(session.config, session.index, session.order, session.world, samples)

    def augment(self, session: Session) -> Augment:
        """What makes a training batch the model's inputs."""
        return Augment.of(session.config, str(session.backend.device), train=True)

    def tasks(
        self, session: Session, engine: Engine, records: Records, meters: Meters, saves: Saves
    ) -> Sequence[PeriodicTask]:
        """What is done once in a while, in this order.

        A row is logged before its checkpoint is saved, or a kill between them would lose the row.
        """
        config, probes = session.config, Probes(session)
        scoring = Scoring(session, probes.images)
        several = self.world.world_size > 1
        paces = SlowRanks(Pace(engine.module, engine.device), session.ranks, records.say) if several else None

        def log(state: TrainState, row: dict[str, Any]) -> None:
            self.require_lease()
            measured = meters.read()
            if paces is not None:
                measured |= paces.columns(measured.get("data_share", 0.0))
            # A row that waited for this start has figures of its own.
            records.log({"save_failures": saves.failures} | measured | row)
            fault_point("row")

        def compare(state: TrainState, row: dict[str, Any]) -> None:
            digest.compare(state.step, engine.replicated(), session.ranks)

        def save(state: TrainState, row: dict[str, Any]) -> None:
            if saves.postpones(scoring.is_best(state.step)):
                return
            self.require_lease()
            if every and not compares(state.step):  # no checkpoint is to hold what is found later
                compare(state, row)
            records.sync()  # a checkpoint must not know of rows that a power cut can take
            saves.run(state)
            if self.chosen and self.world.is_main:
                prove(self.folder)
            if config.train.compile:
                keep_compiled(session.folder.path, session.world)

        def is_saved(step: int) -> bool:
            return saves.due(step) or scoring.is_best(step)

        logs = every_n_steps(config.log.every_steps)
        every = config.guard.digest_every_steps if several else None
        compares = every_n_steps(every or 1)
        held_out = [PeriodicTask("validation", scoring.due, partial(scoring.run, engine))] * scoring.is_wanted
        if probes.is_wanted:
            held_out.append(PeriodicTask("evaluation", probes.due, partial(probes.run, engine)))
        elif scoring.is_wanted:
            held_out.append(PeriodicTask("evaluation", lambda step: False, partial(scoring.draw, engine)))  # at the end
        return (
            *held_out,
            PeriodicTask("tracking", lambda step: logs(step) or scoring.due(step) or probes.due(step), log),
            *([PeriodicTask("digest", compares, compare, at_stop=True)] if every else []),
            PeriodicTask("save", is_saved, save, at_stop=True),
        )

    def finish(self, session: Session, state: TrainState, parameters: int) -> None:
        """Rank 0 writes the model folder, the loss curve and summary.json. A collective."""
        peaks = session.ranks.gather(peak_memory(session.backend.device))
        readers = session.ranks.gather(self._reader_memory)
        if not session.world.is_main:
            return
        config, folder = session.config, session.folder
        out = export_run(folder.path, written=self._written)
        fault_point("exported")
        rows = JsonlFile(folder.metrics).rows()
        draw_curves(rows, folder.figures / "loss.png")
        summary = {
            "run": config.run.name,
            "steps": state.step,
            "samples": state.samples,
            "images": session.trained,
            "epochs": (state.step + state.shift // config.train.global_batch) / session.order.batches_per_epoch,
            "loss": rows[-1]["loss"] if rows else None,
            "parameters": parameters,
            "peak_memory_bytes": peaks,
            "reader_peak_bytes": readers,
            "startup_seconds": self._startup_seconds,
            "world_size": session.world.world_size,
            "zero_stage": config.parallel.zero_stage,
            "precision": config.train.precision,
            "device": session.world.device,
            "decoder": session.decoder,
            "skipped_steps": state.skipped,
            "save_failures": state.save_failures,
            "bad_samples": state.bad,
            "model": str(out),
            **({} if state.best is None else {"best": state.best}),
            "vitscale": __version__,
        }
        write_atomically(folder.summary, json.dumps(summary, indent=2) + "\n")
        fault_point("summary")
        report(folder)

    def _train(
        self,
        session: Session,
        model: ViTPreTrainedModel,
        checkpoint: Checkpoint | None,
        state: TrainState,
        records: Records,
    ) -> bool:
        """Whether training reached its end; False where it was asked to stop before."""
        config = session.config
        say_changed_keys(session)
        if session.world.is_main:
            write_atomically(session.folder.config, dump_config(config))
            keep_shards(session)
        if config.train.compile:
            load_compiled(session.folder.path, session.world)
        engine = self.engine(session, model)
        if checkpoint is not None:
            engine.restore(checkpoint)
        self._startup.done("engine")
        first = state.step + 1
        started = PeriodicTask("tracking", lambda step: step == first, partial(self._tell_startup, session))
        meters, augment = Meters(), self.augment(session)
        with (
            Saves(session, engine, state, type(self).__name__) as saves,
            self.loader(session, state.samples + state.shift) as loader,
            DeviceFeed(loader, augment, session.backend.device) as feed,
        ):
            loop = TrainingLoop(
                engine=engine,
                feed=feed,
                state=state,
                total_steps=session.total_steps,
                config=config,
                tasks=[*self.tasks(session, engine, records, meters, saves), started],
                record=records.record,
                say=records.say,
                causes=CAUSES,
                stop=session.stop,
                meters=meters,
                startup=self._startup,
            )
            try:
                done = loop.run()
            except Diverged as diverged:
                saves.wait()
                raise after_divergence(session, state.shift, diverged) from None
            finally:
                heartbeat.enter("end")
            saves.finish(state)
            self._written = saves.written
            self._reader_memory = loader.reader_memory()
            return done

    def _tell_startup(self, session: Session, state: TrainState, row: dict[str, Any]) -> None:
        """Once, though the last step is due too. A collective."""
        if not self._startup_seconds:
            of_ranks = session.ranks.gather(self._startup.seconds)
            self._startup_seconds = slowest(of_ranks)
            session.say(as_line(of_ranks, self._startup.note))

    def _records(self, session: Session, state: TrainState) -> Records:
        config, tags = session.config, {}
        if self.world.is_main:
            tags = {"mlflow.source.git.commit": commit(), "vitscale.code": code_version()}
            tags |= {"vitscale.objective": config.objective.name, "vitscale.data": session.index.digest}
            tags["vitscale.parent_checkpoint"] = config.model.init_from or ""
        logged = state.step - (state.pending is not None)
        return Records(session.folder, config, session.world, session.total_steps, state.step, logged, tags)

    def require_lease(self) -> None:
        """Before rank 0 writes into the folder: FolderLost if another run has it by now."""
        if self.lease is not None:
            self.lease.require()

    def require_owner(self) -> None:
        """On a rank that failed, perhaps since rank 0 has lost the folder: FolderLost if another run has it by now, or
        if it is gone."""
        owner = self.folder.owner()
        if self.owner not in (None, owner):
            path = self.folder.path
            raise FolderLost(f"{path}: {owner} has taken the run") if owner != NOBODY else folder_gone(path)

    def _is_finished(self, session: Session, state: TrainState) -> bool:
        """Whether an earlier start wrote the summary, which comes last; rank 0 looks. A collective."""
        finished = False
        if session.world.is_main and self.folder.summary.exists() and self.folder.model.exists():
            finished = json.loads(self.folder.summary.read_text(encoding="utf-8")).get("steps") == state.step
        return session.ranks.gather(finished)[0]

    def _describe(self, session: Session, model: ViTPreTrainedModel, parameters: int) -> None:
        """Print what is about to run."""
        config, world, order, say = session.config, session.world, session.order, session.say
        say(f"run: {session.folder.path} (vitscale {__version__})")
        say(f"model: {type(model).__name__}, {parameters:,} parameters")
        kept = "" if session.trained == session.index.total else f", {session.trained:,} of them to train on"
        held_out = f", {session.held_out.total:,} to validate on" if session.held_out is not None else ""
        say(
            f"data: {session.index.total:,} samples in {len(session.index.names)} shards{kept}{held_out}, "
            f"{order.batches_per_epoch} steps an epoch, decoded by {session.decoder}"
        )
        say(
            f"train: {session.total_steps} steps of {config.train.global_batch} images "
            f"({session.total_steps / order.batches_per_epoch:.1f} epochs), {world.world_size} rank(s) on "
            f"{world.device}, ZeRO {config.parallel.zero_stage}, {config.train.precision}"
        )
        for warning in (too_few_lanes(config, world), one_to_choose(config)):
            if warning is not None:
                say(f"warning: {warning}")
        if world.is_main and (warning := room_warning(config, session.folder.checkpoints, parameters)):
            say(f"warning: {warning}")


def _of_best(state: TrainState) -> str:
    if state.best is None:
        return ""
    early = "; stopped early" if state.early_stopped else ""
    return f"{early}; best {state.best['metric']} {state.best['value']:.4f} at step {state.best['step']}"
