"""What users pass in as text, checked. Imports nothing."""

from __future__ import annotations


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a lone surrogate: half of a character, which no tokenizer and no file can hold.

    They come from `\\ud83d` without its other half in JSON, and from bytes that were read with `surrogateescape`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate, {text[error.start]!r} at character {error.start}: no text in Unicode; "
            f"text.encode('utf-8', 'replace').decode() replaces it"
        ) from error
