"""Reading a config: layers, types, and errors that say where, what and how to mend it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale.config.augmentation import Augmentation, Step
from vitscale.config.load import dump_config, load_config
from vitscale.config.schema import RunConfig, Source, as_dict
from vitscale.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(text, name) -> path of a config file."""

    def write_file(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def refusal(path: Path, *overrides: str) -> str:
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_the_defaults(write: Any) -> None:
    assert load_config(write("")) == RunConfig()
    assert load_config(write("train:\n")) == RunConfig()  # a section with nothing in it


def test_values_arrive_in_their_sections(write: Any) -> None:
    config = load_config(write("run: {name: a, seed: 7}\nobjective: {mae: {mask_ratio: 0.6}}\n"))
    assert (config.run.name, config.run.seed, config.objective.mae.mask_ratio) == ("a", 7, 0.6)
    assert config.objective.simmim == RunConfig().objective.simmim


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("train: {step: 5}", "train.step", "train.steps"),
        ("trian: {steps: 5}", "trian", "train"),
        ("model: {global_batch: 5}", "model.global_batch", "train.global_batch"),
        ("objective: {mae: {mask_ration: 0.5}}", "objective.mae.mask_ration", "objective.mae.mask_ratio"),
    ],
)
def test_an_unknown_key_names_the_nearest(write: Any, text: str, key: str, nearest: str) -> None:
    said = refusal(write(text))
    assert f"unknown key {key!r}" in said
    assert f"did you mean {nearest}?" in said
    assert "config.yaml" in said


def test_a_key_like_no_other_points_to_the_list(write: Any) -> None:
    assert "vitscale config" in refusal(write("qwxz: 1"))
    assert "unknown key 1" in refusal(write("1: 2")).replace("'", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: many}", ["train.steps='many'", "a whole number or null", "not text"]),
        ("train: {steps: 1.5}", ["train.steps=1.5", "a whole number"]),
        ("train: {steps: true}", ["train.steps=true", "a whole number"]),
        ("train: {global_batch: null}", ["train.global_batch=null", "not null"]),
        ("optimizer: {lr: fast}", ["optimizer.lr='fast'", "a number"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr='.nan'", "a number"]),
        ("optimizer: {lr: true}", ["optimizer.lr=true", "a number"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas=[0.9]", "a list of 2 numbers"]),
        ("optimizer: {betas: 0.9}", ["optimizer.betas=0.9", "a list of 2 numbers"]),
        ("augment: {mean: [a]}", ["augment.mean=['a']", "a list of numbers"]),
        ("log: {trace: 1}", ["log.trace=1", "true or false"]),
        ("run: {name: [5]}", ["run.name=[5]", "text", "not a list"]),
        ("run: {name: }", ["run.name=''", "text", "not null"]),
        ("train: {steps: 1:30}", ["train.steps='1:30'", "a whole number"]),
        ("train: {steps: '5'}", ["train.steps='5'", "a whole number"]),
        ("model: {image_size: [224]}", ["model.image_size=[224]", "a whole number or a list of 2 whole numbers"]),
        ("data: {train: [[a]]}", ["data.train=[['a']]", "{pattern, weight, repeat}"]),
        ("data: {train: [{patern: x}]}", ["data.train: unknown key 'patern'; did you mean", "pattern, weight"]),
        (
            "augment: {steps: [{name: rotate, p: 1}]}",
            ["augment.steps: unknown key 'p'", "name, probability"],
        ),
        ("augment: {steps: [{low: 1}]}", ["augment.steps={'low': 1}: has no name"]),
        ("data: {train: [{pattern: x, weight: heavy}]}", ["data.train.weight='heavy'", "a number"]),
        ("train: 5", ["train=5", "section"]),
        ("train: [steps]", ["train=['steps']", "section"]),
    ],
)
def test_a_wrong_type_names_key_value_and_rule(write: Any, text: str, words: list[str]) -> None:
    said = refusal(write(text))
    for word in words:
        assert word in said


def test_numbers_are_widened_and_nothing_else(write: Any) -> None:
    config = load_config(write("optimizer: {lr: 1e-3, weight_decay: 1, betas: [0, 0.5]}"))  # 1e-3 is text in YAML 1.1
    assert config.optimizer.lr == 1e-3
    assert (config.optimizer.weight_decay, config.optimizer.betas) == (1.0, (0.0, 0.5))
    assert isinstance(config.optimizer.weight_decay, float)


def test_sources_in_every_form(write: Any) -> None:
    assert load_config(write("data: {train: 'a-{00..09}.tar'}")).data.train == (Source("a-{00..09}.tar"),)
    assert load_config(write("data: {train: {pattern: a.tar, weight: 2}}")).data.train == (Source("a.tar", 2.0),)
    mixed = load_config(write("data: {train: [a.tar, {pattern: b.tar}]}")).data.train
    assert mixed == (Source("a.tar"), Source("b.tar"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 5}\ntrain: {epochs: 2}", [":2:", "'train'", "twice"]),
        ("train: {steps: 5, steps: 6}", [":1:", "'steps'", "twice"]),
        ("train: {steps: 5", ["cannot be read as YAML"]),
        ("- a\n- b", ["holds a list"]),
        ("!!python/object/apply:os.system ['true']", ["cannot be read as YAML"]),
        ("? [a, b]\n: c", [":1:", "['a', 'b']", "one word"]),
    ],
)
def test_what_is_no_config(write: Any, text: str, words: list[str]) -> None:
    said = refusal(write(text))
    for word in words:
        assert word in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml: no such config file" in refusal(tmp_path / "nowhere.yaml")
    assert str(tmp_path) in refusal(tmp_path)  # a folder
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe9}")
    assert "latin.yaml" in refusal(tmp_path / "latin.yaml")


