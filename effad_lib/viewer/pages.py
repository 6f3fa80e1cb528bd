"""What leaves the notebook: a view as PNG for print, a run as a static page for people without Jupyter."""

from __future__ import annotations

import html
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from effad_lib.images import ImageError
from effad_lib.plots import BARE, WIDTH, as_png, plain
from effad_lib.progress import progress
from effad_lib.runs import GALLERY, RunError, check_links, is_gallery, write_bytes, write_text
from effad_lib.viewer.drawings import colour_bar, histogram
from effad_lib.viewer.findings import Findings, Picture
from effad_lib.viewer.rendering import Layers, encoded, panel
from effad_lib.viewer.state import State, counts, listed, outcomes

CAPTIONS = {"image": "image", "overlay": "overlay", "heatmap": "anomaly map", "truth": "ground truth"}

OUTLINE_LABELS = {"truth": "truth (cyan)", "marked": "marked by the combined map (white)"}


def marks(findings: Findings, state: State) -> dict[str, float]:
    """Return the named places of the colour scale: the model's quantiles, the thresholds of image and pixels."""
    places = {"q_a": 0.0, "q_b": 0.1} if findings.detector else {}
    if state.threshold is not None:
        places["threshold"] = state.threshold
    return places if state.pixel_threshold is None else places | {"marked": state.pixel_threshold}


def captions(picture: Picture, state: State) -> dict[str, str]:
    """Return what stands above each panel: which map it is, and whether the truth is known."""
    truth = CAPTIONS["truth"] + (": not known" if picture.truth is None else "")
    return CAPTIONS | {"heatmap": f"{state.map.replace('_', '–')} map", "truth": truth}


def heading(findings: Findings, state: State) -> str:
    """Return one line of text for the image shown: file, type of defect, score and decision."""
    defect, score = findings.defects[state.index], findings.scores[state.index]
    outcome = outcomes(findings, state.threshold)[state.index]
    parts = [Path(findings.names[state.index]).name, defect or "truth not known", f"score {score:.4g}", outcome]
    return " · ".join(part for part in parts if part)


def print_png(findings: Findings, picture: Picture, state: State, *, dpi: int = 300) -> bytes:
    """Return the panels of a state with heading and colour bar as PNG for print, 9 inches wide."""
    layers = Layers(picture, state, longest=2048, shortest=1024)
    scale, (height, width), titles = layers.scale(state, findings.scale), layers.size, captions(picture, state)
    panels = state.panels or ("image",)
    size = (WIDTH, min(WIDTH / len(panels) * height / width + 1.7, 2 * WIDTH))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, subplot_kw=BARE, layout="constrained")
    try:
        for ax, name in zip(axes[0], panels, strict=True):
            ax.imshow(np.asarray(panel(name, layers, state, findings.scale)))
            ax.set_title(titles[name], fontsize=9)
        drawn = ScalarMappable(Normalize(*scale), matplotlib.colormaps[state.colours])
        label = f"{state.map.replace('_', '–')} map" + (", stretched to this image" if state.scaling == "image" else "")
        bar = figure.colorbar(
            drawn, ax=axes, orientation="horizontal", label=label, extend="both", fraction=0.05, aspect=60
        )
        named = sorted((value, name) for name, value in marks(findings, state).items() if scale[0] <= value <= scale[1])
        for k, (value, name) in enumerate(named):
            bar.ax.axvline(value, color="black", linewidth=2.5)
            bar.ax.axvline(value, color="white", linewidth=1)
            place = {"xytext": (0, 3 + 8 * (k % 2)), "textcoords": "offset points", "ha": "center", "fontsize": 7}
            bar.ax.annotate(name, (value, 1), xycoords=bar.ax.get_xaxis_transform(), **place)
        decided = "" if state.threshold is None else f" at threshold {state.threshold:.4g}"
        figure.suptitle(plain(heading(findings, state) + decided), fontsize=10)
        if legend := ", ".join(OUTLINE_LABELS[name] for name in state.outlines):
            figure.supxlabel(f"outlines: {legend}", fontsize=7)
        return as_png(figure, dpi)
    finally:
        plt.close(figure)


def write_gallery(findings: Findings, folder: str | Path) -> Path:
    """Write `index.html` and a picture of every scored image into a folder; return the page's path.

    Each picture is the image beside its overlay, with the outlines of the truth and of what is marked, all on the one
    scale of the run, ordered by score. The page filters by outcome and type of defect; it loads nothing but the
    pictures beside it. An earlier gallery in the folder is replaced. Raises `RunError` if the folder holds anything
    else, or cannot be written.
    """
    folder = Path(folder)
    _claim(folder)
    state = State(threshold=findings.threshold, pixel_threshold=findings.pixel_threshold)
    cards, written, outcome = [], set(), outcomes(findings, findings.threshold)
    order = [index for index in listed(findings, state).tolist() if np.isfinite(findings.scores[index])]
    for number, index in enumerate(progress(order, desc="gallery", unit="image")):
        file = f"{number:05d}.jpg"
        try:
            layers = Layers(findings.picture(index), state, longest=384, shortest=192)
        except ImageError as error:
            cards.append(f'<figure><figcaption class="lost">{html.escape(str(error))}</figcaption></figure>')
            continue
        drawn = [np.asarray(panel(name, layers, state, findings.scale)) for name in ("image", "overlay")]
        written.add(folder / file)
        write_bytes(folder / file, encoded(Image.fromarray(np.concatenate(drawn, axis=1))))
        defect = findings.defects[index] or "not known"
        name = html.escape(findings.names[index])
        data = f'data-defect="{html.escape(defect)}" data-outcome="{outcome[index]}"'
        text = f"<b>{findings.scores[index]:.4g}</b> {html.escape(defect)}, {outcome[index] or 'not decided'}<br>{name}"
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
    body += f"<div>{histogram(findings, findings.threshold)}</div><div>{bar}</div>"
    body += f"<p>Outlines: {', '.join(OUTLINE_LABELS.values())}.</p><p>{filters}<span id='shown'></span></p>"
    page = f'<!doctype html><meta charset="utf-8">{GALLERY}<title>{title}</title><style>{STYLE}</style>{body}'
    for stale in set(folder.glob("[0-9]" * 5 + ".jpg")) - written:
        stale.unlink()
    return write_text(folder / "index.html", f"{page}<main>{''.join(cards)}</main><script>{SCRIPT}</script>\n")


def _claim(folder: Path) -> None:
    """Raise `RunError` if a folder holds what is no gallery; else mark it as one, before any picture is in it."""
    check_links(folder)
    ours = is_gallery(folder)
    if not ours and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} holds other files, and a gallery replaces what is there. Name a new folder for it.")
    if not ours:
        write_text(folder / "index.html", f"<!doctype html>{GALLERY}This gallery was not finished.\n")


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
const figures = [...document.querySelectorAll("figure")];
const show = () => {
  figures.forEach(figure => {
    figure.hidden = choices.some(choice => choice.value && figure.dataset[choice.id] !== choice.value);
  });
  const count = figures.filter(figure => !figure.hidden).length;
  document.getElementById("shown").textContent = `${count} of ${figures.length} images`;
};
choices.forEach(choice => choice.addEventListener("change", show));
show();
"""
