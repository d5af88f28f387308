"""What a run of run_all.sh shows at its end: one table, one JSON file and one self-contained page with the
pictures inline.

Each project writes its results with `write_result`; `collect` reads them back, whoever wrote them.
"""

import base64
import json
import re
from pathlib import Path

from jinja2 import Environment

from common.checkpoint import atomic_write

TEMPLATE = Path(__file__).with_suffix(".html")


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
    headline: bool = False,
):
    """Write one row of the closing table to folder/results/<task>.json.

    folder: runs/<project>. metric: its name, with unit and direction if these are not plain ("macro-F1",
    "MSE, lower is better"). controls: {name: value} of the same metric (chance, random initialisation, a
    classical baseline), at least one. interval: (low, high) 95 % interval of `value`. figures: (path of a
    .png, caption) pairs. note: one sentence on how it was obtained (data, seeds, what was held out). details:
    anything JSON-able kept beside it. headline: the row that stands for its project on the first screen of
    the page (default: the first one), with its first picture.
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
        "headline": headline,
    }
    name = re.sub(r"\W+", "-", task.lower()).strip("-")
    atomic_write(folder / "results" / f"{name}.json", json.dumps(row, indent=1, ensure_ascii=False))


def collect(runs, project: str) -> list[dict]:
    """The result rows of one project, oldest first."""
    paths = (Path(runs) / project / "results").glob("*.json")
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(paths, key=lambda p: p.stat().st_mtime)]


def draw_curves(runs, project: str):
    """Picture of the training loss of every run of a project, each as a share of its first value; None if
    nothing was logged.

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
    """Three decimals of numbers around one, else four significant digits or all before the point."""
    if value is None:
        return "-"
    size = abs(value)
    form = ".3f" if 0.01 <= size < 10 or size == 0 else ".0f" if size >= 1000 else ".4g"
    return f"{value:{form}}"


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


def plot(row: dict) -> dict:
    """Places in percent of the width for a dot plot of a value, its interval and its controls.

    The axis runs from 0 to 1 where all numbers lie there, else from the least to the largest. The strongest
    control is the largest, or the smallest where the metric's name says "lower is better".
    """
    low_high = row.get("interval") or []
    numbers = [row["value"], *row["controls"].values(), *low_high]
    low, high = (0.0, 1.0) if all(0 <= n <= 1 for n in numbers) else (min(numbers), max(numbers))
    place = lambda n: round(2 + 96 * (n - low) / (high - low or 1), 2)
    best = (min if "lower" in row["metric"] else max)(row["controls"].values())
    return {
        "x": place(row["value"]),
        "interval": [place(n) for n in low_high],
        "controls": [
            {"name": name, "value": number(value), "x": place(value), "strongest": value == best}
            for name, value in row["controls"].items()
        ],
    }


def verdict(row: dict) -> str:
    """The strongest control in one sentence, also where it wins."""
    lower = "lower" in row["metric"]
    name, best = (min if lower else max)(row["controls"].items(), key=lambda control: control[1])
    wins = best < row["value"] if lower else best > row["value"]
    rest = len(row["controls"]) - 1
    more = f"; {rest} more control{'s' if rest > 1 else ''}" if rest else ""
    return f"strongest control: {name} {number(best)}" + (", which is better" if wins else "") + more


def page(projects: list[dict], about: str) -> str:
    """The summary as one HTML page without any outside reference; pictures are inlined as base64."""
    shown = []
    for project in projects:
        rows, seen = [], set()
        for row in project["rows"]:
            figures = [f for f in row["figures"] if Path(f["path"]).is_file() and f["path"] not in seen]
            seen.update(figure["path"] for figure in figures)
            words = {"measured": measured(row), "against": controls(row), "verdict": verdict(row)}
            rows.append({**row, **words, "plot": plot(row), "pictures": [_picture(**f) for f in figures]})
        curves = project.get("curves")
        curves = curves and _picture(curves, "training loss of every run")
        # first what stands for the project, with its picture or any other one
        rows.sort(key=lambda row: not row.get("headline"))
        thumb = next((picture["data"] for row in rows for picture in row["pictures"]), None)
        shown.append({**project, "rows": rows, "curves": curves, "thumb": thumb})
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text())
    return template.render(projects=shown, about=about)


def _picture(path, caption: str) -> dict:
    return {"caption": caption, "data": base64.b64encode(Path(path).read_bytes()).decode()}


def write_summary(runs, projects: list[dict], about: str):
    """Write runs/summary.json and runs/summary.html."""
    atomic_write(
        Path(runs) / "summary.json",
        json.dumps({"about": about, "projects": projects}, indent=1, ensure_ascii=False, default=str),
    )
    atomic_write(Path(runs) / "summary.html", page(projects, about))
