"""manifest.json of a checkpoint: what its files hold, and by a digest of its own that it is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 2
READABLE = (1, 2)  # 1: a row (file, start, count) a piece; 2: a row (file, count, files) a stretch of equal pieces
MANIFEST = "manifest.json"
# Of a manifest that is not what it should be.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def as_text(manifest: dict[str, Any]) -> str:
    """The manifest as JSON with its own digest, a line for each file and each tensor."""
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will see it: text keys, lists
    manifest["sha256"] = _digest(manifest)
    parts = []
    for name, value in manifest.items():
        lines = ",\n  ".join(json.dumps(item) for item in value) if isinstance(value, list) else None
        parts.append(f" {json.dumps(name)}: " + (json.dumps(value) if lines is None else f"[\n  {lines}\n ]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder; raises one of READ_ERRORS that says what is wrong with it."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    try:
        manifest = json.loads(text)
        version = manifest["format"]
    except READ_ERRORS as error:
        raise ValueError(f"{MANIFEST} is no whole manifest ({error})") from None
    if version not in READABLE:
        raise ValueError(
            f"{MANIFEST} has format {version!r}, this vitscale reads up to {FORMAT}: use the vitscale that wrote it"
        )
    expected, found = manifest.get("sha256"), _digest(manifest)
    if expected != found:
        raise ValueError(f"{MANIFEST} does not match its own sha256 ({short(found)}, says {short(expected)})")
    if version == 1:
        for tensor in manifest["tensors"]:
            tensor["pieces"] = [[file, count, 1] for file, _, count in tensor["pieces"]]
    return manifest


def short(digest: Any) -> str:
    """A digest for messages."""
    return f"{str(digest)[:12]}..."


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest's content, however it is laid out as text."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