def test_extends_is_a_layer_below(write: Any) -> None:
    write("run: {name: base, seed: 1}\ntrain: {steps: 10}", "base.yaml")
    write("extends: base.yaml\nrun: {name: middle}", "middle.yaml")
    config = load_config(write("extends: ../middle.yaml\ntrain: {micro_batch: 2}", "deeper/top.yaml"))
    assert (config.run.name, config.run.seed, config.train.steps, config.train.micro_batch) == ("middle", 1, 10, 2)


def test_extends_in_a_circle(write: Any) -> None:
    write("extends: b.yaml", "a.yaml")
    assert "comes back" in refusal(write("extends: a.yaml", "b.yaml"))
    assert "comes back" in refusal(write("extends: self.yaml", "self.yaml"))


def test_extends_must_name_one_file(write: Any) -> None:
    assert "extends=['a.yaml']" in refusal(write("extends: [a.yaml]"))
    assert "missing.yaml: no such config file" in refusal(write("extends: missing.yaml"))


def test_an_error_names_the_file_it_stands_in(write: Any) -> None:
    write("train: {stepz: 1}", "base.yaml")
    assert "base.yaml" in refusal(write("extends: base.yaml"))


def test_overrides_win_and_are_typed(write: Any) -> None:
    path = write("train: {steps: 5, global_batch: 8}\nmodel: {image_size: 32}")
    overrides = ["train.steps=7", "model.image_size=[16, 24]", "data.train=/a/{0..9}.tar", "run.name=x=y"]
    config = load_config(path, overrides)
    assert config.train.steps == 7
    assert config.train.global_batch == 8
    assert config.model.image_size == (16, 24)
    assert config.data.train == (Source("/a/{0..9}.tar"),)
    assert config.run.name == "x=y"
    assert load_config(path, ["data.train=/a/{0..9}.tar"]).data.train == (Source("/a/{0..9}.tar"),)
    assert load_config(path, ["data.index=null"]).data.index is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["'train.steps'", "dotted.key=value"]),
        ("=5", ["dotted.key=value"]),
        ("train.step=5", ["unknown key 'train.step'", "command line", "train.steps"]),
        ("train.steps=x", ["command line", "train.steps='x'"]),
        ("train.steps=[1", ["train.steps='[1'", "a whole number"]),
        ("optimizer.betas=[1", ["no YAML"]),
        ("train.steps.more=1", ["train.steps"]),
        ("train=5", ["train=5", "section"]),
        ("train.steps=2026-99-99", ["train.steps='2026-99-99'", "a whole number"]),
        ("train.steps=5 # five", ["train.steps='5 # five'", "a whole number"]),
        ("run.name=", ["run.name=''", "text"]),
        ("data.train=", ["data.train=''", "{pattern, weight, repeat}"]),
        ("evaluation.test=~", ["evaluation.test=~", "{pattern, weight, repeat}", "not null"]),
        ("data.train=[a.tar, null]", ["data.train=", "{pattern, weight, repeat}"]),
        ("data.train=[x #y.tar]", ["no YAML", "in quotes"]),
        ("evaluation.test=[a.tar,b.tar", ["no YAML"]),
        ("data.train=[a.tar,\nb.tar", ["no YAML"]),
        ("data.train={pattern: a.tar", ["no YAML"]),
        ("augment.steps=[rotate", ["no YAML"]),
        ("optimizer=", ["'optimizer='", "section", "optimizer.KEY=VALUE"]),
        ("objective.mae= ", ["section", "objective.mae.KEY=VALUE"]),
        ("nosuch=[1", ["no YAML"]),
        ("model.id2label={0: a, 0: b}", ["0 is written twice"]),
        ("model.label2id={a: 0}", ["model.id2label"]),
    ],
)
def test_a_bad_override(write: Any, override: str, words: list[str]) -> None:
    said = refusal(write(""), override)
    for word in words:
        assert word in said


