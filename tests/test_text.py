"""What is said to people, on any terminal."""

from __future__ import annotations

import io
import sys

import pytest

from vitscale import text as text_module
from vitscale.text import aligned, did_you_mean, duration, hide, listed, printable, redact, tolerate_any_text


def test_listed_names_a_few() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5 and 6 more"
    assert listed([], 3) == ""


def test_hints_end_a_message_or_are_empty() -> None:
    assert did_you_mean("train.step", ["train.steps", "data.train"]) == "; did you mean train.steps?"
    assert did_you_mean("qwxz", ["train.steps"]) == ""


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["name", "n"], ["a", "100"]], right=[1]) == "name    n\na     100"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (42, "42s"), (425, "7m05s"), (12000, "3h20m"), (187200, "2d04h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_what_would_move_the_cursor_is_escaped() -> None:
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"
    assert printable("a\n\x1b[2J\udce9") == "a\\n\\x1b[2J\\udce9"


def test_output_takes_what_its_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    tolerate_any_text()
    print("\u732b", flush=True)
    assert written.getvalue() == b"\\u732b\n"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:pa55@host:5000/x", "https://***@host:5000/x"),
        ("at https://me:p@ss@host/x and postgresql://u:p@db/y!", "at https://***@host/x and postgresql://***@db/y!"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("GET /a.tar?X-Amz-Signature=12ab34cd&part=2 failed", "GET /a.tar?X-Amz-Signature=***&part=2 failed"),
        ("/a?sv=2020&sig=a%2Bb%3D", "/a?sv=2020&sig=***"),
        ("export HF_TOKEN='abc def'x", "export HF_TOKEN=***x"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUt python", "AWS_SECRET_ACCESS_KEY=*** python"),
        ("Authorization: Bearer abc.def-123", "Authorization: ***"),
        ('api_key: "0123456789"', "api_key: ***"),
        ("key AKIAIOSFODNN7EXAMPLE and hf_abcdefghijklmnopqrstuvwx", "key *** and ***"),
        ("model.num_register_tokens=100: must be", "model.num_register_tokens=100: must be"),
        ("use_cls_token: true\nnum_register_tokens: 4", "use_cls_token: true\nnum_register_tokens: 4"),
        ("sample_keys=train-000/12345678", "sample_keys=train-000/12345678"),
    ],
)
def test_redact(text: str, safe: str) -> None:
    assert redact(text) == safe


def test_what_was_named_a_secret_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hidden", set())
    hide(["correct-horse", "short"])
    assert redact("user correct-horse, short") == "user ***, short"
