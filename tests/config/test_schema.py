"""What single values must satisfy: each bound from both sides."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vitscale.config import model_rules, schema
from vitscale.config.augmentation import Augmentation
from vitscale.config.data import DECODERS
from vitscale.errors import ConfigError

REFUSED = [
    (schema.Run, "run.name", ["", "a/b", ".", ".."], ["a", "a.b"]),
    (schema.Model, "model.hidden_size", [0, -1], [1]),
    (schema.Model, "model.num_hidden_layers", [0], [1]),
    (schema.Model, "model.num_channels", [0], [1, 13]),
    (schema.Model, "model.num_labels", [-1], [0]),
    (schema.Model, "model.drop_path_rate", [-0.1, 1.0], [0.0, 0.9]),
    (schema.Model, "model.hidden_act", ["gelo"], list(model_rules.ACTIVATIONS)),
    (schema.Model, "model.pooler_act", ["prelu"], ["tanh"]),
    (schema.Model, "model.pooler_output_size", [0], [1, None]),
    (schema.Model, "model.encoder_stride", [0, (0, 8)], [1, (8, 1), None]),
    (schema.Model, "model.image_size", [0, (0, 8)], [1, (8, 1)]),
    (schema.Model, "model.patch_size", [0, (8, -1)], [1, (8, 1)]),
    (schema.Model, "model.initializer_range", [0.0], [0.02]),
    (schema.Model, "model.layer_norm_eps", [0.0], [1e-12]),
    (schema.Model, "model.hidden_dropout_prob", [-0.1, 1.0], [0.0]),
    (schema.Model, "model.attention_probs_dropout_prob", [-0.1, 1.0], [0.0]),
    (schema.Model, "model.id2label", [()], [None]),
    (schema.Model, "model.init_take", ["teacher"], [None]),
    (schema.Model, "model.problem_type", ["regress"], [*model_rules.PROBLEM_TYPES, None]),
    (schema.Model, "model.position_embeddings", ["rope"], ["learned", "sincos", "none", "auto"]),
    (schema.Model, "model.num_register_tokens", [-1], [0, 4]),
    (schema.Model, "model.rope_theta", [0.0, -1.0], [100.0, None]),
    (schema.Model, "model.pooling", ["max"], ["cls", "mean"]),
    (schema.MAE, "objective.mae.mask_ratio", [0.0, 1.0], [0.75]),
    (schema.MAE, "objective.mae.decoder_hidden_size", [0], [1]),
    (schema.MAE, "objective.mae.decoder_num_hidden_layers", [0], [1]),
    (schema.MAE, "objective.mae.decoder_num_attention_heads", [0], [1]),
    (schema.MAE, "objective.mae.decoder_intermediate_size", [0], [1]),
    (schema.SimMIM, "objective.simmim.mask_ratio", [0.0, 1.0], [0.6]),
    (schema.SimMIM, "objective.simmim.mask_patch", [0], [1, None]),
    (schema.Classification, "objective.classification.label_smoothing", [-0.1, 1.0], [0.0, 0.1]),
    (schema.Objective, "objective.name", ["dino"], list(schema.OBJECTIVES)),
    (schema.Data, "data.lanes", [0, -8], [1, None]),
    (schema.Data, "data.window", [0], [1]),
    (schema.Data, "data.decode", ["opencv"], list(DECODERS)),
    (schema.Data, "data.background", [-1, 256], [0, 255]),
    (schema.Data, "data.max_bad_fraction", [-0.1, 1.1], [0.0, 1.0]),
    (schema.Data, "data.max_pixels", [0], [1]),
    (schema.Data, "data.threads", [0], [1, None]),
    (schema.Data, "data.prefetch", [1], [2]),
    (schema.Data, "data.patience_s", [-1.0, 0.0, 0.5, 1e30], [1.0, 1e6]),
    (Augmentation, "augment.crop_scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)], [(1.0, 1.0)]),
    (Augmentation, "augment.crop_ratio", [(0.0, 1.0), (2.0, 1.0)], [(1.0, 1.0)]),
    (Augmentation, "augment.flip", [-0.1, 1.1], [0.0, 1.0]),
    (Augmentation, "augment.crop", ["center"], ["resized", "simple"]),
    (Augmentation, "augment.repeats", [0, 65], [1, 3]),
    (Augmentation, "augment.preset", ["autoaugment"], [None, "mae", "simmim", "deit3", "randaug"]),
    (Augmentation, "augment.rand_augment", ["rand-z9"], [None, "rand-m9-n2-mstd0.5-inc1"]),
    (Augmentation, "augment.color_jitter", [(-0.1, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.6)], [(2.0, 1.0, 1.0, 0.5)]),
    (Augmentation, "augment.erase", [-0.1, 1.1], [0.0, 1.0]),
    (Augmentation, "augment.mixup", [-0.1, 101.0], [0.0, 0.8]),
    (Augmentation, "augment.cutmix", [-0.1, 101.0], [0.0, 1.0]),
    (Augmentation, "augment.mix_switch", [-0.1, 1.1], [0.0, 1.0]),
    (Augmentation, "augment.std", [(), (0.1, 0.0)], [(0.1,)]),
    (schema.Optimizer, "optimizer.lr", [-1.0], [0.0]),
    (schema.Optimizer, "optimizer.lr_batch", [0], [1, None]),
    (schema.Optimizer, "optimizer.betas", [(1.0, 0.9), (-0.1, 0.9)], [(0.0, 0.0)]),
    (schema.Optimizer, "optimizer.eps", [0.0], [1e-8]),
    (schema.Optimizer, "optimizer.weight_decay", [-0.1], [0.0]),
    (schema.Optimizer, "optimizer.clip", [-1.0], [0.0]),
    (schema.Optimizer, "optimizer.warmup", [-0.1, 1.0], [0.0]),
    (schema.Optimizer, "optimizer.min_lr", [-1e-9, 1.6e-4], [0.0, 1.5e-4]),
    (schema.Train, "train.ema_decay", [0.0, 1.0, -0.1], [0.9999, None]),
    (schema.Train, "train.global_batch", [0], [1]),
    (schema.Train, "train.micro_batch", [0], [1, "auto"]),
    (schema.Train, "train.steps", [0], [1, None]),
    (schema.Train, "train.epochs", [0.0], [0.5, None]),
    (schema.Train, "train.precision", ["fp16"], list(schema.PRECISIONS)),
    (schema.Train, "train.max_skipped_steps", [0], [1]),
    (schema.Train, "train.gradient_checkpointing", ["none", "full"], list(schema.CHECKPOINTING)),
    (schema.Guard, "guard.spike_deviations", [0.0], [0.5]),
    (schema.Guard, "guard.digest_every_steps", [0], [1, None]),
    (schema.Guard, "guard.rollback_steps", [0], [1]),
    (schema.Guard, "guard.max_rollbacks", [0], [1]),
    (schema.Parallel, "parallel.zero_stage", [-1, 4], [0, 1, 2, 3, "auto"]),
    (schema.Parallel, "parallel.bucket_elements", [0], [1, None]),
    (schema.Parallel, "parallel.timeout_s", [0], [1]),
    (schema.Parallel, "parallel.restarts_without_progress", [-1], [0, 3]),
    (schema.Checkpoint, "checkpoint.every_steps", [0], [1]),
    (schema.Checkpoint, "checkpoint.keep", [0], [1]),
    (schema.Checkpoint, "checkpoint.keep_every_hours", [0.0, -1.0], [None, 0.5]),
    (schema.Log, "log.every_steps", [0], [1]),
]


@pytest.mark.parametrize(("section", "key", "wrong", "right"), REFUSED, ids=[row[1] for row in REFUSED])
def test_bounds(section: type, key: str, wrong: list[Any], right: list[Any]) -> None:
    name = key.rsplit(".", 1)[-1]
    for value in right:
        assert getattr(section(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=r"must be") as caught:
            section(**{name: value})
        assert str(caught.value).startswith(f"{key}={value!r}: must be ")


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.RunConfig().train.steps = 5  # type: ignore[misc]


def test_as_dict_is_plain() -> None:
    plain = schema.as_dict(schema.RunConfig(data=schema.Data(train=(schema.Source("a"),))))
    assert plain["data"]["train"] == [{"pattern": "a", "weight": None, "repeat": None}]
    assert plain["optimizer"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:canary@mlflow.example.org",
        "https://canary@mlflow.example.org",
        "https://mlflow.example.org/?token=canary",
        "https://mlflow.example.org/#access_token=canary",
        "http://me:pa/canary@mlflow.example.org",
        "postgresql://me:canary@host/db",
        "postgresql://me:pa/canary@host/db",
        "postgresql://host/db?user=me&password=canary",
    ],
)
def test_a_secret_in_the_tracking_uri_is_refused_without_printing_it(uri: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        schema.Tracking(mlflow_uri=uri)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me@host/db",
        "postgresql://host:5432/db?sslmode=require",
        "http://host:5000",
        "https://host/path/",
        "sqlite:////data/a:b@c.db",
        "databricks",
    ],
)
def test_tracking_uris(uri: str) -> None:
    assert schema.Tracking(mlflow_uri=uri).mlflow_uri == uri


@pytest.mark.parametrize("uri", ["http://[bad", "http://host:port", "https:///path"])
def test_a_tracking_uri_that_is_no_url(uri: str) -> None:
    with pytest.raises(ConfigError, match="a server's URL"):
        schema.Tracking(mlflow_uri=uri)
