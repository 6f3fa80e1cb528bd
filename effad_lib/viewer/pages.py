"""What leaves the notebook: a view as PNG for print, a run as a static page for people without Jupyter."""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from effad_lib.images import ImageError
from effad_lib.plots import BARE, OUTLINE, PREDICTED, WIDTH
from effad_lib.progress import progress
from effad_lib.runs import write_bytes, write_text
from effad_lib.viewer.drawings import colour_bar, histogram
from effad_lib.viewer.findings import Findings, Picture
from effad_lib.viewer.rendering import Layers, encoded, panel
from effad_lib.viewer.state import State, counts, listed, outcomes

CAPTIONS = {"image": "image", "overlay": "overlay", "heatmap": "anomaly map", "truth": "ground truth"}


def marks(findings: Findings, state: State) -> dict[str, float]:
    """Return the named places of the colour scale: the model's quantiles, its threshold and that of the pixels."""
    places = {"q_a": 0.0, "q_b": 0.1} if findings.detector else {}
    if findings.threshold is not None:
        places["threshold"] = findings.threshold
    return places if state.pixel_threshold is None else places | {"marked": state.pixel_threshold}


def heading(findings: Findings, state: State) -> str:
    """Return one line of text for the image shown: file, type of defect, score and decision."""
    defect, score = findings.defects[state.index], findings.scores[state.index]
    outcome = outcomes(findings, state.threshold)[state.index]
    parts = [Path(findings.names[state.index]).name, defect or "truth not known", f"score {score:.4g}", outcome]
    return " · ".join(part for part in parts if part)


def print_png(findings: Findings, picture: Picture, state: State, *, dpi: int = 300) -> bytes:
    """Return the panels of a state with heading and colour bar as PNG for print, 9 inches wide."""
    layers = Layers(picture, state, longest=2048, shortest=1024)
    scale, (height, width) = layers.scale(state, findings.scale), layers.size
    panels = state.panels or ("image",)
    size = (WIDTH, min(WIDTH / len(panels) * height / width + 1.3, 2 * WIDTH))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, subplot_kw=BARE, layout="constrained")
    try:
        for ax, name in zip(axes[0], panels, strict=True):
            ax.imshow(np.asarray(panel(name, layers, state, findings.scale)))
            ax.set_title(CAPTIONS[name], fontsize=9)
        drawn = ScalarMappable(Normalize(*scale), matplotlib.colormaps[state.colours])
        label = f"{state.map.replace('_', '–')} map" + (", stretched to this image" if state.scaling == "image" else "")
        bar = figure.colorbar(
            drawn, ax=axes, orientation="horizontal", label=label, extend="both", fraction=0.05, aspect=60
        )
        for value, colour in ((findings.threshold, OUTLINE), (state.pixel_threshold, PREDICTED)):
            if value is not None and scale[0] <= value <= scale[1]:
                bar.ax.axvline(value, color=colour, linewidth=1.5)
        figure.suptitle(heading(findings, state).replace("$", r"\$"), fontsize=10)
        packed = io.BytesIO()
        figure.savefig(packed, format="png", dpi=dpi)
    finally:
        plt.close(figure)
    return packed.getvalue()


