"""Text that is none: a lone surrogate is one clear error, wherever it comes in."""

from __future__ import annotations

import pytest

from anyorder import Infiller
from anyorder.core.text import check_text
from anyorder.decoding.constraints import Choice
from anyorder.infill.chat import chat_prefix
from anyorder.infill.pieces import Pieces
from anyorder.infill.prompt import Prompt
from anyorder.infill.template import Template
from architectures import converted


def test_whole_characters_pass_and_halves_are_named():
    check_text("the text", "a é 日 😀 \U0010ffff \x00")
    for text, position in (("\ud83d", 0), ("ab\udcff", 2), ("😀\ud83d 😀", 1)):
        with pytest.raises(ValueError, match=rf"the text has a lone surrogate, '\\ud\w+' at character {position}:"):
            check_text("the text", text)


def test_every_way_in_is_checked(byte_tokenizer):
    model = converted("llama", vocabulary=len(byte_tokenizer))
    infiller, pieces = Infiller(model, byte_tokenizer), Pieces(byte_tokenizer)
    bad = "a\ud83d"
    for use in (
        lambda: infiller(f"{bad} ___", length=1),
        lambda: infiller(["a ___", f"___ {bad}"], length=1),
        lambda: infiller("a ___", constraints=Choice("b", bad)),
        lambda: Template.parse(f"{bad} ___"),
        lambda: pieces.encode(bad),
        lambda: Prompt.of(pieces, bad),
    ):
        with pytest.raises(ValueError, match=r"lone surrogate, '\\ud83d' at character"):
            use()


def test_messages_are_checked(byte_tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        chat_prefix(byte_tokenizer, [{"role": "user", "content": "a"}])

    class Instruct:
        chat_template = "{{ messages }}"

    with pytest.raises(ValueError, match=r"the user's message has a lone surrogate"):
        chat_prefix(Instruct(), [{"role": "user", "content": "a\ud83d"}])
