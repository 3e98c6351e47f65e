"""Probes of frozen features while a run trains, beside what they must beat."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from torch import nn

from vitscale.engine.loop import TrainState
from vitscale.engine.whole import Evaluable, WholeModel
from vitscale.evaluation.features import Encode, pixels
from vitscale.evaluation.probing import Probing, Scores, encoder_of, warnings_of
from vitscale.files.atomic import write_atomically
from vitscale.models.vit import ViTPreTrainedModel
from vitscale.run.scoring import evaluation_steps, picture_title
from vitscale.run.session import Session

_FEWEST = 100  # images that evaluation.seconds leaves of a side


class Probes:
    """The periodic task that scores frozen features on evaluation.train and evaluation.test."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.due = evaluation_steps(session) if self.is_wanted else (lambda step: False)
        self._baselines: dict[str, Scores] = self._kept() if self.is_wanted else {}
        if self.is_wanted:
            self._probing = self._of_at_most(self.images)

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to score."""
        return self._session.probed is not None

    @property
    def images(self) -> int:
        """The most of a side that are scored: evaluation.images, or what evaluation.seconds has left of them."""
        cut: Mapping[str, float] = self._baselines.get("cut to", {})
        return int(cut.get("images", self._session.config.evaluation.images))

    def _of_at_most(self, images: int) -> Probing:
        session = self._session
        assert session.probed is not None
        return Probing(session.config, session.world, *session.probed, scratch=session.folder.path, most=images)

    def wants(self, name: str) -> bool:
        """Whether the encoder of this name is still to be scored."""
        return self.is_wanted and name not in self._baselines

    def baseline(self, name: str, model: ViTPreTrainedModel) -> None:
        """Score an encoder once a run, under this name, before it is wrapped. A collective."""
        if not self.wants(name):
            return
        session, was_training = self._session, model.training
        whole = WholeModel(model, session.ranks, session.backend.device)
        self._keep(name, self._in_time(whole))
        model.to("cpu").train(was_training)
        if "pixels" not in self._baselines:
            nothing = WholeModel(nn.Identity(), session.ranks, session.backend.device)
            self._keep("pixels", self._probing.scores(nothing, _pixels))

    def _in_time(self, whole: WholeModel) -> Scores:
        """Scores of as many images as evaluation.seconds leaves; later ones are of the same."""
        started, budget = time.monotonic(), self._session.config.evaluation.seconds
        scores = self._probing.scores(whole, encoder_of)
        seconds = self._session.ranks.gather(time.monotonic() - started)[0]
        if budget is None or seconds <= budget or "cut to" in self._baselines:
            return scores
        largest = min(self.images, max(side.total for side in (self._probing.train, self._probing.test) if side))
        images = max(_FEWEST, int(largest * budget / seconds))
        if images >= largest:
            return scores
        self._session.say(
            f"evaluation: {largest} images took {seconds:.1f} s; {images} of each side are scored from here on, "
            f"by evaluation.seconds={budget:g}"
        )
        self._baselines["cut to"] = {"images": images}
        self._probing = self._of_at_most(images)
        return self._probing.scores(whole, encoder_of)

    def run(self, engine: Evaluable, state: TrainState, row: dict[str, Any]) -> None:
        """Add the scores to the row; say what is wrong with them; draw reconstructions. A collective."""
        scores = self._probing.scores(engine, encoder_of)
        row |= {f"evaluation/{name}": value for name, value in scores.items()}
        for line in warnings_of(scores, {name: each for name, each in self._baselines.items() if name != "cut to"}):
            self._session.say(f"step {state.step}: {line}")
        self._probing.draw(engine, self._session.folder.figures, picture_title(self._session, state.step))

    def _kept(self) -> dict[str, Scores]:
        """The baselines of an earlier start, as rank 0 sees them. A collective."""
        path, kept = self._session.folder.baselines, {}
        if self._session.world.is_main and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("of", self._subject) != self._subject:  # other images, or scored otherwise
            self._session.say("evaluation: baselines are measured anew, since its keys or shards are others")
            kept = {}
        return self._session.ranks.gather(kept)[0]

    @property
    def _subject(self) -> str:
        """What scores depend on beside the encoder: 16 hex digits."""
        evaluation, probed = self._session.config.evaluation, self._session.probed
        assert probed is not None
        keys = (evaluation.crop_fraction, evaluation.neighbours, evaluation.probe, evaluation.folds, evaluation.images)
        return blake2b(repr((keys, [side.index.digest for side in probed])).encode(), digest_size=8).hexdigest()

    def _keep(self, name: str, scores: Scores) -> None:
        self._baselines[name] = scores
        told = ", ".join(f"{kind} {scores[kind]:.3f}" for kind in ("linear_probe", "knn"))
        self._session.say(f"evaluation: {name}: {told}")
        if self._session.world.is_main:
            content = {"of": self._subject, **self._baselines}
            write_atomically(self._session.folder.baselines, json.dumps(content, indent=1) + "\n")


def _pixels(module: nn.Module) -> Encode:
    return pixels