def write_gallery(findings: Findings, folder: str | Path) -> Path:
    """Write `index.html` and a picture of every scored image into a folder; return the page's path.

    Each picture is the image beside its overlay, with the outlines of the truth and of what is marked, all on the one
    scale of the run, ordered by score. The page filters by outcome and type of defect; it loads nothing but the
    pictures beside it. Those of an earlier gallery in the folder are replaced. Raises `RunError` if it cannot be
    written.
    """
    folder = Path(folder)
    state = State(threshold=findings.threshold, pixel_threshold=findings.pixel_threshold)
    cards, written, outcome = [], set(), outcomes(findings, findings.threshold)
    order = [index for index in listed(findings, state).tolist() if np.isfinite(findings.scores[index])]
    for number, index in enumerate(progress(order, desc="gallery", unit="image")):
        file = f"{number:05d}.jpg"
        try:
            layers = Layers(findings.picture(index), state, longest=384)
        except ImageError as error:
            cards.append(f'<figure><figcaption class="lost">{html.escape(str(error))}</figcaption></figure>')
            continue
        drawn = [np.asarray(panel(name, layers, state, findings.scale)) for name in ("image", "overlay")]
        written.add(folder / file)
        write_bytes(folder / file, encoded(Image.fromarray(np.concatenate(drawn, axis=1))))
        defect = findings.defects[index] or "not known"
        name = html.escape(findings.names[index])
        data = f'data-defect="{html.escape(defect)}" data-outcome="{outcome[index]}"'
        text = f"<b>{findings.scores[index]:.3f}</b> {html.escape(defect)}, {outcome[index] or 'not decided'}<br>{name}"
        size = f'width="{2 * layers.size[1]}" height="{layers.size[0]}"'
        cards.append(
            f'<figure {data}><a href="{file}"><img loading="lazy" {size} src="{file}" alt="{name}"></a>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    bar = colour_bar(state.colours, findings.scale, marks(findings, state), "anomaly score, one scale for all images")
    filters = "".join(
        f'<label>{name} <select id="{name}"><option value="">all</option>'
        + "".join(f"<option>{html.escape(value)}</option>" for value in values)
        + "</select></label> "
        for name, values in (
            ("outcome", sorted({str(outcome[index]) for index in order} - {""})),
            ("defect", sorted({findings.defects[index] or "not known" for index in order})),
        )
    )
    title = html.escape(f"{findings.title}: {len(order)} images")
    body = f"<h1>{title}</h1><p>{summary(findings, findings.threshold)}</p>"
    body += f"<div>{histogram(findings, findings.threshold)}</div><div>{bar}</div><p>{filters}</p>"
    page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>{body}'
    for stale in set(folder.glob("[0-9]" * 5 + ".jpg")) - written:
        stale.unlink()
    return write_text(folder / "index.html", f"{page}<main>{''.join(cards)}</main><script>{SCRIPT}</script>\n")


def summary(findings: Findings, threshold: float | None) -> str:
    """Return as HTML how many images of each truth were called what, and the two kinds of mistakes."""
    if threshold is None:
        return "no threshold, so nothing is decided"
    table = counts(findings, threshold)
    (_, false_alarms), (misses, _), _ = table
    rows = [
        f"<tr><th>{name}</th><td>{row[0]}</td><td>{row[1]}</td></tr>"
        for name, row in zip(("good", "defective", "not known"), table, strict=True)
        if row.sum()
    ]
    shares = []
    for name, count, of in (("false alarms", false_alarms, table[0].sum()), ("misses", misses, table[1].sum())):
        if of:
            shares.append(f"<b>{name} {count}</b> of {of} ({100 * count / of:.1f} %)")
    head = "<tr><th>truth</th><th>called good</th><th>called defective</th></tr>"
    spaced = 'style="border-spacing:12px 2px;margin-left:-12px;text-align:right"'
    return f"{', '.join(shares)}<table {spaced}>{head}{''.join(rows)}</table>"


STYLE = (
    "body{font:14px sans-serif;margin:1.5em}main{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0;width:392px}"
    "img{width:100%;height:auto}figcaption{overflow-wrap:anywhere}th,td{padding:1px 8px;text-align:right}"
    ".lost{color:#a00}[hidden]{display:none}"
)

SCRIPT = """
const choices = ["outcome", "defect"].map(name => document.getElementById(name));
const show = () => document.querySelectorAll("figure").forEach(figure => {
  figure.hidden = choices.some(choice => choice.value && figure.dataset[choice.id] !== choice.value);
});
choices.forEach(choice => choice.addEventListener("change", show));
"""
