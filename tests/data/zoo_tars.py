"""Shards of images from the zoo, whole and damaged in every way, from a seed."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from tests.data import zoo_images

BLOCK = 512
END = bytes(2 * BLOCK)
TAKEN, REFUSED, EITHER = "taken", "refused", "either"  # what must become of a shard
JUNK = (".DS_Store", "._0000-any.jpg", "README", "notes.md", "d/.gitkeep", "__meta__.json", "0099.txt")
EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}


@dataclass(frozen=True)
class Member:
    """A member with the headers that belong to it."""

    head: bytes  # whole blocks
    data: bytes

    def __bytes__(self) -> bytes:
        return self.head + self.data + bytes(-len(self.data) % BLOCK)


@dataclass(frozen=True)
class Tar:
    """A shard as it was made, and what must become of it."""

    members: tuple[Member, ...]
    images: dict[str, str]  # key -> zoo_images.GOOD, BAD or ANY
    change: str = "untouched"
    bytes: bytes = field(default=b"", repr=False)
    fate: str = TAKEN
    files: int | None = (
        None  # members that are no folders, if the shard is taken; None: nobody can know without an index
    )


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One block of ustar, its checksum right."""
    digits = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name[:100].ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + digits.ljust(12, b"\0") + b"%011o\0" % 7
    block += b" " * 8 + kind + link[:100].ljust(100, b"\0") + b"ustar\x0000"
    return with_checksum(block.ljust(BLOCK, b"\0"))


def with_checksum(block: bytes) -> bytes:
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def extended(kind: bytes, data: bytes, size: int | bytes | None = None) -> bytes:
    """A pax header (x, g) or a GNU long name (L)."""
    return header(b"././@LongLink", len(data) if size is None else size, kind) + data + bytes(-len(data) % BLOCK)


def pax(**records: bytes) -> bytes:
    lines = []
    for name, value in records.items():
        rest = b" " + name.encode() + b"=" + value + b"\n"
        length = len(rest) + len(str(len(rest) + len(str(len(rest)))))
        lines.append(b"%d" % length + rest)
    return b"".join(lines)


def member(name: bytes, data: bytes, random: Random) -> Member:
    """As one of the tools would write it: ustar, GNU or pax."""
    kind = random.choice([b"0", b"\0", b"7"])
    form = random.choice(["ustar", "gnu", "pax"]) if len(name) <= 100 else random.choice(["gnu", "pax"])
    if form == "ustar":
        return Member(header(name, len(data), kind), data)
    if form == "gnu":
        return Member(extended(b"L", name + b"\0") + header(b"short.txt", len(data), kind), data)
    records = pax(path=name, mtime=b"1.5", **({"size": b"%d" % len(data)} if random.random() < 0.5 else {}))
    return Member(extended(b"x", records) + header(b"short.txt", len(data), kind), data)


def joined(members: tuple[Member, ...] | list[Member]) -> bytes:
    return b"".join(map(bytes, members)) + END


def draw(random: Random) -> Tar:
    """A shard of 4 images, most of them damaged, some labels, and what does not belong there; itself changed or not."""
    members, images = [], {}
    folder = random.choice([b"", b"./", b"../../", b"/etc/", "ü/".encode(), b"\xff\xfe/", b"d/" * 60, b"a b\n\"'/"])
    for number in range(4):
        kind, _, data, fate = zoo_images.draw(random) if number else ("png", "", zoo_images.whole("png"), "good")
        name = folder + b"%04d" % number
        extension = EXTENSIONS.get(kind.split()[0], kind.split()[0]).encode()
        members.append(member(name + b"." + extension, data, random))
        images[name.decode("utf-8", "backslashreplace")] = fate
        if random.random() < 0.5:
            members.append(member(name + b".cls", b"%d" % number, random))
    members += [member(name.encode(), b"junk", random) for name in random.sample(JUNK, random.randrange(4))]
    members += [Member(header(b"folder/", 0, b"5"), b"")] * random.randrange(2)
    if random.random() < 0.3:
        members.append(Member(extended(b"g", pax(comment=b"of a commit")) + header(b"folder/", 0, b"5"), b""))
    random.shuffle(members)
    tar = Tar(tuple(members), images, bytes=joined(members), files=_files(members))
    name, change = random.choice(list(CHANGES.items()))
    return replace(change(random, tar), change=name)


def _files(members: tuple[Member, ...] | list[Member]) -> int:
    return sum(each.head[-BLOCK + 156 : -BLOCK + 157] != b"5" for each in members)


def _of(tar: Tar, members: list[Member] | tuple[Member, ...], fate: str) -> Tar:
    return replace(tar, bytes=joined(members), fate=fate, files=_files(members))


