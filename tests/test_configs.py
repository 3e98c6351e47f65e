"""Every config that comes with vitscale loads, fits the cluster its record names, and builds its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitscale.config.check import check_config, lanes
from vitscale.config.load import dump_config, load_config
from vitscale.config.schema import Classification, RunConfig
from vitscale.config.step import accumulation
from vitscale.models.auto import build_model
from vitscale.world import World

FOLDER = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))
RANKS = {  # as the record says
    "quickstart.yaml": 2,
    "mae.yaml": 16,
    "pretrain_vit_s_mae.yaml": 8,
    "pretrain_vit_b_mae.yaml": 16,
    "pretrain_vit_l_mae.yaml": 32,
    "pretrain_vit_h_mae.yaml": 32,
    "pretrain_vit_b_simmim.yaml": 16,
    "pretrain_vit_b_classification.yaml": 8,
    "pretrain_vit_b_deit3.yaml": 8,
    "finetune_quickstart.yaml": 2,
    "finetune_vit_b_deit3.yaml": 8,
    "finetune_vit_b_mae.yaml": 8,
    "finetune_vit_l_mae.yaml": 8,
    "finetune_vit_h_mae.yaml": 16,
    "cifar10_mae.yaml": 1,
    "cifar10_finetune.yaml": 1,
}
# Of the trainable model, its decoder or head with it. MAE's B, L and H: mmpretrain's configs/mae/README.md.
PARAMETERS = {
    "quickstart.yaml": 0.78e6,
    "pretrain_vit_s_mae.yaml": 47.5e6,
    "pretrain_vit_b_mae.yaml": 111.91e6,
    "pretrain_vit_l_mae.yaml": 329.54e6,
    "pretrain_vit_h_mae.yaml": 657.07e6,
    "pretrain_vit_b_simmim.yaml": 86.4e6,
    "pretrain_vit_b_classification.yaml": 86.57e6,
    "pretrain_vit_b_deit3.yaml": 86.6e6,
    "finetune_vit_b_deit3.yaml": 86.57e6,
    "finetune_vit_b_mae.yaml": 86.57e6,
    "finetune_vit_l_mae.yaml": 304.3e6,
    "finetune_vit_h_mae.yaml": 632.1e6,
}
SCORED = ("finetune_", "cifar10_finetune", "pretrain_vit_b_deit3")  # the command names what they are scored on


def load(name: str) -> RunConfig:
    keys = ["data.validation=/val.tar"] if name.startswith(SCORED) else []
    if name.startswith("finetune_vit"):  # what ImageNet and the encoder will say
        keys += ["model.num_labels=1000", f"model.preset={name[len('finetune_vit_')].upper()}"]
    return load_config(FOLDER / name, keys)


def test_every_config_has_its_ranks_told() -> None:
    assert sorted(RANKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_loads_fits_and_builds(name: str, tmp_path: Path) -> None:
    config, ranks = load(name), RANKS[name]
    check_config(config, World(world_size=ranks, local_world_size=min(ranks, 8), device="cuda"))
    assert lanes(config) % ranks == 0, "each rank should own whole lanes"
    with torch.device("meta"):
        model = build_model(config)
    if name in PARAMETERS:
        # the fixed sin-cos positions are parameters there, not here
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.005)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("name", [name for name in NAMES if "_vit_" in name])
def test_recipes_for_gpus_compile(name: str) -> None:
    assert load(name).train.compile


@pytest.mark.parametrize("name", NAMES)
def test_has_a_lab_record(name: str) -> None:
    record = [line[2:] for line in (FOLDER / name).read_text().splitlines() if line.startswith("# ")]
    whole = ("Purpose:", "Command:", "Hardware:", "Hours:", "Expected:")
    for word in ("Purpose:", "Data:") if name == "mae.yaml" else whole:
        assert any(line.startswith(word) for line in record), f"{name}: no {word}"


@pytest.mark.parametrize("size", ["s", "b", "l", "h"])
def test_mae_sizes_share_the_published_recipe(size: str) -> None:
    """facebookresearch/mae, PRETRAIN.md and main_pretrain.py."""
    config = load(f"pretrain_vit_{size}_mae.yaml")
    optimizer, train = config.optimizer, config.train
    assert optimizer.lr * train.global_batch / optimizer.lr_batch == pytest.approx(2.4e-3)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip, optimizer.min_lr) == ((0.9, 0.95), 0.05, 0, 0)
    assert optimizer.warmup * train.epochs == 40
    assert (config.objective.mae.mask_ratio, config.objective.mae.norm_pix_loss) == (0.75, True)
    assert (config.augment.crop_scale, config.augment.flip) == ((0.2, 1.0), 0.5)
    assert config.model.patch_size == (14 if size == "h" else 16)
    with torch.device("meta"):
        assert build_model(config).config.position_embeddings == "sincos"


@pytest.mark.parametrize(
    ("size", "lr", "decay", "epochs"), [("b", 2e-3, 0.65, 100), ("l", 4e-3, 0.75, 50), ("h", 4e-3, 0.75, 50)]
)
def test_fine_tuning_of_mae_is_the_published_recipe(size: str, lr: float, decay: float, epochs: int) -> None:
    """facebookresearch/mae, FINETUNE.md and main_finetune.py."""
    config = load(f"finetune_vit_{size}_mae.yaml")
    optimizer, train, augment = config.optimizer, config.train, config.augment
    assert optimizer.lr * train.global_batch / optimizer.lr_batch == pytest.approx(lr)
    assert optimizer.min_lr * train.global_batch / optimizer.lr_batch == pytest.approx(1e-6)
    assert (optimizer.layer_decay, optimizer.weight_decay, optimizer.betas) == (decay, 0.05, (0.9, 0.999))
    assert (train.global_batch, train.epochs, optimizer.warmup * train.epochs) == (1024, epochs, pytest.approx(5))
    assert (augment.mixup, augment.cutmix, augment.erase) == (0.8, 1.0, 0.25)
    assert (config.model.pooling, config.model.fc_norm) == ("mean", True)
    assert config.objective.classification.label_smoothing == 0.1
    assert config.objective.classification.head_std == 2e-5


def test_the_last_epochs_of_deit3_are_the_published_recipe() -> None:
    """facebookresearch/deit, README_revenge.md: ViT-B at 224 pixels, from what the first stage trained at 192."""
    first, config = load("pretrain_vit_b_deit3.yaml"), load("finetune_vit_b_deit3.yaml")
    optimizer, train, augment = config.optimizer, config.train, config.augment
    assert config.model.init_from == f"runs/{first.run.name}/model"
    assert (first.model.image_size, config.model.image_size, config.model.drop_path_rate) == (192, 224, 0.2)
    assert (train.global_batch, train.epochs, optimizer.warmup * train.epochs) == (512, 20, 5)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_batch) == (1e-5, 1e-5, train.global_batch)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.layer_decay) == (0.1, (0.9, 0.999), 1.0)
    assert (augment.mixup, augment.cutmix, augment.erase, augment.repeats) == (0.8, 1.0, 0.0, 1)
    assert (augment.rand_augment, augment.three_augment) == ("rand-m9-n2-mstd0.5-inc1", False)
    assert config.objective.classification == Classification(label_smoothing=0.1)


@pytest.mark.parametrize("change", ["mae", "simmim", "classification", "multitask"])
def test_objective_name_alone_can_change(change: str) -> None:
    config = load_config(FOLDER / "pretrain_vit_b_mae.yaml", [f"objective.name={change}"])
    check_config(config, World(world_size=16))
    with torch.device("meta"):
        build_model(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_quickstart_fits_its_data(ranks: int) -> None:
    """1,437 digits; an epoch needs a batch and a lane more than it gives."""
    config = load("quickstart.yaml")
    check_config(config, World(world_size=ranks, local_world_size=ranks))
    assert config.train.global_batch + lanes(config) <= 1437 <= config.data.window
    assert accumulation(config, World(world_size=ranks)) == 2 // ranks
    assert round(config.optimizer.warmup * config.train.steps) == 100


@pytest.mark.parametrize("overrides", [["train.global_batch=256", "train.micro_batch=64"], []])
def test_the_readme_says_how_many_images_an_epoch_needs(overrides: list[str]) -> None:
    config = load_config(FOLDER / "pretrain_vit_s_mae.yaml", overrides)
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert all(override in readme for override in overrides)
    assert f"{config.train.global_batch + lanes(config):,}" in readme.split("An epoch needs at least")[1][:300]
