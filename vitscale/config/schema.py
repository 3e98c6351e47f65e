"""The keys of a run: frozen dataclasses, one a section, with defaults and one line of meaning each.

No torch here: a config is read before anything heavy is imported. What single values must satisfy
is in `__post_init__`; what several must satisfy together is in config/check.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from vitscale.config import model_rules
from vitscale.config.augmentation import Augmentation
from vitscale.config.data import Data, Source
from vitscale.config.typed import one_of, require
from vitscale.errors import ConfigError
from vitscale.files.stores import is_url, secret_of_query

# A number, or the word by which a run chooses it at its start: run/auto.py. What trains sees the number alone, so that
# is what types are checked by.
if TYPE_CHECKING:
    OrAuto = int
else:
    OrAuto = int | Literal["auto"]

AUTO: Any = "auto"
OBJECTIVES = ("mae", "simmim", "classification", "multitask")
PRECISIONS = ("fp32", "bf16")
CHECKPOINTING: tuple[bool | str, ...] = (False, "selective", True)  # the later, the less memory and the more time


@dataclass(frozen=True)
class Run:
    name: str = "run"  # the run's folder is DIR/NAME
    dir: str = "runs"
    seed: int = 0  # every random choice is a hash of this, the epoch, the sample and the purpose

    def __post_init__(self) -> None:
        require(
            bool(self.name) and "/" not in self.name and self.name not in (".", ".."),
            "run.name",
            self.name,
            "a folder's name, without '/'",
        )


@dataclass(frozen=True)
class Model:
    """Keys of models.configuration.ViTConfig; `preset` gives the sizes that are not written here."""

    preset: str | None = None  # Ti, S, B, L, H, g, G, or by resources: low, medium, high
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0  # above 0 is refused in training: use drop_path_rate
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0  # of the last block; grows linearly from 0 at the first
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6  # MAE's and timm's; transformers' own default is 1e-12
    image_size: int | tuple[int, int] = 224  # pixels: a square's side, or (height, width)
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int | tuple[int, int] | None = None  # transformers' name for what SimMIM's decoder needs: the
    # patch size, as null is
    pooler_output_size: int | None = None  # the pooler is transformers' and in no objective: its keys are handed on
    pooler_act: str = "tanh"
    use_cls_token: bool = True
    num_register_tokens: int = 0  # tokens that belong to no patch, beside the class token
    position_embeddings: str = "auto"  # learned, sincos, none, or auto: sincos for mae, else learned
    rope_theta: float | None = None  # rotary positions of patches with this base (DINOv3: 100); null: none
    layer_scale_init_value: float | None = None  # what both branches of a block are scaled by at first; null: not
    qk_norm: bool = False  # a layer norm of every head's query and key
    swiglu: bool = False  # MLPs that gate with SiLU; hidden_act is not used then
    pooling: str = "cls"  # what the classifier sees: cls, or the mean of patch tokens
    fc_norm: bool = False  # the last norm stands after the pooling, none before; of objective classification only
    num_labels: int = 1000  # where id2label is written, as many as it names
    id2label: tuple[str, ...] | None = None  # the classes' names: a list, or a mapping from 0, 1, ...
    problem_type: str | None = None  # regression, single_label_classification (the only one of multitask),
    # multi_label_classification, or null: regression where num_labels is 1, else single-label
    init_from: str | None = None  # a model's folder, or file of weights, that a fresh run starts from
    init_take: str | None = None  # which set of weights of a file that has several, such as teacher or student

    def __post_init__(self) -> None:
        values = vars(self) | {
            "position_embeddings": None if self.position_embeddings == "auto" else self.position_embeddings
        }
        for key, value, rule in model_rules.of_values(values):
            choice = "auto, or " if key == "position_embeddings" else ""
            raise ConfigError(f"model.{key}={value!r}: must be {choice}{rule}")
        if self.id2label is not None:
            named = len(self.id2label)
            require(named > 0, "model.id2label", self.id2label, "the names of one class or more, or null")
            rule = f"{named}, as many as model.id2label names"
            require(self.num_labels == named, "model.num_labels", self.num_labels, rule)
        if self.init_from is None:
            require(self.init_take is None, "model.init_take", self.init_take, "null without model.init_from")


@dataclass(frozen=True)
class MAE:
    """He et al. 2022, arXiv 2111.06377."""

    mask_ratio: float = 0.75
    norm_pix_loss: bool = True  # targets standardized by patch
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, "objective.mae.mask_ratio", self.mask_ratio, "in (0, 1)")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            value = getattr(self, f"decoder_{name}")
            require(value > 0, f"objective.mae.decoder_{name}", value, "above 0")


@dataclass(frozen=True)
class SimMIM:
    """Xie et al. 2022, arXiv 2111.09886."""

    mask_ratio: float = 0.6
    mask_patch: int | None = None  # side of a cell, in patches; null: 2 (x 16 = the paper's 32 pixels) or, where
    # 2 do not fit the grid, 1 (config/check.py, mask_patch)

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, "objective.simmim.mask_ratio", self.mask_ratio, "in (0, 1)")
        value = self.mask_patch
        require(value is None or value > 0, "objective.simmim.mask_patch", value, "above 0 (in patches) or null")


@dataclass(frozen=True)
class Classification:
    """Of classes, of several labels at once or of numbers, as model.problem_type says."""

    label_smoothing: float = 0.0
    loss: str | None = None  # ce, or bce: each class a question of its own (DeiT III); null: by the problem type
    class_weights: str | tuple[float, ...] | None = None  # a list, or balanced: 1 / frequency, of mean 1 over samples
    head_std: float | None = None  # what a new head's weights are drawn by; null: model.initializer_range

    def __post_init__(self) -> None:
        value, std = self.label_smoothing, self.head_std
        require(0 <= value < 1, "objective.classification.label_smoothing", value, "in [0, 1)")
        if self.loss is not None:
            one_of("objective.classification.loss", self.loss, ("ce", "bce"))
        weights = self.class_weights
        fits = weights in (None, "balanced") if isinstance(weights, str | None) else min(weights, default=-1.0) >= 0
        rule = "balanced, or numbers of 0 or more, one a class, or null"
        require(fits, "objective.classification.class_weights", weights, rule)
        require(std is None or std > 0, "objective.classification.head_std", std, "above 0, or null")


@dataclass(frozen=True)
class Multitask:
    """SimMIM (its keys: objective.simmim) and classification on one encoder, in one forward."""

    mim_weight: float = 1.0
    classification_weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    name: str = "mae"
    mae: MAE = field(default_factory=MAE)
    simmim: SimMIM = field(default_factory=SimMIM)
    classification: Classification = field(default_factory=Classification)
    multitask: Multitask = field(default_factory=Multitask)

    def __post_init__(self) -> None:
        one_of("objective.name", self.name, OBJECTIVES)

    @property
    def needs_labels(self) -> bool:
        return self.name in ("classification", "multitask")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019); biases and norms are not decayed."""

    lr: float = 1.5e-4  # at `lr_batch` images a step; peak of the schedule
    lr_batch: int | None = 256  # lr grows as global_batch / lr_batch (512 for SimMIM); null: lr as it is
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # lr of each block over that of the one behind it (fine-tuning; MAE: 0.65 to 0.75)
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    warmup: float = 0.05  # share of all steps in which lr grows linearly from 0
    min_lr: float = 0.0  # where the cosine ends, scaled as lr is

    def __post_init__(self) -> None:
        require(self.lr >= 0, "optimizer.lr", self.lr, "0 or more")
        require(self.lr_batch is None or self.lr_batch > 0, "optimizer.lr_batch", self.lr_batch, "above 0 or null")
        require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "each in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", self.layer_decay, "in (0, 1]")
        require(self.clip >= 0, "optimizer.clip", self.clip, "0 (none) or more")
        require(0 <= self.warmup < 1, "optimizer.warmup", self.warmup, "a share of all steps, in [0, 1)")
        # Above the peak the cosine would rise to the end, which no one means by a floor.
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"in [0, optimizer.lr={self.lr}]")


