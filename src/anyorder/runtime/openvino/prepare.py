"""A model made ready for OpenVINO, once: exported, its graph rewritten, its weights in fewer bits, kept on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openvino as ov

from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.openvino import cache
from anyorder.runtime.openvino.graph import compress, join
from anyorder.runtime.processor import has_amx

logger = logging.getLogger(__name__)

STEPS = ("exporting rows", "joining layers", "writing rows", "exporting head and coupling")
Report = Callable[[str], None]


def prepare(
    model: AnyOrderPreTrainedModel, weights: str, report: Report = lambda step: None, anew: bool = False
) -> Path:
    """The folder of a model's graphs, made if it is not there.

    Args:
        model: a converted model.
        weights: of `graph.WEIGHTS`.
        report: is told each of `STEPS` as it begins.
        anew: make it even if it is there.

    Raises:
        ValueError: if the folder cannot be written to or is not this user's own, or the model cannot be exported.
    """
    if weights == "bfloat16" and not has_amx():
        raise ValueError("weights='bfloat16' are slower than float32 on this processor, which has no AMX: take int8")
    if weights == "int4":
        from anyorder.runtime.openvino.int4 import check_installed

        check_installed()
    folder = cache.place_of(model, weights)
    if not anew and cache.find(folder):
        return folder
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    logger.info("preparing the model for OpenVINO once, to %s", folder)

    def write(part: Path) -> None:
        with _readable_errors(model):
            for name, graph in _graphs(model, weights, report):
                compress(graph, weights)
                ov.save_model(graph, part / f"{name}.xml", compress_to_fp16=False)
                del graph  # before the next one is made

    cache.write(folder, write)
    return folder


def _graphs(model: AnyOrderPreTrainedModel, weights: str, report: Report) -> Iterator[tuple[str, ov.Model]]:
    """Names and graphs, one at a time, so that no two are held at once."""
    from anyorder.runtime.openvino.export import exported_head, exported_members, exported_rows, in_float32

    with in_float32(model) as plain:
        report(STEPS[0])
        rows = exported_rows(plain)
        report(STEPS[1])
        join(rows, weights)
        if weights == "int4":
            from anyorder.runtime.openvino.int4 import in_int4

            in_int4(rows, plain)
        report(STEPS[2])
        yield "rows", rows
        del rows
        report(STEPS[3])
        yield "head", exported_head(plain)
        yield from exported_members(plain)


@contextmanager
def _readable_errors(model: AnyOrderPreTrainedModel) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"a {type(model.causal_lm).__name__} cannot be exported to OpenVINO ({type(error).__name__}: {reason}): "
            "use engine='eager'"
        ) from error
