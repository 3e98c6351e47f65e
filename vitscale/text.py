"""What is said to people: lists and hints in messages, tables, and the line on the terminal."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TextIO


def listed(names: Iterable[object], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    each = [str(name) for name in names]
    rest = len(each) - limit
    return ", ".join(each[:limit]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint that ends a message about an unknown word: "; did you mean X?", or "" if none is near."""
    near = nearest(word, known, cutoff)
    return "" if near is None else f"; did you mean {near}?"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is most like this one; None if none is."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, cutoff)), None)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """A table: every column as wide as its widest cell; `right`: the columns that are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'>' if place in right else '<'}{widths[place]}}" for place, cell in enumerate(row))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42s, 7m05s, 3h20m, 2d04h; "?" for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def byte_size(count: float) -> str:
    """Bytes as memory is told: 12.5 GB, 340 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def first_sentence(text: str) -> str:
    """Of what a library says of an error, which may be a page."""
    return text.strip().partition("\n")[0].partition(". ")[0].rstrip(": ")


def printable(text: str) -> str:
    """Text for a terminal or a table: line ends, control characters and bytes that are no text as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# How names say that their value is a secret. A token of a model, and `tokens`, are none; in capitals, as environments
# have them, any key is one.
_NO_TOKEN = "".join(
    rf"(?<!{word}[_-])" for word in ("cls", "class", "mask", "register", "patch", "image", "pad", "eos")
)
_NAMED = (
    rf"(?:(?:{_NO_TOKEN}token(?![a-z])|secret|passw(?:or)?d|passphrase|credential|authori|signature|\bsig\b"
    r"|(?:access|account|api|auth|client|private|shared|signing|storage|subscription)[_-]?key|[;?&_]pwd\b"
    r"|(?<=[?&])(?:key|jwt)\b|(?-i:(?<!CACHE)(?<!SORT)(?<!PUBLIC)_(?:KEY|PAT|PASS|SAS|DSN)\b))[\w.-]*"
    r"(?<!file)(?<!path)(?<!dir))"
)
_QUOTED = r"'[^'\n]+'|\"[^\"\n]+\""
_PLAIN = r"(?!(?:true|false|null|none|-?[\d.]{1,6})(?!\w))"  # what is no secret, whatever its name
_PRIVATE_KEY = r"-----(BEGIN|END) [A-Z ]*PRIVATE KEY-----"
_SECRETS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.MULTILINE | re.DOTALL), instead)
    for pattern, instead in (
        # user and password of a URI; the password may have an @ or a / in it
        (r"://[^/\s]+@", "://***@"),
        (r"://[^/\s:@]+:(?!\d+/)[^\s@]+@", "://***@"),
        (r"(connection[_-]?string['\"]?\s*[=:]\s*)(?:" + _QUOTED + r"|\S+)", r"\1***"),
        # NAME=VALUE of an environment, a command line or a URL's query; NAME = "VALUE"; --NAME VALUE
        (rf"({_NAMED}(?:=|\s=\s(?=['\"]))){_PLAIN}(?:{_QUOTED}|[^\s'\"&;,]{{4,}})", r"\1***"),
        (rf"((?<!\S)--[\w-]*{_NAMED}\s+){_PLAIN}(?!-)(?:{_QUOTED}|[^\s'\"]{{4,}})", r"\1***"),
        # NAME: VALUE as a line of YAML, in a comment too; and anywhere else, of headers and dicts
        (rf"^([ \t#-]*[\w.-]*{_NAMED}['\"]?:[ \t]+){_PLAIN}(?:[|>][+-]?[ \t]*\n)?[^\s{{\[][^\n]*", r"\1***"),
        (rf"({_NAMED}['\"]?:\s+)(?:basic|bearer)\s+\S+", r"\1***"),
        (rf"({_NAMED}['\"]?:\s*){_PLAIN}(?:{_QUOTED})", r"\1***"),
        (rf"({_NAMED}['\"]?:\s+){_PLAIN}(?:(?=\S*\d)[^\s'\",]{{8,}}|[^\s'\",}}]{{4,}}(?=\s*(?:$|[,}}])))", r"\1***"),
        # of programs that take one without a name; of a .netrc
        (
            r"(\bcurl\b(?:[^\n]|\\\n){0,300}?\s(?:-\w*u|--(?:proxy-)?user)[= ]?\s*['\"]?)[^\s:'\"]+:[^\s'\"]+",
            r"\1***",
        ),
        (r"(\b(?:sshpass|(?:docker|podman) login)\b[^\n]{0,300}?\s-p\s*)\S+", r"\1***"),
        (r"(\blogin\s+\S+\s+password\s+)\S+", r"\1***"),
        (_PRIVATE_KEY + "(?:.*?" + _PRIVATE_KEY + "|.*)", "***"),
        (
            r"(?-i:\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\beyJ[\w-]{10,}\.[\w-]{4,}\.[\w.-]+)"
            r"|\b(?:hf_\w{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|npm_\w{30,}|dapi[0-9a-f]{32}"
            r"|xox[a-z]-[\w-]{10,}|ya29\.[\w-]{20,}|sk-(?=[\w-]*\d)[\w-]{16,}|Bearer\s+[^\s,;]{8,})",
            "***",
        ),
    )
)
_SHORTEST_SECRET = 8  # characters; a shorter text would be found where it is none
_hidden: set[str] = set()


