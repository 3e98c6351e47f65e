"""Held-out images scored while a run trains: when, which checkpoint is the best, and whether the run ends early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from vitscale.config.schema import RunConfig
from vitscale.engine.engine import Engine
from vitscale.engine.loop import TrainState, every_n_steps
from vitscale.errors import ConfigError
from vitscale.evaluation.probing import Probing
from vitscale.evaluation.validation import Validation
from vitscale.files.atomic import write_atomically
from vitscale.run.session import Session

_LESS_IS_BETTER = ("loss", "mse", "mae")


class Scoring:
    """The periodic task that scores data.validation, or what data.validation_fraction sets apart."""

    def __init__(self, session: Session, most: int) -> None:
        """most: about how many images a loss without labels is of; what labels score is of all."""
        held_out, config = session.held_out, session.config
        if held_out is not None and config.objective.name != "classification":
            held_out = held_out.at_most(most, config.data.label_extension)
        self._session = session
        self._validation = None if held_out is None else Validation(session.config, session.world, held_out)
        self.due = evaluation_steps(session) if self.is_wanted else (lambda step: False)
        self._best_step: int | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to score."""
        return self._validation is not None

    def run(self, engine: Engine, state: TrainState, row: dict[str, Any]) -> None:
        """Add the scores to the row, and judge them. A collective."""
        assert self._validation is not None
        outcome, session = self._validation.run(engine), self._session
        row |= outcome.scores
        is_better = judge(state, outcome.scores, session.config)
        if is_better:
            self._best_step = state.step
        if session.world.is_main and (is_better or session.config.train.keep_best is None):
            content = {"step": state.step, "scores": outcome.scores, **outcome.details}
            write_atomically(session.folder.validation, json.dumps(content) + "\n")

    def draw(self, engine: Engine, state: TrainState, row: dict[str, Any]) -> None:
        """What the model makes of the first held-out images, as pictures. A collective."""
        session = self._session
        probing = Probing(session.config, session.world, None, session.held_out, session.folder.path)
        probing.draw(engine, session.folder.figures, picture_title(session, state.step))

    def is_best(self, step: int) -> bool:
        """Whether this step's scores are the best so far: its checkpoint is then saved."""
        return self._best_step == step


def picture_title(session: Session, step: int) -> str:
    """What stands above the pictures of held-out images."""
    return f"{session.config.run.name}: {session.config.objective.name}, step {step}, held-out images"


def evaluation_steps(session: Session) -> Callable[[int], bool]:
    """At which steps is scored by evaluation.every_steps or every_epochs, beside the last one."""
    evaluation = session.config.evaluation
    steps = evaluation.every_steps
    if evaluation.every_epochs is not None:
        steps = max(1, round(evaluation.every_epochs * session.order.batches_per_epoch))
    return (lambda step: False) if steps is None else every_n_steps(steps)


def judge(state: TrainState, scores: Mapping[str, float], config: RunConfig) -> bool:
    """Whether these are the run's best scores so far, by train.keep_best; the state then says so, and whether the run
    is to end early. ConfigError for a score that there is not."""
    metric = config.train.keep_best
    if metric is None:
        return False
    if metric not in scores:
        raise ConfigError(f"train.keep_best={metric}: must be one of {', '.join(scores)}")
    if state.best is not None and state.best["metric"] != metric:  # keep_best was changed: by the new one's value then
        own = state.best.get("scores", {}).get(metric)
        state.best = None if own is None else state.best | {"metric": metric, "value": own}
    value, before = scores[metric], math.nan if state.best is None else state.best["value"]
    sign = -1 if metric.rpartition("/")[2].removeprefix("raw_") in _LESS_IS_BETTER else 1
    is_better = not math.isnan(value) and not sign * value <= sign * before
    if is_better:
        finite = {name: score for name, score in scores.items() if math.isfinite(score)}
        state.best = {"metric": metric, "value": value, "step": state.step, "scores": finite}
    state.without_better = 0 if is_better else state.without_better + 1
    state.early_stopped = is_early(state, config)
    return is_better


def is_early(state: TrainState, config: RunConfig) -> bool:
    """Whether the run ends before its last step, by train.early_stopping as it is now."""
    most = config.train.early_stopping
    return most is not None and state.without_better >= most
