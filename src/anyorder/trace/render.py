"""A trace as a file to look at: a page to play, a picture, a film."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyorder.trace.record import LIKELINESS_BOUNDS, OPEN, Filled, Trace, as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#d9534f", "#d9a441", "#4f9d5b")


def draw(trace: Trace, file: Path) -> None:
    """Write .html (to play, step and scrub), .png (each token's step) or .gif (a film).

    Raises:
        ValueError: for another kind of file, a trace without steps, or if what draws pictures is not installed.
    """
    if not trace.steps:
        raise ValueError("the trace has no steps: nothing was filled")
    kinds: dict[str, Callable[[Trace, Path], None]] = {".html": _page, ".png": _picture, ".gif": _film}
    if file.suffix not in kinds:
        raise ValueError(f"{file} must end in .html, .png or .gif")
    try:
        kinds[file.suffix](trace, file)
    except ImportError as error:
        raise ValueError("pictures and films need Matplotlib and Pillow: pip install 'anyorder[plot]'") from error


_PAGE = """<!doctype html><meta charset="utf-8"><title>order of generation</title>
<style>body{font:1.1em/1.7 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}
#text{white-space:pre-wrap;border:1px solid #ccc;border-radius:6px;padding:1em}
#text span{border-radius:3px} .open{color:#bbb} input{width:60%%;vertical-align:middle}</style>
<p><button id="play">play</button> <button id="back">&lt;</button> <button id="next">&gt;</button>
<input id="at" type="range" min="0" max="%d" value="%d"> <span id="said"></span></p><div id="text"></div>
<p><small>Colours: probability under the model when the token was drawn, %s. Point at a token for its step.</small></p>
<script>const trace=%s,colours=%s;let timer=null;const at=document.getElementById("at");
function show(){const n=+at.value,text=document.getElementById("text");text.textContent="";
const state=trace.given.map(t=>({t}));
for(const f of trace.filled)if(f.step<n)state[f.position]=f;
for(const one of state){const s=document.createElement("span");
if(one.t===undefined){s.textContent=one.text;s.style.background=colours[one.likeliness]+(one.step==n-1?"":"55");
s.title="step "+one.step+", p = "+Math.exp(one.log_prob).toFixed(3)}
else if(one.t===null){s.textContent="%s";s.className="open"}else s.textContent=one.t;text.append(s)}
document.getElementById("said").textContent=n+" of "+at.max+" steps"}
function stop(){clearInterval(timer);timer=null;document.getElementById("play").textContent="play"}
function by(d){at.value=+at.value+d;show()}
at.oninput=show;document.getElementById("back").onclick=()=>by(-1);document.getElementById("next").onclick=()=>by(1);
document.getElementById("play").onclick=function(){if(timer)return stop();if(at.value==at.max)at.value=0;
this.textContent="stop";timer=setInterval(()=>{if(at.value==at.max)stop();else by(1)},300)};show()</script>
"""


def _page(trace: Trace, file: Path) -> None:
    filled: list[dict[str, Any]] = [asdict(one) | {"likeliness": one.likeliness} for one in trace.filled]
    # Inside a script element "</" may end it and "<!--" begin what hides its end; JSON may write "<" otherwise.
    data = json.dumps({"given": trace.given, "filled": filled}).replace("<", "\\u003c")
    said = html.escape(f"red below {LIKELINESS_BOUNDS[0]}, yellow below {LIKELINESS_BOUNDS[1]}, green from there on")
    file.write_text(_PAGE % (trace.steps, trace.steps, said, data, json.dumps(_COLOURS), OPEN), encoding="utf-8")


COLUMNS = 72
"""Characters of a line in pictures."""


def _figure(trace: Trace, step: int, numbered: bool) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, line, column = [], 0, 0
    for part in trace.at(step):
        text = as_text(part).replace("\n", " ").replace("$", r"\$")
        if column + len(text) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column, text, part))
        column += len(text)
    figure = Figure(figsize=(0.125 * COLUMNS, 0.42 * (line + 1) + 0.4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, COLUMNS), ylim=(line + 1, -0.3))
    axes.axis("off")
    for y, x, text, part in places:
        box = None
        if isinstance(part, Filled):
            box = {"facecolor": _COLOURS[part.likeliness], "alpha": 0.5, "pad": 1, "linewidth": 0}
        axes.text(x, y + 0.7, text, family="monospace", fontsize=11, bbox=box)
        if numbered and isinstance(part, Filled):
            axes.text(x + len(text) / 2, y + 0.15, str(part.step), fontsize=6, ha="center", color="#666666")
    return figure


def _picture(trace: Trace, file: Path) -> None:
    _figure(trace, trace.steps, True).savefig(file, dpi=110)


def _film(trace: Trace, file: Path) -> None:
    import io

    from PIL import Image

    frames = []
    for step in range(trace.steps + 1):
        data = io.BytesIO()
        _figure(trace, step, False).savefig(data, format="png", dpi=90)
        frames.append(Image.open(data).convert("RGB"))
    width, height = (max(sizes) for sizes in zip(*(frame.size for frame in frames), strict=True))
    pages = [Image.new("RGB", (width, height), "white") for _ in frames]
    for page, frame in zip(pages, frames, strict=True):
        page.paste(frame)
    pages[0].save(file, save_all=True, append_images=pages[1:], duration=[400] * trace.steps + [2500], loop=0)