@dataclass(frozen=True)
class Train:
    global_batch: int = 256  # images a step, over all ranks and accumulation
    micro_batch: OrAuto = 32  # images a forward on one rank; accumulation is derived; auto: by the memory there is
    steps: int | None = None  # one of steps and epochs; setting one clears the other
    epochs: float | None = None
    precision: str = "fp32"
    gradient_checkpointing: bool | str = False  # blocks run again in backward; selective: matrix products do not
    compile: bool = False  # torch.compile of each block and of a loss over pixels
    cuda_graphs: bool = False  # each block started as a whole: faster where the host is what a GPU waits for
    deterministic: bool = False  # only algorithms that give the same bits each time; on a GPU slower ones
    ema_decay: float | None = None  # of the weights' moving average, which is evaluated and exported; null: none
    freeze: int = 0  # so many blocks from the input on, and the patch embedding, stay as they are; -1: the encoder
    keep_best: str | None = None  # the checkpoint with the best of this score is kept and exported: validation/top1
    early_stopping: int | None = None  # validations in a row without a better train.keep_best that end the run
    max_skipped_steps: int = 5  # steps in a row with a non-finite gradient before the run stops

    def __post_init__(self) -> None:
        require(self.global_batch > 0, "train.global_batch", self.global_batch, "above 0")
        micro = self.micro_batch
        require(micro == AUTO or micro > 0, "train.micro_batch", micro, "above 0, or auto")
        require(self.steps is None or self.steps > 0, "train.steps", self.steps, "above 0")
        require(self.epochs is None or self.epochs > 0, "train.epochs", self.epochs, "above 0")
        one_of("train.precision", self.precision, PRECISIONS)
        again = self.gradient_checkpointing
        require(again in CHECKPOINTING, "train.gradient_checkpointing", again, "true, false or selective")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "train.ema_decay", decay, "in (0, 1) or null")
        require(self.freeze >= -1, "train.freeze", self.freeze, "blocks, or -1 for the whole encoder")
        stops = self.early_stopping
        require(stops is None or stops > 0, "train.early_stopping", stops, "above 0 or null")
        best = self.keep_best
        rule = "validation/NAME, say validation/top1, or null"
        require(best is None or best.startswith("validation/"), "train.keep_best", best, rule)
        require(stops is None or best is not None, "train.early_stopping", stops, "null without train.keep_best")
        require(self.max_skipped_steps > 0, "train.max_skipped_steps", self.max_skipped_steps, "above 0")


