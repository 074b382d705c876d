"""Traces: what was committed, when; live, saved and drawn."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from anyorder import Factorization, policies
from anyorder.trace.live import Live
from anyorder.trace.record import Filled, Recorder, Trace
from anyorder.trace.render import draw
from architectures import converted

IDS = torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(0))
ORDER = Factorization.stack([Factorization.random(8, 2, given=3, generator=torch.Generator().manual_seed(1))] * 2)


def text(token: int) -> str:
    return chr(97 + token % 26)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("policy", [policies.groupwise(), policies.dynamic(), policies.speculative(draft="query")])
def test_a_trace_is_what_was_generated(policy):
    recorder = Recorder(text)
    model = converted("llama")
    output = model.generate(
        IDS, ORDER, policy, watch=recorder, return_dict_in_generate=True, eos_token_id=(), temperature=1.0
    )
    for b, trace in enumerate(recorder.traces):
        assert [one is None for one in trace.given] == ORDER.is_predicted[b].tolist()
        assert trace.steps == int(output.steps[b].max()) + 1
        final = "".join(one if isinstance(one, str) else one.text for one in trace.at(trace.steps))
        assert final == "".join(map(text, output.sequences[b].tolist()))
        for one in trace.filled:
            assert one.step == output.steps[b, one.position]
            assert one.log_prob == pytest.approx(float(output.log_probs[b, one.position]))
        assert trace.at(0) == trace.given


def test_live_in_a_terminal_and_elsewhere():
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        live = Live(text, out)
        converted("llama").generate(IDS[:1], Factorization(ORDER.group_ids[:1]), watch=live, eos_token_id=())
        live.close()
    lines = pipe.getvalue().splitlines()
    assert [line.count("·") for line in lines] == [5, 3, 1, 0]
    assert "\x1b" not in pipe.getvalue()
    assert terminal.getvalue().count("\r") == 4
    assert "\x1b[0m" in terminal.getvalue()


def test_likeliness():
    assert [Filled(0, "a", math.log(p), 0).likeliness for p in (0.05, 0.2, 0.9)] == [0, 1, 2]


def test_saved_and_drawn(tmp_path):
    trace = Trace(["<b>", None, None, "$x$ </script>"], [Filled(2, "c", -0.1, 0), Filled(1, "\n", -3.0, 1)])
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace
    for kind in ("html", "png", "gif"):
        draw(trace, tmp_path / f"order.{kind}")
    page = (tmp_path / "order.html").read_text()
    assert page.count("</script>") == 1
    data = page.split("const trace=")[1].split(",colours=")[0]
    assert json.loads(data)["given"] == trace.given
    assert "http" not in page
    from PIL import Image

    with Image.open(tmp_path / "order.gif") as film:
        assert film.n_frames == 3


@pytest.mark.parametrize("text", ["<!--<script>", "</script>", "<!-- <SCRIPT", "]]><p>", "\\u003c", "\u2028"])
def test_no_text_ends_the_script_of_the_page(tmp_path, text):
    """HTML 13.2.5.4: in a script's data, `<!--` and `<script` hide the next `</script>`; so no `<` is left in it."""
    trace = Trace([text, None], [Filled(1, text, -0.1, 0)])
    draw(trace, tmp_path / "order.html")
    page = (tmp_path / "order.html").read_text(encoding="utf-8")
    data = page.split("const trace=")[1].split(",colours=")[0]
    assert "<" not in data
    assert json.loads(data)["given"] == trace.given
    assert json.loads(data)["filled"][0]["text"] == text


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="must end in .html, .png or .gif"):
        draw(Trace([None], [Filled(0, "a", 0.0, 0)]), tmp_path / "order.svg")
    with pytest.raises(ValueError, match="nothing was filled"):
        draw(Trace(["a"]), tmp_path / "order.png")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no trace"):
        Trace.load(tmp_path / "other.json")
