"""`vitscale report RUN`: what a run came to, as one HTML file that needs nothing else, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitscale.errors import CheckpointError
from vitscale.evaluation.figures import LOSS, RATE, confusion_figure
from vitscale.files.atomic import write_atomically
from vitscale.launch.attempts import summary_of
from vitscale.run_folder import BAD_INPUT, DONE, FAILED, STOPPED, RunFolder
from vitscale.text import duration, listed
from vitscale.tracking.jsonl import JsonlFile, as_number

Row = Mapping[str, Any]
Scores = Mapping[str, Mapping[str, float]]
_POINTS = 500  # of a curve at most; more are averaged
_CLASSES = 40  # rows of the table of classes
_PICTURES = {
    "reconstructions.png": "Hidden patches, filled in",
    "neighbours.png": "Nearest neighbours",
    "patches.png": "What patches have in common",
}
_NO_SCORES = ("loss", "/images", "/bad")  # ends of names
_OF_NUMBERS = ("/map", "/mae")  # of labels that are several numbers, which no probe is for
_ENDS = {DONE: "done", STOPPED: "stopped, to go on", BAD_INPUT: "ended by bad config or input", FAILED: "failed"}
_STYLE = """
:root { color-scheme: light; --line: #d9dde3; --quiet: #5b6470; --good: #1e6b2b; --bad: #a31515; }
* { box-sizing: border-box; }
body { font: 16px/1.45 system-ui, sans-serif; color: #1c2025; margin: 0 auto; max-width: 1320px; padding: 16px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0; } .quiet { color: var(--quiet); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.15rem; padding: .7rem .9rem; border-left: 5px solid #1f5fa8; background: #f3f6fa; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 12px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
figcaption { font-weight: 600; font-size: .95rem; } svg, img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
.facts td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
pre { font-size: .85rem; background: #f6f7f9; padding: 12px; overflow-x: auto; } summary { cursor: pointer; }
.wide img { min-width: 900px; }
"""


def report(folder: RunFolder) -> Path:
    """Write report.html of a run's folder, or of the folder of a model's evaluation; its path.

    CheckpointError where there is neither a row of metrics nor a score.
    """
    rows, evaluations = (JsonlFile(folder.path / name).rows() for name in ("metrics.jsonl", "evaluation.jsonl"))
    if not rows and not evaluations:
        raise CheckpointError(
            f"{folder.path}: holds neither metrics.jsonl nor evaluation.jsonl; name the folder of a run, or of --out "
            "of `vitscale evaluate`"
        )
    summary, baselines, validation = (_json(path) for path in (folder.summary, folder.baselines, folder.validation))
    scores = _scores(rows, summary, baselines)
    name = folder.path.resolve().name
    body = [f"<h1>{html.escape(name)}</h1>", f'<p class="verdict">{_verdict(folder, scores, validation, summary)}</p>']
    body += _facts(folder, rows, summary)
    body += _section("Curves", _curves(rows, baselines))
    body += _section("Scores", [*_score_table(scores), *_own_scores(validation or summary.get("evaluation", {}))])
    body += _section("Pictures", _pictures(folder.figures))
    body += _section("What went wrong, and how the time went", _troubles(folder, rows, summary))
    if folder.config.exists():
        config = html.escape(folder.config.read_text(encoding="utf-8"))
        body.append(f"<h2>Config</h2><details><summary>every key</summary><pre>{config}</pre></details>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_atomically(folder.report, page)
    return folder.report


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _section(title: str, parts: Iterable[str]) -> list[str]:
    content = "".join(parts)
    return [f"<h2>{title}</h2>{content}"] if content else []


# ---- the first line


def _scores(rows: Sequence[Row], summary: Row, baselines: Row) -> Scores:
    """The newest scores of frozen features by encoder: of `vitscale evaluate`, else those of training."""
    if "evaluation" in summary:
        return summary["evaluation"]["scores"]
    last = next((row for row in reversed(rows) if "evaluation/linear_probe" in row), None)
    if last is None:
        return {}
    named = {key.removeprefix("evaluation/"): value for key, value in last.items() if key.startswith("evaluation/")}
    trained = {key: math.nan if (number := as_number(value)) is None else number for key, value in named.items()}
    return {"trained": trained, **_encoders(baselines)}


def _encoders(baselines: Row) -> Scores:
    """Of baselines.json what are scores."""
    return {name: each for name, each in baselines.items() if isinstance(each, dict) and "linear_probe" in each}


def _verdict(folder: RunFolder, scores: Scores, validation: Row, summary: Row) -> str:
    """Better than what it must beat? By the linear probe, on held-out images or else by cross-validation; and what a
    model that was trained on labels gives itself."""
    own = _own_score(validation, summary)
    kind = "linear_probe" if "linear_probe" in scores.get("trained", {}) else "linear_probe_folds"
    if kind in scores.get("trained", {}):
        others = [(name, each) for name, each in scores.items() if name != "trained"]
        compared = [_compared(scores["trained"], each, name, kind) for name, each in others]
        return f"Better than what it must beat? {'; '.join(compared)}. By a linear probe of frozen features. {own}"
    is_of_numbers = any(name.endswith(_OF_NUMBERS) for name in validation.get("scores", ()))
    if own and (is_of_numbers or "evaluation" in summary):
        return own
    command = f"<code>vitscale evaluate {html.escape(str(folder.path))}</code>"
    return f"{own} Better than the start, untrained, pixels? Not measured: {command} tells."


def _own_score(validation: Row, summary: Row) -> str:
    """A sentence on what it was trained for, on held-out images: of `vitscale evaluate`, else the best of training, or
    the newest. "" where there are no labels."""
    tested = {name: value for name, value in summary.get("evaluation", {}).get("test_scores", {}).items()
              if name in ("test/top1", "test/map", "test/mae")}  # fmt: skip
    if tested:
        return f"By what it was trained for: <b>{listed(f'{name} {value:.4f}' for name, value in tested.items())}</b>."
    best = summary.get("best") or {}
    if best:
        return f"Best {html.escape(best['metric'])}: <b>{best['value']:.4f}</b>, at step {best['step']}."
    if validation:
        kinds = {name: value for name, value in validation["scores"].items() if not name.endswith(_NO_SCORES)}
        shown = listed(f"{name} {value:.4f}" for name, value in kinds.items())
        return f"Held-out images at step {validation['step']}: {html.escape(shown)}." if shown else ""
    return ""


def _compared(trained: Mapping[str, float], other: Mapping[str, float], name: str, kind: str) -> str:
    spread = 2 * math.hypot(trained.get(f"{kind}_se", 0.0), other.get(f"{kind}_se", 0.0))
    gap = trained[kind] - other[kind]
    if abs(gap) <= spread:
        style, word = "quiet", "no clear difference"
    else:
        style, word = ("good", "yes") if gap > 0 else ("bad", "no")
    values = f"{100 * trained[kind]:.1f} % against {100 * other[kind]:.1f} %"
    return f'{html.escape(name)}: <b class="{style}">{word}</b> ({values})'


# ---- sections


def _facts(folder: RunFolder, rows: Sequence[Row], summary: Row) -> Iterator[str]:
    exit_record = folder.read_exit() or {}
    facts: dict[str, str] = {}
    if rows:
        last = rows[-1]
        total = f" of {summary['steps']:,}" if "steps" in summary else ""
        facts["step"] = f"{last['step']:,}{total}; {last['samples']:,} images seen"
    if exit_record:
        code = exit_record["code"]
        before = f"done at step {summary['steps']:,}; its last start " if code and "steps" in summary else ""
        facts["state"] = before + _ENDS.get(code, "") + (f": {exit_record['reason']}" if code else "")
    elif rows and "steps" in summary:  # written at the run's end, before its exit record
        facts["state"] = _ENDS[DONE]
    if "parameters" in summary:
        facts["parameters"] = f"{summary['parameters']:,}"
        facts["images"] = f"{summary['images']:,}, {summary['epochs']:.1f} epochs"
        ranks = f"{summary['world_size']} x {summary['device']}"
        facts["ranks"] = f"{ranks}, ZeRO {summary['zero_stage']}, {summary['precision']}"
        facts["peak memory of a rank"] = f"{max(summary['peak_memory_bytes']) / 2**30:.2f} GiB"
        if any(readers := summary.get("reader_peak_bytes", ())):
            facts["peak memory of a rank's reader"] = f"{max(readers) / 2**30:.2f} GiB"
    speeds = [value for row in rows if (value := as_number(row.get("images_per_second"))) is not None]
    if speeds:
        facts["throughput"] = f"{np.median(speeds):,.0f} images/s (median of the logged rows)"
        facts["time"] = duration(sum(_seconds(rows)))
    if "vitscale" in summary:
        facts["by"] = f"vitscale {summary['vitscale']}"
    yield _table(list(facts.items()), css="facts")


def _curves(rows: Sequence[Row], baselines: Row) -> Iterator[str]:
    names = {name for row in rows for name in row}
    charts = [
        ("Loss", {"loss": LOSS, "validation/loss": RATE}, False),
        ("Frozen features", {"evaluation/linear_probe": LOSS, "evaluation/knn": RATE}, False),
        ("Held-out images", {"validation/top1": LOSS, "validation/map": LOSS, "validation/r2": LOSS,
                             "validation/raw_top1": RATE}, False),
        ("Learning rate", {"lr": RATE}, False),
        ("Gradient norm", {"grad_norm": LOSS}, True),
        ("Rank of the features", {"evaluation/rankme": LOSS}, False),
        ("Images a second", {"images_per_second": LOSS}, False),
    ]  # fmt: skip
    drawn = []
    for title, colours, logarithmic in charts:
        series = {name: (_thinned(rows, name), colour) for name, colour in colours.items() if name in names}
        series = {name: (points, colour) for name, (points, colour) in series.items() if len(points[0])}
        if series:
            levels = (
                {name: each["linear_probe"] for name, each in _encoders(baselines).items()} if "Frozen" in title else {}
            )
            drawn.append(f"<figure><figcaption>{title}</figcaption>{_chart(series, levels, logarithmic)}</figure>")
    if drawn:
        yield f'<div class="grid">{"".join(drawn)}</div>'


def _thinned(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a field, means over neighbouring rows where there are too many."""
    found = [(row["step"], value) for row in rows if (value := as_number(row.get(name))) is not None]
    parts = np.array_split(np.array(found, dtype=np.float64).reshape(-1, 2), min(_POINTS, max(1, len(found))))
    means = np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2)
    return means[:, 0], means[:, 1]


def _chart(series: Mapping[str, Any], levels: Mapping[str, float | None], logarithmic: bool) -> str:
    figure = Figure(figsize=(4.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for name, ((steps, values), colour) in series.items():
        axes.plot(steps, values, color=colour, linewidth=1.4, label=name, marker="o" if len(steps) < 3 else None)
    for name, level in levels.items():
        if level is not None:
            axes.axhline(level, color="#808890", linestyle="--", linewidth=0.9)
            axes.text(0.01, level, f"{name}", transform=axes.get_yaxis_transform(), fontsize=7, va="bottom")
    if logarithmic and all((values > 0).all() for (_, values), _ in series.values()):
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("step", fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()[written.getvalue().index("<svg") :]


def _score_table(scores: Scores) -> Iterator[str]:
    if not scores:  # none yet, or of a model whose labels are several numbers
        return
    kinds = {"linear_probe": "linear probe", "knn": "kNN", "linear_probe_folds": "cross-validated"}
    first = next(iter(scores.values()))
    kinds |= {name: f"{name.removeprefix('few_shot_')} a class" for name in first if name.startswith("few_shot_")}
    kinds = {name: title for name, title in kinds.items() if name in first and not name.endswith("_sd")}
    plain = {"rankme": "RankMe", "feature_deviation": "deviation", "mean_cosine": "cosine", "dead_dimensions": "dead"}
    plain = {name: title for name, title in plain.items() if name in first}
    lines = [("features", *kinds.values(), *plain.values())]
    for name, row in scores.items():
        errors = [row.get(f"{kind}_se", row.get(f"{kind}_sd", math.nan)) for kind in kinds]
        shown = [f"{100 * row[kind]:.1f} ± {100 * error:.1f} %" if error == error else f"{100 * row[kind]:.1f} %"
                 for kind, error in zip(kinds, errors, strict=True)]  # fmt: skip
        lines.append((name, *shown, *(f"{row[kind]:.3g}" for kind in plain)))
    yield f'<div class="scroll">{_table(lines, head=True)}</div>'
    yield '<p class="quiet">± one standard error; of few labels, one deviation</p>'


def _own_scores(outcome: Row) -> Iterator[str]:
    """What a classifier (or a decoder) gives on held-out images: scores, the worst classes, the confusion matrix."""
    parts = []
    own = outcome.get("test_scores") or (outcome.get("scores", {}) if "step" in outcome else {})
    if own:
        parts.append(_table([(name, f"{value:.4g}") for name, value in own.items()]))
    classes = sorted(outcome.get("classes", ()), key=lambda row: (row["recall"], row["class"]))
    if classes:
        lines = [("class", "images", "recall", "precision", "F1")]
        lines += [(row["class"], str(row["images"]), *(f"{row[key]:.3f}" for key in ("recall", "precision", "f1")))
                  for row in classes[:_CLASSES]]  # fmt: skip
        title = f"{len(classes)} classes" if len(classes) <= _CLASSES else f"the {_CLASSES} classes of least recall"
        parts.append(f"<details open><summary>{title}</summary>{_table(lines, head=True)}</details>")
    if outcome.get("confusion"):
        names = [row["class"] for row in outcome["classes"]]
        drawn = _svg(confusion_figure(np.array(outcome["confusion"]), names))
        parts.append(f"<figure><figcaption>Confusion matrix</figcaption>{drawn}</figure>")
    if parts:
        cells = "".join(f'<div class="scroll">{part}</div>' for part in parts)
        yield f'<h3>By what it was trained for</h3><div class="grid">{cells}</div>'


def _pictures(folder: Path) -> Iterator[str]:
    for name, title in _PICTURES.items():
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            picture = f'<img alt="{title}" src="data:image/png;base64,{data}">'
            yield f'<figure><figcaption>{title}</figcaption><div class="scroll wide">{picture}</div></figure>'


def _troubles(folder: RunFolder, rows: Sequence[Row], summary: Row) -> Iterator[str]:
    """Starts, rollbacks, skipped steps, bad samples, what was tried again; where the time went."""
    if not rows:
        return
    last = rows[-1]
    causes: Counter[str] = Counter(summary.get("bad_samples") or {})
    if not causes:
        causes = Counter(row["cause"] for row in JsonlFile(folder.path / "quarantine.jsonl").rows())
    bad = ", ".join(f"{count:,} {cause}" for cause, count in causes.most_common())
    lines = [
        ("starts", summary_of(folder)),
        ("rollbacks before a spike", _rollbacks(folder)),
        ("steps skipped, their gradient not finite", f"{last.get('skipped_steps', 0):,}"),
        ("bad samples, others in their place", f"{last.get('bad_samples', 0):,}" + (f": {bad}" if bad else "")),
        ("reads of data tried again", f"{last.get('data_retries', 0):,}"),
        # The last row comes before the save of its step.
        ("checkpoints not saved", f"{summary.get('save_failures', last.get('save_failures', 0)):,}"),
    ]
    seconds = _seconds(rows)
    for name, title in (("data_share", "waiting for data"), ("augment_share", "augmentation"), ("save_share", "saving"),
                        ("tracking_share", "tracking")):  # fmt: skip
        shares = [as_number(row.get(name)) or 0.0 for row in rows]
        if sum(seconds) > 0 and any(name in row for row in rows):
            share = float(np.dot(shares, seconds)) / sum(seconds)
            lines.append((title, f"{100 * share:.2f} % of the time"))
    yield _table(lines, css="facts")


def _rollbacks(folder: RunFolder) -> str:
    each = [
        f"from step {entry['step']:,} to {entry['back_to_step']:,}, without {len(entry['skipped_batches'])} batches"
        for entry in folder.rollbacks()
    ]
    return f"{len(each)}" + (f": {'; '.join(each)}" if each else "")


def _seconds(rows: Sequence[Row]) -> list[float]:
    """Of the wall clock between a row and the one before it, by the images of both and the speed."""
    seen = [0, *(row["samples"] for row in rows)]
    speeds = [as_number(row.get("images_per_second")) or math.inf for row in rows]
    return [max(0, after - before) / speed for before, after, speed in zip(seen, seen[1:], speeds, strict=False)]


def _table(lines: Iterable[Sequence[str]], head: bool = False, css: str = "") -> str:
    cells = [[html.escape(cell) for cell in line] for line in lines]
    made = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in cells[0])}</tr>"] if head and cells else []
    made += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in cells[1 if head else 0 :]]
    return f'<table class="{css}">{"".join(made)}</table>'