@dataclass(frozen=True)
class Parallel:
    zero_stage: OrAuto = 0  # 0: DDP; 1 optimizer, 2 and gradients, 3 and weights sharded over the ranks; auto: the
    # lowest that fits into the memory there is
    offload_optimizer: bool = False  # ZeRO 1 to 3: Adam's state and step on the CPU
    reduce_dtype: str = "fp32"  # what gradients are summed over ranks in; bf16: half of the traffic, and rounded
    bucket_elements: int | None = None  # of ZeRO: gradients reduced at once; null: an eighth of the model's, so that
    # most of them overlap backward, but 1 to 25 million (config/step.py, bucket_elements)
    pin_cores: bool = True  # each rank of a node has cores of its own, near its GPU; not fewer than without
    timeout_s: int = 600  # a collective that takes longer ends the run
    patience_s: float | None = None  # for a rank that hangs; null: the lesser of 60 s and half of timeout_s
    restarts_without_progress: int = 3  # in a row after faults of the infrastructure, without a new checkpoint

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3, AUTO), "parallel.zero_stage", self.zero_stage, "0, 1, 2, 3 or auto")
        one_of("parallel.reduce_dtype", self.reduce_dtype, PRECISIONS)
        bucket = self.bucket_elements
        require(bucket is None or bucket > 0, "parallel.bucket_elements", bucket, "above 0 or null")
        require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "above 0 seconds")
        patience_s = self.patience_s
        require(patience_s is None or patience_s > 0, "parallel.patience_s", patience_s, "above 0 seconds or null")
        restarts = self.restarts_without_progress
        require(restarts >= 0, "parallel.restarts_without_progress", restarts, "0 or more")

    @property
    def hang_s(self) -> float:
        """After how many seconds without a sign of life a rank hangs: before gloo or NCCL give up."""
        return self.patience_s or min(60.0, self.timeout_s / 2)


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 500
    asynchronous: bool = True  # training goes on while a checkpoint is written; the last one is waited for
    keep: int = 3  # newest kept
    keep_every_hours: float | None = None  # of training: one checkpoint is kept for good so often; null: none
    resume_from: str | None = None  # a checkpoint folder to go on from when this run has none
    notice_s: float = 120.0  # from a stop request to the kill; a save that takes longer is warned of

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "checkpoint.every_steps", self.every_steps, "above 0")
        require(self.keep > 0, "checkpoint.keep", self.keep, "above 0")
        hours = self.keep_every_hours
        require(hours is None or hours > 0, "checkpoint.keep_every_hours", hours, "above 0 or null")
        require(self.notice_s > 0, "checkpoint.notice_s", self.notice_s, "above 0")


@dataclass(frozen=True)
class Tracking:
    mlflow: bool = True
    mlflow_uri: str | None = None  # null: sqlite in the run's folder
    experiment: str = "vitscale"
    log_model: bool | None = None  # upload model/ at the end; null: where mlflow_uri names a server

    def __post_init__(self) -> None:
        uri = self.mlflow_uri or ""
        # A database may name its user; a password may have a / in it.
        user = re.match(r"https?://[^/]*@|(?!sqlite|file)[\w+.-]+://[^/:@]*:(?!\d+/)[^@]*@", uri, re.IGNORECASE)
        if secret := "a user or password" if user else secret_of_query(uri):
            # Not require, which would print it.
            raise ConfigError(
                f"tracking.mlflow_uri holds {secret}, which config.yaml would keep: leave it out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment "
                "(a database's password where its own tools look, as in ~/.pgpass)"
            )
        if uri.lower().startswith(("http://", "https://")):
            require(is_url(uri), "tracking.mlflow_uri", uri, "a server's URL, as http://HOST:5000")


