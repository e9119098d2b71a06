"""One page about a run, to be opened in any browser, also without a network.

python -m train.report outputs/demo/run
"""

import argparse
import base64
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import yaml
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from train import TrainError
from train.metrics import Scores

Series = dict[str, tuple[list[int], list[float]]]  # a metric's steps and values
INK, GRID = "#1f2933", "#e4e7eb"
LINES = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2"]
GROUPS = {"worst": "Worst", "best": "Best", "examples": "First"}
LAST_LINES = 60  # of the log


def write_report(folder: Path) -> Path:
    """Write report.html into a run's output folder. Raises TrainError if there is nothing to tell of, or no room."""
    series = read_metrics(folder / "metrics.jsonl")
    config, about = _read(folder / "config.yaml"), _read(folder / "environment.json")
    validation = _last_validation(folder, max(steps[-1] for steps, _ in series.values()))
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html.jinja")
    text = page.render(
        name="/".join(folder.resolve().parts[-2:]),
        plotly=get_plotlyjs(),
        facts=facts(series, config, about, validation),
        sections=[(title, [_html(figure) for figure in found]) for title, found in sections(series, validation) if found],
        pictures=_pictures(validation[0]) if validation else [],
        config=yaml.safe_dump(config, sort_keys=False),
        about={key: value for key, value in about.items() if not isinstance(value, dict)} | _section(about, "packages"),
        deepspeed=json.dumps(about.get("deepspeed_settings", {}), indent=2),
        log="\n".join(_text(folder / "log.txt").splitlines()[-LAST_LINES:]),
    )
    path = folder / "report.html"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainError(f"{path}: cannot be written: {error.strerror}; make room, or see the folder's permissions") from None
    return path


def read_metrics(path: Path) -> Series:
    """Every metric of a metrics.jsonl. Raises TrainError if it holds none."""
    series: Series = {}
    for line in _text(path).splitlines():
        try:
            values = json.loads(line)
            values["step"] + 1
        except (ValueError, TypeError, KeyError):
            continue  # half a line of a run that was killed, or is at work
        for key, value in values.items():
            if key not in ("step", "samples") and isinstance(value, int | float):
                steps, numbers = series.setdefault(key, ([], []))
                steps.append(values["step"] + 1)
                numbers.append(value)
    if not series:
        raise TrainError(f"{path}: no metrics there; give the output folder of a run that has logged a step")
    return series


def facts(series: Series, config: dict, about: dict, validation: tuple | None) -> list[tuple[str, str]]:
    """What stands at the top: (what, how much)."""

    def last(key: str, form: str) -> str:
        return form.format(series[key][1][-1]) if key in series else "-"

    found = [("steps", f"{max(steps[-1] for steps, _ in series.values())}")]
    if validation:
        found += [("mIoU", f"{validation[2].miou:.4f}"), ("best mIoU", last("val/best_miou", "{:.4f}"))]
    found += [
        ("loss", last("train/loss", "{:.4f}")),
        ("images/s", last("speed/images_per_second", "{:.1f}")),
        ("MFU", last("speed/mfu", "{:.1%}")),
        ("peak memory", last("memory/peak_gb", "{:.1f} GB")),
        ("model", str(_section(config, "model").get("arch", "-"))),
        ("processes", str(about.get("processes", "-"))),
        ("device", str(about.get("device", "-"))),
    ]
    return [(what, value) for what, value in found if value != "-"]


def sections(series: Series, validation: tuple | None) -> Iterable[tuple[str, list[go.Figure]]]:
    """The page's figures, in their order; those of which the run has no two values are left out."""

    def curves(**panels: list[str]) -> list[go.Figure]:
        drawn = {key: values for key, values in series.items() if len(values[0]) > 1}
        found = {title.replace("_", " "): {key: drawn[key] for key in keys if key in drawn} for title, keys in panels.items()}
        return [_curves(title, metrics) for title, metrics in found.items() if metrics]

    def ending(*units: str) -> list[str]:
        return [key for key in sorted(series) if key.startswith("node/") and key.endswith(units)]

    def starting(prefix: str) -> list[str]:
        return [key for key in sorted(series) if key.startswith(prefix)]

    yield "Training", curves(loss=["train/loss"], gradient_norm=["train/gradient_norm"], learning_rate=starting("lr/"))
    if validation:
        told, scores = validation[1:]
        yield "Validation over the run", curves(scores=["val/miou", "val/macc", "val/aacc"])
        yield f"The last validation, on {told['images']} images", [_class_bars(told, scores), _confusion(told, scores)]
    yield "Classes over the run", curves(loss=starting("loss_per_class/"), IoU=starting("iou/"))
    phases = [f"speed/{phase}_ms" for phase in ("data", "wait", "forward", "backward", "optimizer")]
    speed = curves(images_per_second=["speed/images_per_second"], MFU=["speed/mfu"], milliseconds_of_a_step=phases)
    yield "Throughput", speed + curves(memory_in_GB=starting("memory/"))
    yield "Machines", curves(percent=ending("percent"), temperature_and_power=ending("celsius", "watts"))