def hide(values: Iterable[str]) -> None:
    """Let `redact` know texts that are secrets."""
    _hidden.update(value for value in values if len(value) >= _SHORTEST_SECRET)


def secrets_of(environment: Mapping[str, str]) -> Iterator[str]:
    """The values that are secrets by their names, and the passwords of URLs."""
    named = re.compile(_NAMED + r"\Z|connection_?string", re.IGNORECASE)
    for name, value in environment.items():
        if named.search(name):
            yield value
        if password := re.match(r"[\w+.-]+://[^\s:@/]*:([^\s@]+)@", value):
            yield password[1]


def redact(text: str) -> str:
    """`text` with *** in the place of secrets: what `hide` was told, and what looks like one by its name or form."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, "***")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def above_zero(text: str) -> int:
    """A whole number above 0, as an option's value."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number above 0")
    return int(text)


def as_text(path: str | os.PathLike[str]) -> str:
    """A path as text that can be written anywhere: bytes that are no text as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def tolerate_any_text() -> None:
    """Let stdout and stderr write what their encoding lacks as escapes, as a Chinese label on an ASCII terminal.

    A stream that whoever started this process has closed is one that holds, or takes, nothing.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, nowhere(mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def nowhere(mode: str) -> TextIO:
    """A stream that holds, or takes, nothing."""
    return open(os.devnull, mode, encoding="utf-8")  # type: ignore[return-value]  # noqa: SIM115


def ignore_warnings_of_pillow() -> None:
    """In this process; what is wrong with an image is said in our words, once."""
    warnings.filterwarnings("ignore", module="PIL")


def to_stderr(*lines: str) -> None:
    """Each as one line, whatever names from files are in it; nothing from the first on that cannot be written."""
    try:
        for line in lines:
            print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = nowhere("w")


def to_stdout(line: str) -> None:
    """A line of what a run tells. The run outlives a reader who leaves, and a full disk below a log."""
    try:
        print(line, flush=True)
    except OSError as error:
        sys.stdout = nowhere("w")
        to_stderr(f"standard output cannot be written ({error.strerror}); the run goes on without it")


class TerminalLine:
    """A line that is rewritten in place on a terminal, and other lines that do not tear it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._shown = False

    def rewrite(self, text: str) -> None:
        """What the line shows from now on, cut to the terminal's width."""
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._write(f"\r{text}\x1b[K")
        self._shown = True

    def say(self, text: str) -> None:
        """Another line, without tearing the one that is shown."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the shown line as it is and go below it."""
        if self._shown:
            self._write("\n")
            self._shown = False

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