@dataclass(frozen=True)
class Log:
    every_steps: int = 10
    trace: bool = False  # trace.jsonl: the sample keys of every step

    def __post_init__(self) -> None:
        require(self.every_steps > 0, "log.every_steps", self.every_steps, "above 0")


@dataclass(frozen=True)
class Guard:
    """How numbers that go wrong are found, and what is done then."""

    spike_deviations: float = 8.0  # a loss so far above the median of the last 128 is a spike (engine/guard.py)
    digest_every_steps: int | None = 100  # how often, beside each save, what all ranks hold is compared; null: never
    rollback: bool = False  # go back before a spike that lasts, and leave out the batches that it began with
    rollback_steps: int = 100  # the checkpoint gone back to is of so many steps before the spike, or more
    max_rollbacks: int = 3  # of a run; after so many, divergence ends it

    def __post_init__(self) -> None:
        require(self.spike_deviations > 0, "guard.spike_deviations", self.spike_deviations, "above 0")
        every = self.digest_every_steps
        require(every is None or every > 0, "guard.digest_every_steps", every, "above 0 or null")
        require(self.rollback_steps > 0, "guard.rollback_steps", self.rollback_steps, "above 0")
        require(self.max_rollbacks > 0, "guard.max_rollbacks", self.max_rollbacks, "above 0")


@dataclass(frozen=True)
class Evaluation:
    """How often a run is scored while it trains, and frozen features, there and by `vitscale evaluate`."""

    every_steps: int | None = None  # one of the two, or neither: at the end alone
    every_epochs: float | None = None
    images: int = 20_000  # of train, of test and of a loss without labels, in training; `vitscale evaluate` takes all
    seconds: float | None = None  # what scoring frozen features may take each time in training: fewer images then
    train: tuple[Source, ...] = ()  # labelled shards to fit on; empty: data.train
    test: tuple[Source, ...] = ()  # held-out labelled shards
    crop_fraction: float = 0.875  # side of the centre crop, of the image's shorter side
    neighbours: int = 20  # k of kNN
    probe: str = "ridge"  # ridge in closed form, or logistic: regression by L-BFGS, slower
    folds: int = 5  # of the cross-validation that chooses the probe's pooling and strength
    shots: tuple[int, ...] = (1, 5, 10)  # labels a class for few-shot scores of `vitscale evaluate`
    seeds: int = 5  # draws of those labels
    batch: int = 256

    def __post_init__(self) -> None:
        value = self.crop_fraction
        require(0 < value <= 1, "evaluation.crop_fraction", value, "in (0, 1]")
        steps, epochs = self.every_steps, self.every_epochs
        require(steps is None or steps > 0, "evaluation.every_steps", steps, "above 0 or null")
        require(epochs is None or epochs > 0, "evaluation.every_epochs", epochs, "above 0 or null")
        require(None in (steps, epochs), "evaluation.every_steps", steps, "null beside evaluation.every_epochs")
        require(self.images > 0, "evaluation.images", self.images, "above 0")
        require(self.seconds is None or self.seconds > 0, "evaluation.seconds", self.seconds, "above 0 or null")
        require(self.neighbours > 0, "evaluation.neighbours", self.neighbours, "above 0")
        one_of("evaluation.probe", self.probe, ("ridge", "logistic"))
        require(self.folds > 1, "evaluation.folds", self.folds, "above 1")
        require(all(shot > 0 for shot in self.shots), "evaluation.shots", self.shots, "numbers above 0")
        require(self.seeds > 0, "evaluation.seeds", self.seeds, "above 0")
        require(self.batch > 0, "evaluation.batch", self.batch, "above 0")


@dataclass(frozen=True)
class RunConfig:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    augment: Augmentation = field(default_factory=Augmentation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    log: Log = field(default_factory=Log)
    guard: Guard = field(default_factory=Guard)
    evaluation: Evaluation = field(default_factory=Evaluation)


def as_dict(section: Any) -> Any:
    """A config (or a part of it) as plain dicts, lists and scalars, for YAML and JSON."""
    if hasattr(section, "__dataclass_fields__"):
        return {f.name: as_dict(getattr(section, f.name)) for f in fields(section)}
    if isinstance(section, tuple):
        return [as_dict(item) for item in section]
    return section
