"""The keys of a run's data."""

from __future__ import annotations

from dataclasses import dataclass

from vitscale.config.typed import one_of, require
from vitscale.errors import ConfigError

DECODERS = ("auto", "nvimgcodec", "simplejpeg", "pillow")


@dataclass(frozen=True)
class Source:
    """Shards of one kind: a path or URL with brace ranges ({000..099}) or wildcards (*, ?)."""

    pattern: str
    # Of several sources of data.train, all by one of the two; null: their shards are one set, each read once an epoch.
    weight: float | None = None  # its share of the samples, over the sum of all weights
    repeat: float | None = None  # or how often its samples come while those without it come once

    def __post_init__(self) -> None:
        for name in ("weight", "repeat"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.train.{name}", value, "above 0 or null")
        if self.weight is not None and self.repeat is not None:
            raise ConfigError(
                f"data.train: pattern={self.pattern}: has weight={self.weight:g} and repeat={self.repeat:g}; give one"
            )


@dataclass(frozen=True)
class Data:
    """Where images and labels come from, in which order, and how they are read."""

    train: tuple[Source, ...] = ()
    index: str | None = None  # an index.json by `vitscale index` or `pack`; else shards are scanned
    # On resume with other shards than the checkpoint's: refuse, or new_epoch: go on with these, in a new epoch.
    when_changed: str = "refuse"
    # Parallel runs through an epoch's shards, fixed for a run; divides the global batch. Null: its largest divisor up
    # to a quarter of it and to 1024.
    lanes: int | None = None
    # Samples over all lanes within which the order is shuffled, in blocks of window / lanes: a multiple of lanes where
    # lanes is written, else each block is rounded down.
    window: int = 16384
    epoch_samples: int | None = None  # samples (views) that train.epochs and the rows' epoch count; null: the data
    fraction: float = 1.0  # of data.train to train on, chosen by a hash of run.seed and each sample's key
    validation: tuple[Source, ...] = ()  # labelled shards to score on while training
    validation_fraction: float = 0.0  # or this share of data.train, chosen by a hash of each sample's key
    label: str = "cls"  # the extension of the member with the label; json.KEY.KEY: where in a .json it is
    image: str | None = None  # the extension of the member with the image; null: told by extension, else by content
    decode: str = "auto"  # nvimgcodec, simplejpeg, pillow, or auto: the first that is installed
    background: int = 255  # what transparent pixels lie on, 0 (black) to 255 (white)
    max_pixels: int = 64_000_000  # a larger image is a bad sample, told from its header
    # Decoded pixels of a micro-batch at most: an image of more than its share is decoded at a smaller scale. Null: none
    # but those that are four times model.image_size or more on both sides, which are kept at two to four times it.
    batch_bytes: int | None = None
    max_bad_fraction: float = 0.001  # stop when bad > max(3, this x samples consumed)
    threads: int | None = None  # decoding threads a rank; null: the rank's share of the cores
    prefetch: int = 4  # micro-batches read ahead
    # A folder of each node's own disk for shards at URLs; null: of these what is needed is read, by ranges.
    cache: str | None = None
    cache_bytes: int | None = None  # of that folder at most; null: as much as its disk has, but for a twentieth
    # How long storage that fails (time-outs, 5xx, EIO, ESTALE) is tried again, and a reader may give no sign of life.
    patience_s: float = 300.0

    def __post_init__(self) -> None:
        require(self.lanes is None or self.lanes > 0, "data.lanes", self.lanes, "above 0 or null")
        require(self.window > 0, "data.window", self.window, "above 0 (samples over all lanes)")
        samples = self.epoch_samples
        require(samples is None or samples > 0, "data.epoch_samples", samples, "above 0 or null")
        one_of("data.when_changed", self.when_changed, ("refuse", "new_epoch"))
        one_of("data.decode", self.decode, DECODERS)
        require(0 < self.fraction <= 1, "data.fraction", self.fraction, "in (0, 1]")
        value = self.validation_fraction
        require(0 <= value < 1, "data.validation_fraction", value, "in [0, 1)")
        require(0 <= self.background <= 255, "data.background", self.background, "in 0 to 255")
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "in [0, 1]")
        require(self.max_pixels > 0, "data.max_pixels", self.max_pixels, "above 0")
        most = self.batch_bytes
        require(most is None or most > 0, "data.batch_bytes", most, "above 0 or null")
        require(self.threads is None or self.threads > 0, "data.threads", self.threads, "above 0 or null")
        require(self.prefetch >= 2, "data.prefetch", self.prefetch, "2 or more")
        most = self.cache_bytes
        require(most is None or most > 0, "data.cache_bytes", most, "above 0 or null")
        # Readers show four times a second that they live; 1e6 s are eleven days, for who wants to wait for ever.
        require(1 <= self.patience_s <= 1e6, "data.patience_s", self.patience_s, "in 1 to 1000000 (seconds)")

    @property
    def label_extension(self) -> str:
        """Of the member that data.label names."""
        return "json" if self.label_path else self.label

    @property
    def label_path(self) -> tuple[str, ...]:
        """The keys to the label inside it."""
        kind, _, path = self.label.partition(".")
        return tuple(path.split(".")) if kind == "json" and path else ()
