"""What a run of run_all.sh shows at its end: one table, one JSON file and one self-contained page with the pictures inline.

Each project writes its results with `write_result`; `collect` reads them back, whoever wrote them.
"""

import base64
import html
import json
import re
from pathlib import Path

from common.checkpoint import atomic_write


def write_result(
    folder,
    task: str,
    metric: str,
    value: float,
    controls: dict,
    interval=None,
    figures=(),
    note: str = "",
    details=None,
):
    """Write one row of the closing table to folder/results/<task>.json.

    folder: runs/<project>. metric: its name, with unit and direction if these are not plain ("macro-F1", "MSE, lower is
    better"). controls: {name: value} of the same metric (chance, random initialisation, a classical baseline), at least
    one. interval: (low, high) 95 % interval of `value`. figures: (path of a .png, caption) pairs. note: one sentence on
    how it was obtained (data, seeds, what was held out). details: anything JSON-able kept beside it.
    """
    if not controls:
        raise ValueError(f"{task}: a result needs at least one control")
    folder = Path(folder)
    row = {
        "task": task,
        "metric": metric,
        "value": float(value),
        "interval": interval and [float(v) for v in interval],
        "controls": {k: float(v) for k, v in controls.items()},
        "note": note,
        "details": details or {},
        "figures": [{"path": str(Path(p).resolve()), "caption": caption} for p, caption in figures],
    }
    name = re.sub(r"\W+", "-", task.lower()).strip("-")
    atomic_write(folder / "results" / f"{name}.json", json.dumps(row, indent=1, ensure_ascii=False))


def collect(runs, project: str) -> list[dict]:
    """The result rows of one project, oldest first."""
    paths = (Path(runs) / project / "results").glob("*.json")
    return [json.loads(p.read_text()) for p in sorted(paths, key=lambda p: p.stat().st_mtime)]


