"""What keys must satisfy together: every refusal names key, value and a way out that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitscale.config.check import check_config, grid, has_classes, lanes, mask_patch, one_to_choose, too_few_lanes
from vitscale.config.load import load_config
from vitscale.config.model_rules import pair
from vitscale.config.schema import RunConfig
from vitscale.config.step import accumulation
from vitscale.errors import ConfigError
from vitscale.world import World

SMALL = ("train.global_batch=64", "train.micro_batch=8", "data.lanes=8", "data.window=64")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 5}")
    return path


def made(base: Path, *overrides: str) -> RunConfig:
    return load_config(base, [*SMALL, *overrides])


def refusal(base: Path, ranks: int, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(made(base, *overrides), World(world_size=ranks))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mended(base: Path, ranks: int, *overrides: str) -> None:
    """The way out that a refusal tells, `set KEY=VALUE`, is taken and works."""
    said = refusal(base, ranks, *overrides)
    advice = re.search(r"set (\S+=\S+)", said)
    assert advice is not None, said
    check_config(made(base, *overrides, advice.group(1)), World(world_size=ranks))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_accumulation_makes_up_the_global_batch(base: Path, ranks: int) -> None:
    config = made(base)
    check_config(config, World(world_size=ranks))
    assert accumulation(config, World(world_size=ranks)) * ranks * config.train.micro_batch == config.train.global_batch


def test_batch_not_divisible(base: Path) -> None:
    said = refusal(base, 16)
    for word in ("train.global_batch=64", "train.micro_batch=8", "16 ranks"):
        assert word in said
    mended(base, 16)
    mended(base, 1, "train.micro_batch=7")
    mended(base, 1, "train.micro_batch=100")
    assert "set train.global_batch to a multiple of 24" in refusal(base, 3)


def test_lanes(base: Path) -> None:
    assert "data.lanes=7" in refusal(base, 1, "data.lanes=7")
    mended(base, 1, "data.lanes=9", "data.window=72")
    said = refusal(base, 1, "data.window=65")
    assert "data.window=65" in said
    assert "data.lanes=8" in said
    mended(base, 1, "data.window=65")
    mended(base, 1, "data.window=3")


@pytest.mark.parametrize(
    "batch, derived",
    [(1, 1), (3, 1), (4, 1), (6, 1), (8, 2), (7, 1), (12, 3), (100, 25), (256, 64), (1024, 256), (4096, 1024),
     (5000, 1000), (4098, 683), (8191, 1), (65536, 1024)],
)  # fmt: skip
def test_lanes_that_are_not_written_come_of_the_global_batch(base: Path, batch: int, derived: int) -> None:
    config = made(base, f"train.global_batch={batch}", "train.micro_batch=1", "data.lanes=null", "data.window=16381")
    assert lanes(config) == derived
    check_config(config, World())  # a window that no number of lanes divides is rounded down


@pytest.mark.parametrize("batch", range(1, 130))
def test_derived_lanes_are_the_largest_that_may_be(base: Path, batch: int) -> None:
    config = made(base, f"train.global_batch={batch}", "data.lanes=null")
    fitting = [size for size in range(1, batch + 1) if batch % size == 0 and 4 * size <= batch]
    assert lanes(config) == max(fitting, default=1)


def test_lanes_as_written(base: Path) -> None:
    assert lanes(made(base)) == 8
    assert lanes(made(base, "data.lanes=64")) == 64


@pytest.mark.parametrize("window", [64, 100])
def test_fewer_lanes_than_ranks_are_told_with_a_way_out(base: Path, window: int) -> None:
    config = made(base, "train.micro_batch=1", "data.lanes=null", "data.lanes=4", f"data.window={window}")
    said = too_few_lanes(config, World(world_size=32))
    assert said is not None
    assert "\n" not in said
    assert "data.lanes=4:" in said
    assert "32 ranks" in said
    mended = made(base, "train.micro_batch=1", *re.findall(r"data\.\w+=\d+", said)[1:])
    assert lanes(mended) == 32
    check_config(mended, World(world_size=32))
    assert too_few_lanes(mended, World(world_size=32)) is None


def test_lanes_that_ranks_do_not_divide_are_not_told(base: Path) -> None:
    config = made(base, "train.global_batch=96", "data.lanes=null", "train.micro_batch=1")
    assert lanes(config) == 24
    assert [too_few_lanes(config, World(world_size=ranks)) for ranks in (1, 16, 24)] == [None] * 3
    said = too_few_lanes(config, World(world_size=32))
    assert said is not None
    assert "data.lanes=24 (of train.global_batch): fewer than the 32 ranks" in said


def test_weights_of_sources(base: Path) -> None:
    check_config(made(base, "data.train=[{pattern: a, weight: 2}, {pattern: b, weight: 2}]"), World())
    said = refusal(base, 1, "data.train=[a, {pattern: b, weight: 2}]")
    assert "data.train: pattern=a: has no weight, and b has one" in said
    said = refusal(base, 1, "data.train=[{pattern: a, repeat: 3}, {pattern: b, weight: 2}]")
    assert "pattern=a: has repeat=3 and no weight" in said
    check_config(made(base, "data.train=[a, {pattern: b, repeat: 2.5}]", "data.epoch_samples=64"), World())
    for wrong in ("weight: 0", "repeat: -1", "weight: 1, repeat: 2"):
        with pytest.raises(ConfigError, match=r"data\.train"):
            made(base, f"data.train=[{{pattern: a, {wrong}}}]")
    assert "weight and repeat are for data.train" in refusal(base, 1, "data.validation=[{pattern: a, weight: 1}]")
    assert "data.epoch_samples=3: must be train.global_batch=" in refusal(base, 1, "data.epoch_samples=3")


def test_image_and_patch(base: Path) -> None:
    said = refusal(base, 1, "model.image_size=225")
    for word in ("model.image_size=225", "model.patch_size=16"):
        assert word in said
    mended(base, 1, "model.image_size=225")
    mended(base, 1, "model.image_size=36", "model.patch_size=[8,16]")
    mended(base, 1, "model.image_size=[5,100]")
    assert "width" in refusal(base, 1, "model.image_size=[32, 33]")
    assert "height" in refusal(base, 1, "model.image_size=[33, 32]")
    assert "model.patch_size=0" in refusal(base, 1, "model.patch_size=0")
    assert "model.image_size=0" in refusal(base, 1, "model.image_size=0")


def test_heads(base: Path) -> None:
    said = refusal(base, 1, "model.num_attention_heads=7")
    assert "model.hidden_size=768" in said
    assert "model.num_attention_heads=7" in said


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_refused_for_drop_path(base: Path, name: str) -> None:
    said = refusal(base, 1, f"model.{name}=0.1")
    assert f"model.{name}=0.1" in said
    assert "model.drop_path_rate" in said


def test_mean_and_std_have_one_number_a_channel_or_one(base: Path) -> None:
    assert "augment.mean" in refusal(base, 1, "model.num_channels=4")
    assert "augment.std" in refusal(base, 1, "augment.std=[0.5, 0.5]")
    check_config(made(base, "model.num_channels=4", "augment.mean=[0.5]", "augment.std=[0.5]"), World())


LABELLED = ("objective.name=classification", "model.num_labels=10")


def test_mixing_needs_classes_and_pairs(base: Path) -> None:
    check_config(made(base, *LABELLED, "augment.mixup=0.8", "augment.cutmix=1"), World())
    check_config(made(base, "objective.name=multitask", "augment.mixup=0.8"), World())
    for objective in ("mae", "simmim"):
        said = refusal(base, 1, f"objective.name={objective}", "augment.cutmix=1")
        assert f"augment.cutmix=1.0: mixes the labels of classes, and objective.name={objective} has none" in said
    assert "has none" in refusal(base, 1, "objective.name=classification", "model.num_labels=1", "augment.mixup=0.8")
    assert "train.micro_batch=1 is odd" in refusal(base, 1, *LABELLED, "augment.mixup=1", "train.micro_batch=1")
    mended(base, 1, "augment.preset=randaug", "augment.cutmix=0")


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("augment.color_jitter=[0,0,0.1,0]", "color_jitter's saturation"),
        ("augment.steps=[greyscale]", "steps' greyscale"),
        ("augment.three_augment=true", "three_augment"),
        ("augment.rand_augment=rand-m9", "rand_augment"),
    ],
)
def test_colours_are_of_three_channels(base: Path, override: str, name: str) -> None:
    one = ("model.num_channels=1", "augment.mean=[0.5]", "augment.std=[0.5]")
    said = refusal(base, 1, *one, override)
    assert f"augment: {name}: are of red, green and blue, and model.num_channels=1" in said
    check_config(made(base, override), World())
    check_config(made(base, *one, "augment.color_jitter=[0.2,0.2,0,0]", "augment.steps=[equalize, rotate]"), World())


def test_what_a_validation_needs(base: Path) -> None:
    scored = (*LABELLED, "data.validation=/v.tar")
    best = (*scored, "train.keep_best=validation/top1")
    for every in ("evaluation.every_steps=9", "evaluation.every_epochs=0.5"):
        check_config(made(base, *best, "train.early_stopping=3", every), World())
        assert one_to_choose(made(base, *best, every)) is None
    mended(base, 1, *best, "train.early_stopping=3")
    assert "only the end is scored" in (one_to_choose(made(base, *best)) or "")
    assert one_to_choose(made(base, *scored)) is None
    check_config(made(base, "data.validation=/v.tar"), World())
    assert "there is nothing to score" in refusal(base, 1, *LABELLED, "train.keep_best=validation/top1")
    mended(base, 1, *scored, "train.ema_decay=0.9", "train.keep_best=validation/raw_top1")
    assert "data.validation_fraction=0.1" in refusal(base, 1, *scored, "data.validation_fraction=0.1")
    many = "objective.classification.class_weights=[1,2]"
    assert "are 2, and model.num_labels=10" in refusal(base, 1, *LABELLED, many)
    assert "train.freeze=13: the model has 12 blocks" in refusal(base, 1, *LABELLED, "train.freeze=13")
    number = ("objective.name=classification", "model.num_labels=1")
    assert "is for one class an image" in refusal(base, 1, *number, "objective.classification.class_weights=balanced")


def test_shapes_that_an_augmentation_needs(base: Path) -> None:
    assert "must be a square" in refusal(base, 1, "augment.quarter_turns=true", "model.image_size=[64, 32]")
    small = ("model.image_size=4", "model.patch_size=2", "augment.crop=simple")
    assert "model.image_size=4: must be above 4 pixels" in refusal(base, 1, *small)


def test_repeats_need_room_in_a_batch(base: Path) -> None:
    repeated = ("augment.repeats=3", "data.lanes=null", "data.window=4096")
    assert lanes(made(base, *repeated)) == 8
    assert lanes(made(base, *repeated, "train.global_batch=60", "train.micro_batch=6")) == 10
    said = refusal(base, 1, *repeated, "train.global_batch=4", "train.micro_batch=4")
    assert "a batch holds 4 samples of each of 1 lanes, and needs 6" in said
    mended(base, 1, "augment.repeats=8", "data.lanes=8")


@pytest.mark.parametrize("name", ["simmim", "multitask"])
def test_simmim_cells(base: Path, name: str) -> None:
    objective = f"objective.name={name}"
    check_config(made(base, objective), World())
    said = refusal(base, 1, objective, "objective.simmim.mask_patch=3")
    assert "objective.simmim.mask_patch=3" in said
    assert "14x14" in said
    assert "objective.simmim.mask_ratio=0.6" in refusal(base, 1, objective, "objective.simmim.mask_patch=14")
    mended(base, 1, objective, "objective.simmim.mask_patch=3")
    mended(base, 1, objective, "objective.simmim.mask_patch=14")
    mended(base, 1, objective, "objective.simmim.mask_patch=7", "objective.simmim.mask_ratio=0.9")
    mended(base, 1, objective, "model.image_size=[16,32]")
    check_config(made(base, "objective.simmim.mask_patch=3"), World())  # nobody asked for simmim


@pytest.mark.parametrize(
    ("size", "patch", "cell"),
    [("224", "16", 2), ("224", "32", 1), ("14", "2", 1), ("96", "8", 2), ("32", "16", 1), ("[64,32]", "16", 1),
     ("[64,48]", "16", 1), ("[64,64]", "16", 2)],
)  # fmt: skip
def test_cells_fit_the_grid(base: Path, size: str, patch: str, cell: int) -> None:
    config = made(base, "objective.name=simmim", f"model.image_size={size}", f"model.patch_size={patch}")
    check_config(config, World())
    assert mask_patch(config) == cell


def test_cells_leave_one_at_every_ratio(base: Path) -> None:
    """Of 2x4 patches, cells of 2 would be two, which at 0.6 are both hidden."""
    tall = ("objective.name=simmim", "model.image_size=[32,64]")
    assert mask_patch(made(base, *tall)) == 1
    assert mask_patch(made(base, *tall, "objective.simmim.mask_ratio=0.5")) == 2
    assert mask_patch(made(base, *tall, "objective.simmim.mask_patch=2")) == 2  # as written


@pytest.mark.parametrize("name", ["mae", "simmim", "multitask"])
def test_a_single_patch_hides_nothing(base: Path, name: str) -> None:
    single = ("model.image_size=16", "model.patch_size=16")
    for word in ("model.image_size=16", "model.patch_size=16", f"objective.name={name}"):
        assert word in refusal(base, 1, f"objective.name={name}", *single)
    mended(base, 1, f"objective.name={name}", *single)
    check_config(made(base, "objective.name=classification", *single), World())


@pytest.mark.parametrize("name", ["mae", "simmim", "classification", "multitask"])
def test_patches_need_not_be_square(base: Path, name: str) -> None:
    flat = (f"objective.name={name}", "model.image_size=48", "model.patch_size=[12,16]")
    check_config(made(base, *flat), World())
    check_config(made(base, *flat, "model.encoder_stride=[12,16]"), World())
    mended(base, 1, *flat, "model.encoder_stride=12")


def test_without_a_class_token_patches_are_pooled(base: Path) -> None:
    assert "model.pooling=cls" in refusal(base, 1, "model.use_cls_token=false")
    mended(base, 1, "model.use_cls_token=false")


def test_rotary_positions_need_heads_of_fours(base: Path) -> None:
    rope = ("model.rope_theta=100", "model.num_attention_heads=128")
    assert "model.hidden_size=768: must be model.num_attention_heads=128 times" in refusal(base, 1, *rope)
    mended(base, 1, *rope)
    narrow = ("model.rope_theta=100", "objective.mae.decoder_num_attention_heads=256")
    assert "objective.mae.decoder_hidden_size=512" in refusal(base, 1, *narrow)
    mended(base, 1, *narrow)
    check_config(made(base, *narrow, "objective.name=simmim"), World())


@pytest.mark.parametrize("name", ["mae", "simmim", "multitask"])
def test_what_predicts_patches_knows_where_they_are(base: Path, name: str) -> None:
    blind = (f"objective.name={name}", "model.position_embeddings=none")
    assert "model.position_embeddings=none" in refusal(base, 1, *blind)
    mended(base, 1, *blind)
    check_config(made(base, *blind, "model.rope_theta=100"), World())
    check_config(made(base, "objective.name=classification", blind[1]), World())


def test_stride_is_the_patch(base: Path) -> None:
    assert "model.encoder_stride=8" in refusal(base, 1, "model.encoder_stride=8")
    mended(base, 1, "model.encoder_stride=8")
    check_config(made(base, "model.encoder_stride=16", "objective.name=simmim"), World())


def test_mae_mask(base: Path) -> None:
    assert "objective.mae.mask_ratio=0.999" in refusal(base, 1, "objective.mae.mask_ratio=0.999")
    mended(base, 1, "objective.mae.mask_ratio=0.999")
    mended(base, 1, "model.image_size=[16,48]")
    single_numbers = ("model.image_size=8", "model.patch_size=1", "model.num_channels=1")
    grey = ("augment.mean=[0.5]", "augment.std=[0.5]")
    assert "objective.mae.norm_pix_loss" in refusal(base, 1, *single_numbers, *grey)
    mended(base, 1, *single_numbers, *grey)
    assert "decoder_num_attention_heads=7" in refusal(base, 1, "objective.mae.decoder_num_attention_heads=7")
    check_config(made(base, "objective.name=simmim", "objective.mae.decoder_num_attention_heads=7"), World())


def test_sincos_needs_a_multiple_of_four(base: Path) -> None:
    narrow = ("model.hidden_size=6", "model.num_attention_heads=2")
    assert "model.hidden_size=6" in refusal(base, 1, *narrow)
    check_config(made(base, *narrow, "objective.name=simmim"), World())  # learned there
    assert "model.hidden_size=6" in refusal(
        base, 1, *narrow, "objective.name=simmim", "model.position_embeddings=sincos"
    )


def test_labels(base: Path) -> None:
    assert "model.num_labels=0" in refusal(base, 1, "objective.name=classification", "model.num_labels=0")
    check_config(made(base, "model.num_labels=0"), World())


def test_problem_types_of_shards(base: Path) -> None:
    supervised = "objective.name=classification"
    for kind in ("multi_label_classification", "regression"):
        check_config(made(base, supervised, f"model.problem_type={kind}"), World())
        asked = ("objective.name=multitask", f"model.problem_type={kind}")
        assert f"model.problem_type={kind}" in refusal(base, 1, *asked)
        mended(base, 1, *asked)
    alone = (supervised, "model.num_labels=1", "model.problem_type=single_label_classification")
    assert "model.num_labels=1" in refusal(base, 1, *alone)
    several = (supervised, "model.num_labels=3", "model.problem_type=multi_label_classification")
    for loss, of in (("bce", (supervised, "model.num_labels=1")), ("ce", several)):
        assert f"classification.loss={loss}: is of classes" in refusal(
            base, 1, *of, f"objective.classification.loss={loss}"
        )
    made(base, *several, "objective.classification.loss=bce")
    smooth = (supervised, "model.num_labels=1", "objective.classification.label_smoothing=0.1")
    assert "label_smoothing=0.1" in refusal(base, 1, *smooth)
    mended(base, 1, *smooth)


@pytest.mark.parametrize(
    ("expected", "overrides"),
    [
        (True, ["objective.name=classification"]), (True, ["objective.name=multitask", "model.num_labels=1"]),
        (False, ["objective.name=classification", "model.num_labels=1"]), (False, ["objective.name=mae"]),
        (False, ["objective.name=classification", "model.num_labels=1", "model.problem_type=regression"]),
        (True, ["objective.name=classification", "model.problem_type=single_label_classification"]),
    ],
)  # fmt: skip
def test_labels_are_classes_or_quantities(base: Path, expected: bool, overrides: list[str]) -> None:
    config = made(base, *overrides)
    check_config(config, World())
    assert has_classes(config) == expected


def test_stage_1_in_bf16_with_accumulation(base: Path) -> None:
    asked = ("parallel.zero_stage=1", "train.precision=bf16")
    mended(base, 2, *asked)
    check_config(made(base, *asked), World(world_size=8))  # nothing to accumulate


def test_offload_needs_zero(base: Path) -> None:
    assert "parallel.zero_stage" in refusal(base, 1, "parallel.offload_optimizer=true")
    check_config(made(base, "parallel.offload_optimizer=true", "parallel.zero_stage=2"), World())


def test_a_length_must_be_set(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps and train\.epochs"):
        check_config(RunConfig(), World())


@pytest.mark.parametrize("name", ["mae", "simmim", "classification", "multitask"])
@pytest.mark.parametrize("length", ["train.steps=9", "train.epochs=2"])
def test_objective_and_length_change_alone(base: Path, name: str, length: str) -> None:
    check_config(made(base, f"objective.name={name}", length), World())


def test_grid_and_pair(base: Path) -> None:
    assert pair(3) == (3, 3)
    assert pair((2, 5)) == (2, 5)
    assert grid(made(base, "model.image_size=[64, 32]", "model.patch_size=[8, 16]").model) == (8, 2)
