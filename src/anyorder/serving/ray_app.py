"""The server as an application of Ray Serve: many replicas, on one machine or many, behind one address.

    serve run anyorder.serving.ray_app:build model=smollm2-135m-anyorder min_replicas=2 max_replicas=8

or a file for `serve deploy` (examples/ray_serve.yaml). Each replica is a process with a model, an engine and the
application of `api.create_app`; Ray spreads requests, starts and stops replicas, and puts another in the place of one
that died or no longer answers its health check.

This module knows Ray; what is answered, and how, is the business of `api` and `engine`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from anyorder.hub.resolve import DEFAULT_MODEL
from anyorder.loading import load
from anyorder.runtime.engines import check_engine, runner_for
from anyorder.serving.api import create_app
from anyorder.serving.engine import Engine
from anyorder.serving.server import read_keys
from anyorder.serving.service import Service

NAME = "AnyOrder"
"""Of the deployment: by it a file for `serve deploy` changes options of Ray's."""
PERIOD, PATIENCE = 5, 120
"""Seconds between two health checks, and those in which one must be answered: it waits for the forwards before it."""


class Arguments(BaseModel):
    """What `build` takes: as `key=value` behind `serve run`, or as `args` in a file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = DEFAULT_MODEL
    """Built-in name, hub id, or a directory or file that every node has at this place."""
    base_model: str | None = None
    """Of an adapter whose base has moved."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    engine: str = "auto"
    """As of `anyorder serve`."""
    weights: str | None = None
    """As of `anyorder serve`."""
    slots: int = Field(default=8, ge=1)
    """Requests at work at once in a replica."""
    context: int = Field(default=2048, ge=1)
    """Tokens of a request."""
    waiting: int = Field(default=256, ge=1)
    """Requests that may wait, in each of Ray's proxies; others get 503."""
    timeout: float = Field(default=300, gt=0)
    """Seconds that a request may take once a replica has it."""
    patience: float = Field(default=30, ge=0)
    """Seconds that requests may still take when their replica is told to stop."""
    api_keys: Path | None = None
    """A file of keys that every node has; also from the variable ANYORDER_API_KEYS of the replicas."""
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    """More than `min_replicas`: as many as keep `slots` requests at work in each."""
    cpus: float = Field(default=1, gt=0)
    """Of a replica; its forwards have as many threads."""
    gpus: float = Field(default=0, ge=0, le=1)
    """Of a replica; more than none: its model is on a GPU, and some replicas may share one."""

    @model_validator(mode="after")
    def _can_be_meant(self) -> Arguments:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        check_engine(self.engine, self.weights)
        if self.engine == "cuda_graphs":
            raise ValueError("engine cuda_graphs: requests come and go, and graphs are of one batch; choose eager")
        return self


def build(arguments: Arguments | dict[str, Any]) -> serve.Application:
    """The application, for `serve run`, `serve deploy` or `serve.run`.

    Args:
        arguments: or what they are made of: so Ray's commands hand over what was typed, or stands in a file.

    Raises:
        pydantic.ValidationError: a ValueError that names the argument that cannot be meant.
    """
    arguments = Arguments.model_validate(arguments)
    scale: dict[str, Any] = {"num_replicas": arguments.max_replicas}
    if arguments.min_replicas < arguments.max_replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": arguments.min_replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.slots,
            }
        }
    replica = serve.deployment(serve.ingress()(Replica))
    return replica.options(
        name=NAME,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # Twice the slots: one that becomes free finds a request there; others wait where any replica takes them.
        max_ongoing_requests=2 * arguments.slots,
        max_queued_requests=arguments.waiting,
        health_check_period_s=PERIOD,
        health_check_timeout_s=PATIENCE,
        graceful_shutdown_timeout_s=arguments.patience,
        **scale,
    ).bind(arguments.model_dump(mode="json"))


class Replica:
    """A process that serves.

    Ray keeps its main thread, and calls this class in another one. The model is loaded by a third one, which then
    executes its forwards: no other works on large tensors, so OpenMP has helpers for one thread (see `Joiner.run`).

    Args:
        arguments: of `Arguments`, as JSON has them.
    """

    def __init__(self, arguments: dict[str, Any]):
        self._arguments = Arguments.model_validate(arguments)
        begun: Future[tuple[Service, Engine]] = Future()
        self._thread = threading.Thread(target=self._execute, args=(begun,), name="anyorder-forwards", daemon=True)
        self._thread.start()
        self._service, self._engine = begun.result()

    def _execute(self, begun: Future[tuple[Service, Engine]]) -> None:
        torch.set_num_threads(max(int(self._arguments.cpus), 1))
        try:
            service, engine = _loaded(self._arguments)
        except BaseException as error:
            begun.set_exception(error)
            return
        begun.set_result((service, engine))
        engine.run()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray asks for the application once this object is there."""
        logging.getLogger("anyorder").setLevel(logging.INFO)
        return create_app(self._service, self._engine, read_keys(self._arguments.api_keys), self._arguments.timeout)

    async def check_health(self) -> None:
        """Raise if forwards are no longer executed: Ray then puts another replica in the place of this one."""
        await asyncio.to_thread(self._engine.check)

    def __del__(self) -> None:
        """Ray has waited for requests to end before it calls this."""
        if hasattr(self, "_engine"):
            self._engine.drain(0)


def _loaded(arguments: Arguments) -> tuple[Service, Engine]:
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    more = {} if arguments.base_model is None else {"base_model": arguments.base_model}
    model, tokenizer = load(arguments.model, dtype=dtype, **more)
    model = model.to("cuda" if arguments.gpus else "cpu")
    runner = runner_for(model, arguments.engine, arguments.weights)
    engine = Engine(model, arguments.slots, arguments.context, arguments.waiting, runner=runner)
    return Service(model, tokenizer, arguments.model), engine
