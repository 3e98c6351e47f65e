"""config.json, whatever its JSON says: a config, or one line that names the file once."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscale.errors import CheckpointError
from vitscale.files.model_folder import read_json
from vitscale.interop.config_files import MODEL_TYPES, read_config
from vitscale.interop.their_configs import THEIRS
from vitscale.models.configuration import ViTConfig
from vitscale.models.configuration_mae import ViTMAEConfig

PATH = Path("there/config.json")
KEYS = sorted({item.name for each in (ViTConfig, ViTMAEConfig) for item in fields(each)})
# Of these at most one kind is right for any key; text and mappings are for keys of their own.
WRONG: list[Any] = ["768", "abc", "", -1, 0.5, 10**400, float("nan"), float("-inf"), [], ["a"], [1, 2, 3], [[1], 2]]
WRONG += [{}, {"a": 1}, {"0": 1}, {"0": None}, {"0": []}, {"1": "a"}, {"-1": "a"}, {"a": [0]}]
OTHERWISE = {"label2id": "(id2label|label2id)="}  # the one follows from the other
TEXT = st.text("a_0.\n", max_size=3)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(WRONG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def said(content: dict[str, Any]) -> str | None:
    """The error of a content, one line with the file once; None where it is a config."""
    try:
        assert isinstance(read_config(PATH, content), ViTConfig)
    except CheckpointError as error:
        text = str(error)
        assert text.startswith(f"{PATH}: ")
        assert text.count(str(PATH)) == 1
        assert "\n" not in text
        return text
    return None


@pytest.mark.parametrize("key", KEYS)
def test_values_that_a_key_cannot_have(key: str) -> None:
    """The error names the key and the value."""
    kind = "vitscale_vit" if key in {item.name for item in fields(ViTConfig)} else "vitscale_vit_mae"
    lines = [line for value in WRONG if (line := said({"model_type": kind, key: value}))]
    assert len(lines) > len(WRONG) // 2
    assert all(re.search(OTHERWISE.get(key, f"{key}="), line) for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("hidden_size", "768", "hidden_size='768': must be "),
        ("image_size", "abc", "image_size='abc': must be "),
        ("id2label", ["cat", "dog"], r"id2label=\['cat', 'dog'\]: must be "),
        ("id2label", {"0": "cat", "2": "dog"}, "id2label=.*: must be "),
        ("hidden_act", "sharp", "hidden_act='sharp': must be "),
        ("num_hidden_layers", True, "num_hidden_layers=True: must be "),
        ("qkv_bias", "no", "qkv_bias='no': must be "),
        ("model_type", ["vit"], r"model_type=\['vit'\]: must be "),
        ("model_type", {}, "model_type={}: must be "),
        ("quantization_config", {"bits": 8}, "quantization_config=.*: its weights are quantized"),
        ("pruned_heads", {"0": [1]}, "pruned_heads=.*"),
    ],
)
def test_what_is_said(key: str, value: object, rule: str) -> None:
    assert re.search(rule, str(said({"model_type": "vit", key: value})))


@given(st.sampled_from(MODEL_TYPES), st.dictionaries(st.sampled_from(KEYS), ANY, max_size=4))
def test_any_json(kind: str, content: dict[str, Any]) -> None:
    said({"model_type": kind, **content})


@given(st.sampled_from(sorted(THEIRS)), st.data())
def test_any_json_of_theirs(kind: str, data: st.DataObject) -> None:
    said({"model_type": kind, **data.draw(st.dictionaries(st.sampled_from([*THEIRS[kind], *KEYS]), ANY, max_size=4))})


@given(st.dictionaries(TEXT | st.just("model_type"), ANY, max_size=4))
def test_any_keys(content: dict[str, Any]) -> None:
    said(content)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 99_999, b'{"a":' * 99_999, b"9" * 9_999, b"\xef\xbb\xbf{}"]
)
def test_what_is_no_mapping(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: (cannot be read as JSON|holds a)") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)
