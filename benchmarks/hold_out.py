"""Set texts aside for held-out losses: every fiftieth of each file, and what is left to train on.

    python benchmarks/hold_out.py --output split stories.jsonl.gz tales.jsonl.gz novels.jsonl.gz

writes `split/held_out.jsonl`, the beginning of each text that is set aside, up to the last sentence end within 500
characters, the files in turn; and `split/<name>.jsonl` with the other texts of each file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from anyorder.training.texts import read_texts

EVERY = 50
CHARACTERS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="texts, as `anyorder adapt --train-file` takes them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    aside = []
    for file in options.files:
        texts = read_texts([file])
        aside.append([beginning(text) for text in texts[::EVERY]])
        write(options.output / f"{Path(file).name.partition('.')[0]}.jsonl",
              [text for n, text in enumerate(texts) if n % EVERY])  # fmt: skip
    in_turn = [text for turn in itertools.zip_longest(*aside) for text in turn if text]
    write(options.output / "held_out.jsonl", in_turn)
    print(f"{len(in_turn)} texts set aside -> {options.output / 'held_out.jsonl'}")


def beginning(text: str) -> str:
    """The text up to the last sentence end within CHARACTERS, or cut there."""
    cut = text[:CHARACTERS]
    end = max(cut.rfind(mark) for mark in ".!?")
    return cut[: end + 1] if end > 0 else cut


def write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


if __name__ == "__main__":
    main()
