"""When a run's checkpoints are saved, and what they say of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from vitscale import __version__, heartbeat
from vitscale.checkpoint.retention import Retention
from vitscale.checkpoint.saving import Saver
from vitscale.config.schema import RunConfig
from vitscale.engine.engine import Engine
from vitscale.engine.failures import classified
from vitscale.engine.loop import TrainState, every_n_steps
from vitscale.engine.pinning import Pinned
from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import InfrastructureError
from vitscale.models.auto import model_keys
from vitscale.run.rollback import kept_for_rollback
from vitscale.run.session import Session, config_digest
from vitscale.run.start import order_keys
from vitscale.run_folder import RunFolder

_LOOK_EVERY = 10  # steps, while a save is put off until the one before has ended
_PATIENCE = 6  # a slow disk is no lost rank: of parallel.timeout_s, for the exchanges about a save


class Saves:
    """The periodic task that saves checkpoints, in the background by checkpoint.asynchronous; use it in a `with`.

    A save that is due while one is being written is put off until that one has ended, which is looked at once in ten
    steps. One that fails is counted, and tried again when the next is due; `finish` makes the one that must not fail.
    """

    def __init__(self, session: Session, engine: Engine, state: TrainState, job: str) -> None:
        """A collective. job: which kind of Job the run is."""
        config = session.config
        timeout = timedelta(seconds=_PATIENCE * config.parallel.timeout_s)
        retention = Retention(config.checkpoint.keep, config.checkpoint.keep_every_hours)
        self._saver = Saver(
            session.folder.checkpoints,
            ProcessRanks(timeout, apart=True),
            retention,
            failures=state.save_failures,
            limit_s=timeout.total_seconds(),
        )
        self._session, self._engine, self._job = session, engine, job
        self._periodic = every_n_steps(config.checkpoint.every_steps)
        self._pinned = Pinned(session.backend.device)
        self._postponed = self._warned = False
        self._best_saved, self._best_wanted = state.best, state.best
        self._began, self._trained_before = time.monotonic(), state.elapsed_s
        self._warn(state.save_seconds)

    @property
    def failures(self) -> int:
        """Saves that failed, in this run so far."""
        return self._saver.failures

    @property
    def written(self) -> frozenset[int]:
        """The steps of the checkpoints that this start has saved."""
        return frozenset(self._saver.saved)

    def due(self, step: int) -> bool:
        """Whether to save after this step. StorageError where the save that is under way hangs."""
        self._saver.require_in_time()
        return self._periodic(step) or (self._postponed and step % _LOOK_EVERY == 0)

    def postpones(self, is_best: bool) -> bool:
        """Whether the save of this step is put off; that of the best step so far is not. A collective."""
        # The ranks see the end of a save at different steps, and must agree.
        self._postponed = not is_best and self._session.ranks.sum({"busy": float(self._saver.busy)})["busy"] > 0
        return self._postponed

    def run(self, state: TrainState) -> None:
        """Begin a save of this step, once one that is being written has ended. A collective."""
        self._begin(state)
        if not self._session.config.checkpoint.asynchronous:
            self._saver.wait()

    def wait(self) -> None:
        """Until no save is being written. StorageError where it hangs."""
        with heartbeat.phase("save"):
            self._saver.wait()

    def finish(self, state: TrainState) -> None:
        """Wait until this step is saved, and save it now where it is not. A collective.

        Raises StorageError, on all ranks, if it cannot be saved, or InfrastructureError since one of them is gone.
        """
        self.wait()
        if state.step not in self._saver.saved:
            with heartbeat.phase("save"):
                self._begin(state, required=True)
            self.wait()
        if (error := self._saver.error) is not None:
            cause = error.__cause__
            lost = classified(cause, self._session.config) if isinstance(cause, Exception) else error
            raise lost if type(lost) is InfrastructureError else error
        state.save_failures = self.failures

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, *error: Any) -> None:
        self._saver.__exit__(*error)
        if not self._saver.busy:
            self._pinned.close()

    def _begin(self, state: TrainState, required: bool = False) -> None:
        self._saver.wait()
        self._settle_best(state)
        state.save_failures = self.failures
        state.save_seconds = self._saver.seconds or state.save_seconds
        self._warn(state.save_seconds)
        state.elapsed_s = self._trained_before + time.monotonic() - self._began
        spared = spared_steps(self._session.folder, self._session.config, state.step, state.best)
        self._saver.begin(state.step, self._snapshot, self._manifest(state), spared, required)

    def _warn(self, seconds: float) -> None:
        """Say once where the last save took longer than whoever stops this run gives it."""
        config = self._session.config.checkpoint
        notice, saves = config.notice_s, 2 if config.asynchronous else 1  # one may be under way, and is waited for
        if saves * seconds > notice and not self._warned:
            self._warned = True
            self._session.say(
                f"warning: the last save took {seconds:.0f} s, and a stop may take {saves} such: more than "
                f"checkpoint.notice_s={notice:g}, so what stops this run may end it before it has saved; ask for a "
                "longer notice (sbatch --signal=B:USR1@SECONDS) and set the key to it"
            )

    def _settle_best(self, state: TrainState) -> None:
        """Before a save: where that of the best step failed, the best is the one before it."""
        if self._saver.error is None:
            self._best_saved = self._best_wanted
        elif state.best is not None and state.best == self._best_wanted and state.best["step"] != state.step:
            state.best = self._best_saved
        self._best_wanted = state.best

    def _snapshot(self, reserve: Any) -> Any:
        return self._engine.snapshot(partial(self._pinned.reserve, reserve))

    def _manifest(self, state: TrainState) -> dict[str, Any]:
        session = self._session
        config = session.config
        return asdict(state) | {
            "adam_step": self._engine.adam_step,
            "job": self._job,
            "skipped_batches": list(session.skipped),
            "total_steps": session.total_steps,
            "order": order_keys(session),
            "model": model_keys(config),
            "world_size": session.world.world_size,
            "zero_stage": self._engine.stage,
            "precision": config.train.precision,
            "decoder": session.decoder,
            "config": config_digest(config),
            "time": int(time.time() * 1000),
            "vitscale": __version__,
        }


def spared_steps(folder: RunFolder, config: RunConfig, step: int, best: Mapping[str, Any] | None) -> dict[int, str]:
    """Steps whose checkpoints stay beside those of Retention's rule, and why. step, best: those of the run now."""
    spared = dict.fromkeys(kept_for_rollback(folder, config, step), "to go back to")
    return spared if best is None else spared | {int(best["step"]): "the best"}
