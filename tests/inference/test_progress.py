"""What is said on stderr, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest

from vitscale.inference.images import Entry, ImageBatch
from vitscale.inference.progress import Tally
from vitscale.run_folder import BAD_INPUT, DONE, FAILED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


GOOD, BAD = Entry("a.jpg"), Entry("b\n.jpg", "cut")


@pytest.mark.parametrize(
    ("entries", "code", "said"),
    [
        ([GOOD], DONE, ""),
        ([GOOD, BAD, GOOD], FAILED, "b\\n.jpg: skipped: cut\n1 of 3 images were skipped\n"),
        ([BAD], BAD_INPUT, "b\\n.jpg: skipped: cut\nvitscale: error: no image could be read\n"),
        ([], BAD_INPUT, "vitscale: error: no images were named\n"),
    ],
)
def test_a_file_gets_whole_lines(entries: list[Entry], code: int, said: str) -> None:
    stream = io.StringIO()
    tally = Tally(stream=stream)
    tally.add(ImageBatch(entries, None))
    assert tally.exit_code() == code
    assert stream.getvalue() == said


def test_a_terminal_gets_a_count() -> None:
    stream = Terminal()
    tally = Tally(stream=stream)
    tally.done_before(40)
    tally.add(ImageBatch([GOOD], None))
    tally.add(ImageBatch([GOOD, BAD], None))
    assert tally.exit_code() == FAILED
    shown = stream.getvalue()
    assert shown.startswith("\r41 images  ")
    assert "\nb\\n.jpg: skipped: cut\n\r42 images" in shown
    assert shown.endswith("1 of 43 images were skipped\n")
    quiet = Terminal()
    Tally(shows_count=False, stream=quiet).add(ImageBatch([GOOD], None))
    assert quiet.getvalue() == ""