def _untouched(random: Random, tar: Tar) -> Tar:
    return tar


def _padded(random: Random, tar: Tar) -> Tar:
    return replace(tar, bytes=tar.bytes + bytes(random.choice([1, 100, BLOCK, 9216])))


def _header_flipped(random: Random, tar: Tar) -> Tar:
    """All bits count but some of the checksum's own field, which may mean the same."""
    at, members = random.randrange(len(tar.members)), list(tar.members)
    head = bytearray(members[at].head)
    start = random.randrange(0, 2 if len(head) > BLOCK else 1) * (len(head) - BLOCK)  # the first header, or the last
    byte = random.choice([place for place in range(BLOCK) if not 148 <= place < 156])
    head[start + byte] ^= 1 << random.randrange(8)
    members[at] = replace(members[at], head=bytes(head))
    return _of(tar, members, REFUSED)


def _anything_flipped(random: Random, tar: Tar) -> Tar:
    data = bytearray(tar.bytes)
    for _ in range(random.choice([1, 3, 100])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return replace(tar, bytes=bytes(data), fate=EITHER, files=None)


def _data_flipped(random: Random, tar: Tar) -> Tar:
    at = random.randrange(len(tar.members))
    data = bytearray(tar.members[at].data)
    for _ in range(5 if data else 0):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    members = [*tar.members[:at], replace(tar.members[at], data=bytes(data)), *tar.members[at + 1 :]]
    return replace(_of(tar, members, TAKEN), images=dict.fromkeys(tar.images, zoo_images.ANY))


def _extended_damaged(random: Random, tar: Tar) -> Tar:
    """Pax records and long names, whose bytes no checksum holds."""
    at, members = random.randrange(len(tar.members)), list(tar.members)
    head = bytearray(members[at].head)
    if len(head) == BLOCK:
        return tar
    for _ in range(random.choice([1, 2, 10])):
        head[random.randrange(BLOCK, BLOCK + 60)] = random.choice([0, 10, 32, 48, 57, 61, 255, random.randrange(256)])
    members[at] = replace(members[at], head=bytes(head))
    return replace(_of(tar, members, EITHER), files=None)


def _cut(random: Random, tar: Tar) -> Tar:
    """Up to within the end marker, at the border of a block or not."""
    length = random.randrange(len(tar.bytes) // BLOCK) * BLOCK
    return replace(
        tar, bytes=tar.bytes[: random.choice([length, length, random.randrange(len(tar.bytes))])], fate=REFUSED
    )


def _resized(random: Random, tar: Tar) -> Tar:
    """A header's size is another one, its checksum right."""
    at, members = random.randrange(len(tar.members)), list(tar.members)
    count = len(members[at].data)
    sizes = [0, 1, max(0, count - 1), count + 1, count + BLOCK, count + 3 * BLOCK, 8**11 - 1]
    texts = [b"\x80\0\0\0" + b"\x40" * 8, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000010", b"0x10", b"",
             b"9" * 11, "٣".encode(), b"1_0"]  # fmt: skip
    digits = random.choice([*(b"%011o\0" % size for size in sizes), *texts]).ljust(12, b"\0")
    head = members[at].head
    last = head[-BLOCK:]
    members[at] = replace(members[at], head=head[:-BLOCK] + with_checksum(last[:124] + digits + last[136:]))
    return replace(_of(tar, members, EITHER), files=None)


def _heads_swapped(random: Random, tar: Tar) -> Tar:
    members = list(tar.members)
    a, b = random.sample(range(len(members)), 2)
    members[a], members[b] = Member(members[b].head, members[a].data), Member(members[a].head, members[b].data)
    return replace(_of(tar, members, EITHER), images=dict.fromkeys(tar.images, zoo_images.ANY), files=None)


def _blocks_moved(random: Random, tar: Tar) -> Tar:
    """Blocks left out, doubled, zeroed, or put elsewhere."""
    blocks = [tar.bytes[at : at + BLOCK] for at in range(0, len(tar.bytes), BLOCK)]
    for _ in range(random.choice([1, 1, 4])):
        at, to, count = random.randrange(len(blocks)), random.randrange(len(blocks)), random.choice([1, 2, 5])
        some = random.choice([blocks[at : at + count], [], [bytes(BLOCK)] * count])
        blocks[to : to + random.choice([0, count])] = some
    return replace(tar, bytes=b"".join(blocks), fate=EITHER, files=None)


def _zeros_within(random: Random, tar: Tar) -> Tar:
    """Between two members: where tarfile ends and says nothing."""
    at = random.randrange(len(tar.members))
    zeros = bytes(BLOCK * random.choice([1, 2, 20]))
    before, after = (b"".join(map(bytes, part)) for part in (tar.members[:at], tar.members[at:]))
    return replace(tar, bytes=before + zeros + after + END, fate=REFUSED)


def _appended(random: Random, tar: Tar) -> Tar:
    other = joined([member(b"9999.jpg", zoo_images.whole("jpeg"), random)])
    if random.random() < 0.5:  # as `tar --concatenate` does it
        images = tar.images | {"9999": zoo_images.GOOD}
        return replace(tar, bytes=tar.bytes[: -len(END)] + other, images=images, files=(tar.files or 0) + 1)
    return replace(tar, bytes=tar.bytes + random.choice([other, b"x", b"\0" * 700 + b"\1"]), fate=REFUSED)


def _twice(random: Random, tar: Tar) -> Tar:
    members = [*tar.members, random.choice([each for each in tar.members if each.data and each.data != b"junk"])]
    return _of(tar, members, REFUSED)


def _odd_kind(random: Random, tar: Tar) -> Tar:
    """Links, devices, a sparse file, a kind that there is not."""
    kind = random.choice([b"1", b"2", b"3", b"4", b"6", b"S", b"V", b"M", b"D", b"Z", b"\xff"])
    odd = Member(header(b"9999.jpg", 0, kind, b"0000.png"), b"")
    return _of(tar, [*tar.members, odd][:: random.choice([1, -1])], REFUSED)


def _odd_extended(random: Random, tar: Tar) -> Tar:
    jpeg = zoo_images.whole("jpeg")
    heads = [
        extended(b"x", pax(size=b"9" * 5000)), extended(b"x", pax(size=b"-1")), extended(b"x", pax(size="٣".encode())),
        extended(b"x", pax(path=b"a\0.jpg")), extended(b"x", pax(path=b"")), extended(b"L", b"", 600 << 20),
        extended(b"x", b"", b"\x80" + b"\x10" * 11), extended(b"x", pax(path=b"9.jpg"), 2 << 20), extended(b"L", b"\0"),
        extended(b"x", pax(**{"GNU.sparse.major": b"1", "GNU.sparse.realsize": b"99999999999"})),
        extended(b"x", b"99999999999999999999999 path=a\n"), extended(b"x", b"0 a=b\n"), extended(b"x", b"6 a=b"),
        extended(b"g", pax(path=b"all.jpg")), extended(b"g", pax(size=b"7")), extended(b"x", b"\xb2 a=b\n"),
    ]  # fmt: skip
    odd = Member(random.choice(heads) + header(b"9999.jpg", len(jpeg)), jpeg)
    return _of(tar, [*tar.members, odd][:: random.choice([1, -1])], REFUSED)


def _left_alone(random: Random, tar: Tar) -> Tar:
    """An extended header with no member after it."""
    head = extended(b"x", pax(path=b"a.jpg")) if random.random() < 0.5 else extended(b"L", b"a.jpg\0")
    return replace(tar, bytes=tar.bytes[: -len(END)] + head + END, fate=REFUSED)


def _no_tar(random: Random, tar: Tar) -> Tar:
    junk = [b"", END, bytes(10240), b"<html>not found</html>" * 90, gzip.compress(tar.bytes, 1), tar.bytes[1:],
            b"\n" + tar.bytes, random.randbytes(4000), zoo_images.whole("bmp"), joined([])]  # fmt: skip
    return replace(tar, bytes=random.choice(junk), fate=REFUSED)


def _many(random: Random, tar: Tar) -> Tar:
    """Thousands of members, or of extended headers before one."""
    if random.random() < 0.5:
        members = [*tar.members, *(Member(header(b"x/%d" % i, 0), b"") for i in range(3000))]
        return _of(tar, members, TAKEN)
    heads = extended(b"x", pax(comment=b"c" * 400)) * 1000
    return replace(tar, bytes=heads + tar.bytes)


CHANGES: dict[str, Callable[[Random, Tar], Tar]] = {
    "untouched": _untouched, "padded": _padded, "a header flipped": _header_flipped, "flipped": _anything_flipped,
    "data flipped": _data_flipped, "extended header damaged": _extended_damaged, "cut": _cut, "resized": _resized,
    "heads swapped": _heads_swapped, "blocks moved": _blocks_moved, "zeros within": _zeros_within,
    "appended": _appended, "twice": _twice, "odd kind": _odd_kind, "odd extended header": _odd_extended,
    "left alone": _left_alone, "no tar": _no_tar, "many": _many,
}  # fmt: skip
