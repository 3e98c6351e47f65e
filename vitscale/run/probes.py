"""Probes of frozen features while a run trains, beside what they must beat."""

from __future__ import annotations

import json
from typing import Any

from vitscale.engine.engine import Engine
from vitscale.engine.loop import TrainState
from vitscale.evaluation.figures import draw_reconstructions
from vitscale.evaluation.probing import Probing, Scores, of_vit, warnings_of
from vitscale.files.atomic import write_atomically
from vitscale.models.vit import ViTModel, ViTPreTrainedModel
from vitscale.run.scoring import evaluation_steps
from vitscale.run.session import Session


class Probes:
    """The periodic task that scores frozen features on evaluation.train and evaluation.test."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._probing = None if session.probed is None else Probing(session.config, session.world, *session.probed)
        self.due = evaluation_steps(session) if self.is_wanted else (lambda step: False)
        self._baselines: dict[str, Scores] = self._kept() if self.is_wanted else {}

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to score."""
        return self._probing is not None

    def baseline(self, name: str, model: ViTPreTrainedModel) -> None:
        """Score an encoder once a run, under this name, before it is wrapped. A collective."""
        if self._probing is None or name in self._baselines:
            return
        session, was_training = self._session, model.training
        device = session.backend.device
        encoder = model.to(device).eval().get_submodule("vit")
        assert isinstance(encoder, ViTModel), "every objective's model has its encoder there"
        self._keep(name, self._probing.of_encoder(of_vit(encoder), session.ranks, device))
        model.to("cpu").train(was_training)
        if "pixels" not in self._baselines:
            self._keep("pixels", self._probing.of_pixels(session.ranks, device))

    def run(self, engine: Engine, state: TrainState, row: dict[str, Any]) -> None:
        """Add the scores to the row; say what is wrong with them; draw reconstructions. A collective."""
        assert self._probing is not None
        scores = self._probing.of_engine(engine)
        row |= {f"evaluation/{name}": value for name, value in scores.items()}
        for line in warnings_of(scores, self._baselines):
            self._session.say(f"step {state.step}: {line}")
        config, folder = self._session.config, self._session.folder
        if config.objective.name != "classification":
            panels = self._probing.reconstructions(engine)
            if self._session.world.is_main:
                title = f"{config.run.name}: {config.objective.name}, step {state.step}, held-out images"
                draw_reconstructions(panels, folder.figures / "reconstructions.png", title)

    def _kept(self) -> dict[str, Scores]:
        """The baselines of an earlier start, as rank 0 sees them. A collective."""
        path, kept = self._session.folder.baselines, {}
        if self._session.world.is_main and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
        return self._session.ranks.gather(kept)[0]

    def _keep(self, name: str, scores: Scores) -> None:
        self._baselines[name] = scores
        told = ", ".join(f"{kind} {scores[kind]:.3f}" for kind in ("linear_probe", "knn"))
        self._session.say(f"evaluation: {name}: {told}")
        if self._session.world.is_main:
            write_atomically(self._session.folder.baselines, json.dumps(self._baselines, indent=1) + "\n")