def draw_curves(runs, project: str):
    """Picture of the training loss of every run of a project, each as a share of its first value; None if nothing was logged.

    Reads the field loss, or the first that starts with it, of runs/<project>/**/log.jsonl.
    """
    curves = {}
    for path in sorted((Path(runs) / project).rglob("log.jsonl"), key=lambda p: p.stat().st_mtime):
        points = []
        for line in (json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")):
            name = "loss" if "loss" in line else next((key for key in line if key.startswith("loss")), None)
            if name and line[name] is not None:
                points.append((line["step"], line[name]))
        if len(points) > 1 and points[0][1]:
            curves[str(path.parent.relative_to(Path(runs) / project))] = points
    if not curves:
        return None
    from common.figures import new_figure, save_figure  # not at the top: --help need not wait for matplotlib

    figure, axes = new_figure(width=8.5)
    for i, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points)
        axes.plot(
            steps,
            [loss / losses[0] for loss in losses],
            label=name,
            linestyle=("-", "--", ":", "-.")[i // 6 % 4],
        )
    axes.set(xlabel="optimizer step", ylabel="training loss, share of the first", xscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return save_figure(figure, Path(runs) / project / "curves.png")


def number(value) -> str:
    """Three significant digits, no exponent for everyday sizes."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def measured(row: dict) -> str:
    low_high = row.get("interval")
    return number(row["value"]) + (f" [{number(low_high[0])}, {number(low_high[1])}]" if low_high else "")


def controls(row: dict) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in row["controls"].items())


def table(projects: list[dict]) -> str:
    """The closing table as text. projects: dicts with name, status, seconds, peak_mb and rows."""
    lines = [["project", "task", "metric", "value", "control", "seconds", "peak MB"]]
    for project in projects:
        cost = [f"{project['seconds']:.0f}", f"{project['peak_mb']:.0f}"]
        first = [project["name"] + ("" if project["status"] == "ok" else f" ({project['status']})")]
        for row in project["rows"]:
            lines.append(first + [row["task"], row["metric"], measured(row), controls(row)] + cost)
            first, cost = [""], ["", ""]
        if not project["rows"]:
            lines.append(first + ["-"] * 4 + cost)
    widths = [min(60, max(len(line[i]) for line in lines)) for i in range(7)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #fff; --card: #f5f7fa; --line: #d9dfe7;
  --good: #1f7a4d; --bad: #b3372b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7ebf1; --soft: #a3adba; --paper: #14181e; --card: #1d232b; --line: #343d49; --good: #62c794; --bad: #f08a7d }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 1.6rem; margin: 0 0 4px }
h2 { font-size: 1.2rem; margin: 40px 0 4px; padding-top: 16px; border-top: 1px solid var(--line) }
p { margin: 4px 0 }
.soft { color: var(--soft); font-size: .9rem }
.scroll { overflow-x: auto; margin-top: 12px }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums }
.ok { color: var(--good) }
.failed { color: var(--bad) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 16px; margin: 16px 0 24px }
.wide { grid-template-columns: minmax(0, 760px) }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 10px }
figure img { width: 100%; height: auto; background: #fff; border-radius: 4px }
figcaption { font-size: .88rem; color: var(--soft); margin-top: 6px }
@media (max-width: 640px) {
  thead { display: none }
  tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line) }
  td { display: block; border: 0; padding: 1px 0 }
  td::before { content: attr(data-head) ": "; color: var(--soft) }
  td:empty { display: none }
}
"""


def page(projects: list[dict], about: str) -> str:
    """The summary as one HTML page without any outside reference; pictures are inlined as base64."""
    text = html.escape
    head = ("project", "task", "metric", "value [95 %]", "controls", "seconds", "peak MB")
    body, sections = [], []
    for project in projects:
        state = f'<span class="{"ok" if project["status"] == "ok" else "failed"}">{text(project["status"])}</span>'
        for i, row in enumerate(project["rows"] or [{}]):
            cost = (f"{project['seconds']:.0f}", f"{project['peak_mb']:.0f}") if i == 0 else ("", "")
            cells = [
                text(project["name"]) + " " + state if i == 0 else "",
                text(row.get("task", "no result")),
                text(row.get("metric", "")),
                measured(row) if row else "",
                text(controls(row)) if row else "",
                *cost,
            ]
            kinds = ["", "", "", " class=n", "", " class=n", " class=n"]
            body.append(
                "<tr>"
                + "".join(f'<td data-head="{h}"{k}>{c}</td>' for h, k, c in zip(head, kinds, cells))
                + "</tr>"
            )
        sections.append(f"<h2>{text(project['name'])}</h2>")
        shown = set()
        for row in project["rows"]:
            sections.append(
                f"<p><b>{text(row['task'])}</b>: {text(row['metric'])} {measured(row)}, against {text(controls(row))}.</p>"
            )
            if row["note"]:
                sections.append(f'<p class="soft">{text(row["note"])}</p>')
            figures = [f for f in row["figures"] if Path(f["path"]).is_file() and f["path"] not in shown]
            shown.update(f["path"] for f in figures)
            if figures:
                sections.append('<div class="figures">' + "".join(_figure(f) for f in figures) + "</div>")
        if project.get("curves"):
            curves = _figure({"path": project["curves"], "caption": "training loss of every run"})
            sections.append(f'<div class="figures wide">{curves}</div>')
        if project["status"] != "ok":
            sections.append(
                f'<p class="failed">{text(project["status"])}; the log is {text(str(project["log"]))}</p>'
            )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Summary of runs</title><style>{STYLE}</style></head><body><main><h1>Summary of runs</h1>"
        f'<p class="soft">{text(about)}</p><div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{''.join(sections)}</main></body></html>"
    )


def _figure(figure: dict) -> str:
    data = base64.b64encode(Path(figure["path"]).read_bytes()).decode()
    caption = html.escape(figure["caption"])
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def write_summary(runs, projects: list[dict], about: str):
    """Write runs/summary.json and runs/summary.html."""
    atomic_write(
        Path(runs) / "summary.json",
        json.dumps({"about": about, "projects": projects}, indent=1, ensure_ascii=False, default=str),
    )
    atomic_write(Path(runs) / "summary.html", page(projects, about))