def test_brackets_without_end(write: Any) -> None:
    for override in ("model.image_size", "optimizer", "nosuch"):
        assert "no YAML" in refusal(write(""), f"{override}={5000 * '['}")
    assert "cannot be read as YAML" in refusal(write(f"model: {{a: {5000 * '['}}}"))
    assert "cannot be read as YAML" in refusal(write(5000 * "- "))


@pytest.mark.parametrize(
    "text",
    [
        *("123", "007", "1.5", "1e3", "yes", "null", "~", "2026-01-02", "2026-99-99", "{a,b}.x", "*star", "[a", "[a]"),
        *("a: b: c", "exp #3", "'q'", '"q"', "it's", "- a", "-x", " spaced ", "a\tb", "!!int 5", "&a", "<<", "{a: 1}"),
    ],
)
def test_text_stays_as_it_was_written(write: Any, text: str) -> None:
    config = load_config(write(""), [f"run.name={text}", f"tracking.experiment={text}"])
    assert (config.run.name, config.tracking.experiment) == (text, text)


@pytest.mark.parametrize("text", ["123", "{a,b}.tar", "{00..09}.tar", "*.tar", "[ab].tar", "[0-9", "[ab]{0,1}.tar"])
def test_one_pattern_as_it_was_written(write: Any, text: str) -> None:
    config = load_config(write(""), [f"data.train={text}", f"evaluation.test={text}"])
    assert config.data.train == config.evaluation.test == (Source(text),)