def _curves(title: str, metrics: Series) -> go.Figure:
    figure = go.Figure()
    for i, (key, (steps, values)) in enumerate(metrics.items()):
        color = LINES[i] if len(metrics) <= len(LINES) else None
        figure.add_scatter(
            x=steps, y=values, name=key.partition("/")[2], mode="lines", line={"color": color, "width": 1.8},
            showlegend=len(metrics) > 1,
        )  # fmt: skip
    figure.update_layout(title={"text": title, "font": {"size": 14}}, legend={"orientation": "h", "y": -0.2})
    figure.update_xaxes(title="step")
    return _styled(figure, 340 + 8 * len(metrics))


def _class_bars(told: dict, scores: Scores) -> go.Figure:
    order = [int(i) for i in np.argsort(np.nan_to_num(scores.iou, nan=-1)) if np.isfinite(scores.iou[i])]
    colors = ["rgb({}, {}, {})".format(*told["colors"][i]) for i in order]
    figure = go.Figure(
        go.Bar(
            x=scores.iou[order], y=[told["classes"][i] for i in order], orientation="h", text=scores.iou[order].round(3),
            marker={"color": colors, "line": {"color": INK, "width": 0.5}}, customdata=scores.accuracy[order],
            hovertemplate="%{y}: IoU %{x:.3f}, accuracy %{customdata:.3f}<extra></extra>",
        )  # fmt: skip
    )
    figure.update_layout(title={"text": "IoU", "font": {"size": 14}})
    figure.update_xaxes(range=[0, 1.12])
    return _styled(figure, 130 + 24 * len(told["classes"]))


def _confusion(told: dict, scores: Scores) -> go.Figure:
    shares = scores.confusion / np.maximum(scores.true[:, None], 1)
    names = told["classes"]
    hover = "%{y} taken for %{x}: %{z:.2%} of its pixels<extra></extra>"
    figure = go.Figure(go.Heatmap(z=shares, x=names, y=names, colorscale="Blues", zmin=0, zmax=1, hovertemplate=hover))
    figure.update_layout(title={"text": "where the pixels of each class went", "font": {"size": 14}})
    figure.update_xaxes(title="prediction", tickangle=-45)
    figure.update_yaxes(title="truth", autorange="reversed")
    return _styled(figure, 130 + 24 * len(names))


def _styled(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        height=height, margin={"l": 60, "r": 20, "t": 40, "b": 50}, paper_bgcolor="white", plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK}, hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    return figure


def _html(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _last_validation(folder: Path, last_step: int) -> tuple[Path, dict, Scores] | None:
    """Its folder, what its scores.json tells, and the scores; none of steps that a run has gone back behind."""
    for path in sorted(folder.glob("validation/step_*/scores.json"), reverse=True):
        try:
            if int(path.parent.name.removeprefix("step_")) > last_step:
                continue
            told = json.loads(path.read_text())
            scores = Scores(np.array(told["confusion"]))
            if {"classes", "colors", "images"} <= told.keys() and len(scores.iou) == len(told["classes"]) == len(told["colors"]):
                return path.parent, told, scores
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue  # the disk was full
    return None


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """(title, data URL) of each contact sheet."""
    found = [(title, folder / f"{name}.png") for name, title in GROUPS.items()]
    return [(title, base64.b64encode(path.read_bytes()).decode()) for title, path in found if path.exists()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _section(values: dict, key: str) -> dict:
    return values[key] if isinstance(values.get(key), dict) else {}


def _read(path: Path) -> dict:
    """A file of YAML or JSON; of one that is missing or half written, nothing."""
    try:
        values = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="a run's, finished or not")
    print(write_report(parser.parse_args().output_dir))


if __name__ == "__main__":
    try:
        main()
    except TrainError as error:
        sys.exit(f"error: {error}")
