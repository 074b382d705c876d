"""A conversation as the tokens that stand in front of an answer, by the tokenizer's own chat template.

This module knows tokenizers; it knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from anyorder.core.text import check_text


def chat_prefix(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids up to where the assistant's answer begins, special tokens included.

    Args:
        tokenizer: of an instruct model.
        messages: as `apply_chat_template` takes them: a "role" and a "content" each.

    Raises:
        ValueError: if the tokenizer has no chat template, or its template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so its model was not trained to answer: give a plain text"
        )
    for message in messages:
        check_text(f"the {message['role']}'s message", message["content"])
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return list(ids)