def test_a_path_may_start_at_home(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = write("data: {index: ~/i.json, validation: [~/v.tar, {pattern: ~/w.tar}]}")
    overrides = ["run.dir=~/runs", "data.train=~/{0,1}.tar", "model.init_from=~/m", "run.name=~", "data.cache=~/c"]
    config = load_config(path, [*overrides, "evaluation.test=a~.tar"])
    assert (config.run.dir, config.run.name, config.model.init_from) == ("/home/me/runs", "~", "/home/me/m")
    assert (config.data.index, config.data.cache) == ("/home/me/i.json", "/home/me/c")
    assert config.data.train == (Source("/home/me/{0,1}.tar"),)
    assert config.data.validation == (Source("/home/me/v.tar"), Source("/home/me/w.tar"))
    assert config.evaluation.test == (Source("a~.tar"),)


def test_null_is_null_where_the_schema_has_it(write: Any) -> None:
    path = write("data: {index: i.json}\nmodel: {init_from: x}")
    config = load_config(path, ["data.index=", "model.init_from=null"])
    assert (config.data.index, config.model.init_from) == (None, None)
    assert load_config(path, ["model.init_from=12"]).model.init_from == "12"


def test_class_names_in_every_form(write: Any) -> None:
    for text in ("[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}"):
        model = load_config(write(f"model: {{id2label: {text}}}")).model
        assert (model.id2label, model.num_labels) == (("cat", "dog"), 2)
    numbered = load_config(write("model: {id2label: [1, no, 2026-01-02, 0123]}")).model
    assert numbered.id2label == ("1", "no", "2026-01-02", "0123")
    for text in ("{1: cat, 2: dog}", "cat", "[[1], 2]", "{a: 0}"):
        assert "a list of texts or a mapping" in refusal(write(f"model: {{id2label: {text}}}"))
    named = write("model: {num_labels: 7}")
    assert load_config(named, ["model.id2label=[a, b, c]"]).model.num_labels == 3  # clears what lies below
    assert "model.num_labels=5: must be 2" in refusal(write("model: {id2label: [a, b]}"), "model.num_labels=5")


def test_steps_and_epochs_clear_each_other(write: Any) -> None:
    write("train: {epochs: 3}", "base.yaml")
    path = write("extends: base.yaml\ntrain: {steps: 5}")
    assert (load_config(path).train.steps, load_config(path).train.epochs) == (5, None)
    config = load_config(path, ["train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2.0)
    config = load_config(path, ["train.steps=9"])
    assert (config.train.steps, config.train.epochs) == (9, None)
    assert "train.steps=5 and train.epochs=2" in refusal(write("train: {steps: 5, epochs: 2}"))


def test_a_resolved_config_says_null_for_the_other(write: Any) -> None:
    resolved = write(dump_config(load_config(write("train: {epochs: 3}"))), "resolved.yaml")
    config = load_config(resolved, ["train.steps=5"])
    assert (config.train.steps, config.train.epochs) == (5, None)


def test_the_preset_lies_below_what_is_written(write: Any) -> None:
    path = write("model: {preset: S, num_hidden_layers: 2}")
    model = load_config(path).model
    assert (model.hidden_size, model.num_attention_heads, model.num_hidden_layers) == (384, 6, 2)
    assert load_config(path, ["model.patch_size=8"]).model.patch_size == 8


def test_a_new_preset_clears_sizes_from_below(write: Any) -> None:
    write("model: {preset: S, num_hidden_layers: 2, layer_norm_eps: 1e-5}", "base.yaml")
    path = write("extends: base.yaml\nmodel: {preset: L}")
    assert (load_config(path).model.num_hidden_layers, load_config(path).model.layer_norm_eps) == (24, 1e-5)
    assert load_config(path, ["model.preset=H"]).model.patch_size == 14


@pytest.mark.parametrize(
    ("name", "width", "layers", "heads", "hidden", "patch"),
    [
        ("Ti", 192, 12, 3, 768, 16),
        ("S", 384, 12, 6, 1536, 16),
        ("B", 768, 12, 12, 3072, 16),
        ("L", 1024, 24, 16, 4096, 16),
        ("H", 1280, 32, 16, 5120, 14),
        ("g", 1408, 40, 16, 6144, 14),
        ("G", 1664, 48, 16, 8192, 14),
    ],
)
def test_presets_are_the_papers(
    write: Any, name: str, width: int, layers: int, heads: int, hidden: int, patch: int
) -> None:
    model = load_config(write(f"model: {{preset: {name}}}")).model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (width, layers, heads)
    assert (model.intermediate_size, model.patch_size) == (hidden, patch)


def test_an_unknown_preset(write: Any) -> None:
    assert "model.preset='XL'" in refusal(write("model: {preset: XL}"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model: {preset: g}",
        "model: {preset: S, hidden_size: 96, num_attention_heads: 4}",
        "model: {image_size: [64, 32], patch_size: [8, 4]}",
        "model: {id2label: {0: 'no', 1: '1'}}",
        "data: {train: [a.tar, {pattern: 'b {0..1}.tar', weight: 1}]}",
        "train: {epochs: 1.5}\noptimizer: {lr: 1.5e-4, eps: 1e-8, lr_batch: null}",
        "run: {name: 'é: #'}\naugment: {mean: [0.5], std: [0.25]}",
    ],
)
def test_the_resolved_config_reads_back_to_itself(write: Any, text: str) -> None:
    config = load_config(write(text))
    resolved = dump_config(config)
    assert load_config(write(resolved, "resolved.yaml")) == config
    assert set(yaml.safe_load(resolved)) == {item.name for item in fields(RunConfig)}


@settings(max_examples=60)
@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e30))
def test_every_float_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.getbasetemp() / "float.yaml"
    path.write_text("")
    config = load_config(path, [f"optimizer.lr={value!r}"])
    assert config.optimizer.lr == value
    path.write_text(dump_config(config))
    assert load_config(path) == config


@settings(max_examples=100)
@given(st.text(st.characters(exclude_characters="/\0"), min_size=1).filter(lambda text: text not in (".", "..")))
def test_every_text_arrives_as_it_was_typed_and_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text("")
    nullable = None if text.lower() in ("null", "~") else text
    config = load_config(path, [f"run.name={text}", f"data.index={text}", f"data.train={text}x"])
    assert (config.run.name, config.data.index) == (text, nullable)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_numbers_are_decimal_whatever_yaml_makes_of_them(write: Any) -> None:
    config = load_config(write("train: {steps: 0123, global_batch: 1_000}"), ["run.seed=010"])
    assert (config.train.steps, config.train.global_batch, config.run.seed) == (123, 1000, 10)


def _leaves(section: Any, prefix: str = "") -> list[str]:
    names = []
    for item in fields(section):
        value = getattr(section, item.name)
        names += _leaves(value, f"{prefix}{item.name}.") if is_dataclass(value) else [f"{prefix}{item.name}"]
    return names


@pytest.mark.parametrize("key", _leaves(RunConfig()))
def test_every_key_can_be_written_as_an_override(write: Any, key: str) -> None:
    value: Any = as_dict(RunConfig())
    for part in key.split("."):
        value = value[part]
    text = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )
    assert load_config(write(""), [f"{key}={text}"]) == RunConfig()


