"""The measured part of docs/kernels.md and bench/results/README.md, written between two marker lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import targets
from bench.results import RESULTS, ROOT, Row, load, number
from mcic.durable import write_text

BEGIN, END = "<!-- measured: begin (python -m bench writes this part) -->", "<!-- measured: end -->"
KERNELS = ROOT / "docs" / "kernels.md"
README = RESULTS / "README.md"

WAITING = {
    "ops": "the operations and the attention layer on a GPU (`python -m bench ops --device cuda`): times, share of the "
    "limit, launches, host waits, memory, and every baseline",
    "step": "whole training steps of `voc12-vgg16` and `voc12-resnet101` on a GPU "
    "(`python -m bench step --device cuda`): images/s and memory of every variant",
}
"""what only a GPU can fill in, by group"""


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.name} · {row.case} · {row.scope} {row.work} · {row.variant} ({row.dtype})"
    if row.p50_ms is None:
        return f"{head}: {row.note}"
    parts = [f"{number(row.p50_ms)} ms ({number(row.p20_ms)}–{number(row.p80_ms)})"]
    if row.speedup is not None:
        parts.append(f"×{number(row.speedup)}")
    if row.share_of_limit is not None:
        parts.append(f"{100 * row.share_of_limit:.0f} % of the limit")
    if row.launches is not None:
        parts.append(f"{row.launches} launches, {row.syncs} waits, {number(row.extra_mib)} MiB")
    if row.images_per_s is not None:
        parts.append(f"{number(row.images_per_s)} images/s")
    return f"{head}: {', '.join(parts)}{f' · {row.note}' if row.note else ''}"


def refresh() -> None:
    """Write the measured parts anew from the results that are kept."""
    runs = load(RESULTS)
    insert(KERNELS, measured(runs), title="# The kernels\n\n## Measured\n")
    insert(README, "\n".join(waiting(runs)) + "\n", title="# Results of the benches\n")


def insert(path: Path, text: str, *, title: str) -> None:
    """Replace what stands between the markers; a file without them gets the part at its end, after `title` if new."""
    page = path.read_text(encoding="utf-8") if path.is_file() else title
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(path, f"{before}{BEGIN}\n{text}{END}{after}")


def waiting(runs: list[dict[str, Any]]) -> list[str]:
    """What no kept run on a GPU has filled in yet, as list items."""
    there = {run["rows"][0]["group"] for run in runs if run["facts"]["device"] != "cpu"}
    items = [f"- **waiting for a GPU**: {text}" for group, text in WAITING.items() if group not in there]
    return items or ["Nothing waits for a GPU."]


def measured(runs: list[dict[str, Any]]) -> str:
    """All kept runs as Markdown, each with its origin: a GPU's with their times, a CPU's as ratios."""
    parts = [targets.table(runs)]
    for run in runs:
        about, rows = run["facts"], run["rows"]
        gpu = about["device"] != "cpu"
        heading = f"### {rows[0]['group']}, {about['device'] if gpu else 'CPU'}\n"
        parts += [heading] * (heading not in parts)
        parts.append(_origin(about, gpu=gpu))
        if not about["complete"]:
            parts.append("**Cut off, by a time limit or an error: what came after is missing, or in the next run.**\n")
        if rows[0]["group"] == "step" and not gpu:
            parts.append("Tiny networks stand in: the steps run, their times say nothing.\n")
            continue
        parts.append(_table(rows, gpu=gpu))
    return "\n".join([*parts, *waiting(runs)]) + "\n"


def _origin(about: dict[str, Any], *, gpu: bool) -> str:
    place = f"driver {about['driver']}, CUDA {about['cuda']}" if gpu else f"{about['cpu']}, {about['threads']} threads"
    ceilings = about["ceilings"]
    best = ""
    if ceilings:
        rates = ", ".join(
            f"{name} product {v / 1e12:.0f} TFLOP/s" for name, v in ceilings.items() if name != "bytes_per_s"
        )
        best = f" Ceilings measured in the same run: copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, {rates}."
    commit = about["commit"] or "unknown"
    return (
        f"`{about['command']}`, {about['date'][:10]}, {place}, torch {about['torch']}, commit "
        f"{commit[:10]}{'-dirty' if commit.endswith('-dirty') else ''}. Verified by: {about['verified']}.{best}\n"
    )


def _table(rows: list[dict[str, Any]], *, gpu: bool) -> str:
    columns = {
        "what": lambda r: f"{r['name']} {r['case']}, " + " ".join(dict.fromkeys((r["scope"], r["work"]))),
        "variant": lambda r: r["variant"],
    }
    if gpu:
        columns |= {
            "ms p50 (20–80)": lambda r: f"{number(r['p50_ms'])} ({number(r['p20_ms'])}–{number(r['p80_ms'])})",
            "limit": lambda r: "" if r["share_of_limit"] is None else f"{100 * r['share_of_limit']:.0f} %",
            "TB/s": lambda r: number(r["gb_per_s"] and r["gb_per_s"] / 1e3),
            "TFLOP/s": lambda r: number(r["tflop_per_s"]),
            "MiB": lambda r: number(r["extra_mib"]),
            "launches / waits": lambda r: "" if r["launches"] is None else f"{r['launches']} / {r['syncs']}",
            "images/s": lambda r: number(r["images_per_s"]),
        }
    columns["speed-up (20–80)"] = _speedup
    columns["note"] = lambda r: r["note"].replace("|", "/")
    shown = {
        name: cell for name, cell in columns.items()
        if name in ("what", "variant") or name == "note" or any(cell(r) for r in rows if r["p50_ms"] is not None)
    }  # fmt: skip
    lines = [" | ".join(shown), " | ".join("---" for _ in shown)]
    last = None
    for row in rows:
        if not gpu and row["p50_ms"] is not None and row["speedup"] is None:
            continue  # a part of a step, whose times alone are not shown
        cells = {name: cell(row) if row["p50_ms"] is not None or name in ("what", "variant", "note") else "–"
                 for name, cell in shown.items()}  # fmt: skip
        if cells["what"] == last:
            cells["what"] = ""
        last = cells["what"] or last
        lines.append(" | ".join(cells.values()))
    return "\n".join(f"| {text} |" for text in lines) + "\n"


def _speedup(row: dict[str, Any]) -> str:
    if row["speedup"] is None:
        return ""
    spread = "" if row["speedup_p20"] is None else f" ({row['speedup_p20']:.2f}–{row['speedup_p80']:.2f})"
    return f"{row['speedup']:.2f}×{spread}"
