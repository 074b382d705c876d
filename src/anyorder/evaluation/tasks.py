"""The tasks by name."""

from __future__ import annotations

import difflib

from anyorder.evaluation.choice_tasks import HellaSwag, Lambada, Piqa, Siqa, WinoGrande
from anyorder.evaluation.code_tasks import (
    AutoLength,
    BehindIndentation,
    FillInTheMiddle,
    PrefixOnly,
    SeveralLengths,
    SuffixFirst,
    TrueLength,
)
from anyorder.evaluation.order_audit import Calibration, OrderSpread, OrderTaken
from anyorder.evaluation.story_tasks import (
    FourthSentence,
    SecondAndFourthSentence,
    SecondSentence,
    StoryCloze,
    ThirdAndFourthSentence,
    ThirdSentence,
)
from anyorder.evaluation.task import Task
from anyorder.evaluation.trivia import TriviaQa
from anyorder.evaluation.writing_tasks import Continuations, Fills

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        TriviaQa, HellaSwag, WinoGrande, Siqa, Piqa, Lambada,
        ThirdSentence, SecondSentence, FourthSentence, SecondAndFourthSentence, ThirdAndFourthSentence, StoryCloze,
        TrueLength, AutoLength, BehindIndentation, SeveralLengths, FillInTheMiddle, PrefixOnly, SuffixFirst,
        Continuations, Fills, OrderSpread, OrderTaken, Calibration,
    )
}  # fmt: skip


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: with the nearest name, if there is none.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(TASKS)
        raise ValueError(f"no task {name!r}; {hint}")
    return TASKS[name]()