def test_an_augmentations_preset_and_what_stands_beside_it(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("augment: {preset: randaug, mixup: 0.2, erase: 0}\ntrain: {steps: 1}")
    config = load_config(base)
    assert config.augment.rand_augment == "rand-m9-n2-mstd0.5-inc1"
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erase) == (0.2, 1.0, 0.0)
    other = load_config(base, ["augment.preset=deit3"]).augment
    assert (other.rand_augment, other.three_augment, other.mixup, other.repeats) == (None, True, 0.8, 3)
    assert load_config(base, ["augment.preset=mae"]).augment == Augmentation(preset="mae")
    archived = tmp_path / "archived.yaml"
    archived.write_text(dump_config(config))
    assert load_config(archived) == config
    with pytest.raises(ConfigError, match=r"augment\.preset='deit4': must be one of mae, simmim, deit3, randaug"):
        load_config(base, ["augment.preset=deit4"])


def test_steps_are_names_or_mappings(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("augment:\n  steps:\n    - equalize\n    - {name: rotate, probability: 0.5, high: 10}\n")
    steps = load_config(path).augment.steps
    assert steps == (Step("equalize"), Step("rotate", 0.5, None, 10.0))
    assert load_config(path, ["augment.steps=[invert]"]).augment.steps == (Step("invert"),)
    assert load_config(path, ["augment.steps=invert"]).augment.steps == (Step("invert"),)
    for wrong in ("[{name: rotate, angle: 3}]", "[{probability: 0.5}]", "[[invert]]"):
        with pytest.raises(
            ConfigError, match=r"augment\.steps.*(must be a list of names or|unknown key 'angle'|has no name)"
        ):
            load_config(path, [f"augment.steps={wrong}"])
    with pytest.raises(ConfigError, match=r"augment\.steps\.high='far': must be"):
        load_config(path, ["augment.steps=[{name: rotate, high: far}]"])
    with pytest.raises(ConfigError, match="name='spin': must be one of"):
        load_config(path, ["augment.steps=[spin]"])
