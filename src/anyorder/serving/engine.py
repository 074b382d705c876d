"""Requests at work on one model: who comes next, how many at a time, and when one has to go.

What a request does is a function that is given a runner; the runner joins its forwards with those of the others
(`joining`). A request whose client has gone, or whose time is over, ends before its next forward, and its slot is free.

This module knows no text, no protocol and no policy.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch

from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.runtime.runner import EagerRunner, ModelRunner
from anyorder.serving.joining import JoinedRunner, Joiner
from anyorder.serving.slots import Prefixes, Slots

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TooBusyError(Exception):
    """No more requests are taken now."""


class UnwantedError(Exception):
    """The request was cancelled, or its time is over."""


class TimeIsOverError(UnwantedError):
    """The time that the request had is over."""


class Ticket(Generic[T]):
    """A request that was taken.

    Attributes:
        future: its result, or `UnwantedError`, or what its work raised.
        submitted, started: `time.monotonic()`; started is None while it waits.
    """

    def __init__(self, work: Callable[[JoinedRunner], T], client: str, seconds: float | None):
        self.work, self.client = work, client
        self.future: Future[T] = Future()
        self.submitted = time.monotonic()
        self.started: float | None = None
        self._deadline = None if seconds is None else self.submitted + seconds
        self._cancelled = False

    def cancel(self) -> None:
        """It ends before its next forward."""
        self._cancelled = True

    def check(self) -> None:
        """Raise if it is no longer wanted."""
        if self._cancelled:
            raise UnwantedError("the request was cancelled")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TimeIsOverError("the time that the request had is over")


class Engine:
    """Many requests on one model. Forwards are executed by `run`, or by a thread that `start` makes for it.

    Args:
        model: a converted model.
        slots: requests at work at a time.
        capacity: tokens of a request at most, given ones included; at most the model's context.
        waiting: requests that may wait.
        prefix_tokens: of starts of texts that are kept encoded.
        runner: executes the forwards; default: eager PyTorch.

    Raises:
        ValueError: naming a size that cannot be meant.
    """

    def __init__(
        self,
        model: AnyOrderForCausalLM,
        slots: int = 8,
        capacity: int = 2048,
        waiting: int = 256,
        prefix_tokens: int = 16384,
        runner: ModelRunner | None = None,
    ):
        for name, value in (("slots", slots), ("capacity", capacity), ("waiting", waiting)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model = model.eval()
        limit = context_length(model.causal_lm.config)
        self.capacity = capacity if limit is None else min(capacity, limit)
        runner = runner or EagerRunner(model)
        room = Slots(slots, runner.capacity(self.capacity), runner.follows_buffers)
        self.joiner = Joiner(runner, room, self.capacity)
        self.prefixes = Prefixes(prefix_tokens)
        self.finished = 0
        self._waiting = waiting
        self._queues: OrderedDict[str, deque[Ticket[Any]]] = OrderedDict()
        self._at_work: list[Ticket[Any] | None] = [None] * slots
        self._changed = threading.Condition()
        self._draining = False
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Execute forwards in this thread, until `drain` is through."""
        self.joiner.run()

    def start(self) -> Engine:
        """Execute them in a thread of its own, which is somewhat slower: see `joining.Joiner.run`."""
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()
        atexit.register(self.drain, 0)  # a thread that is at work when the interpreter ends aborts it
        return self

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.run()

    @property
    def at_work(self) -> int:
        """Requests that have a slot."""
        return sum(ticket is not None for ticket in self._at_work)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return sum(map(len, self._queues.values()))

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._draining

    def check(self) -> None:
        """Wait for the forwards that have begun; raise if none are executed any more, or the device has failed."""
        if self._draining:
            return  # it ends what it has, and is not to be replaced for that
        device = self.model.device
        self.joiner.call("function", None, lambda: float(torch.zeros(1, device=device).sum()))

    def submit(self, work: Callable[[JoinedRunner], T], client: str = "", seconds: float | None = None) -> Ticket[T]:
        """Have a request done.

        Args:
            work: what it does, in a thread of its own, with a runner for a batch of one row.
            client: whose it is: those that wait take turns by client.
            seconds: that it may take, waiting included; None: any number.

        Raises:
            TooBusyError: if too many wait already, or the engine is being shut down.
        """
        ticket = Ticket(work, client, seconds)
        with self._changed:
            if self._draining:
                raise TooBusyError("the server is shutting down")
            if self.queued >= self._waiting:
                raise TooBusyError(f"{self._waiting} requests are waiting already: try again later")
            self._queues.setdefault(client, deque()).append(ticket)
            self._fill()
        return ticket

    def _fill(self) -> None:
        """Give the first free slots to those that wait: forwards go over all slots up to the last that is taken."""
        while self._queues and None in self._at_work:
            client, queue = self._queues.popitem(last=False)
            ticket = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the other clients
            slot = self._at_work.index(None)
            self._at_work[slot] = ticket
            self.joiner.enter(slot)  # before its thread runs: those at work wait for it
            threading.Thread(target=self._work, args=(ticket, slot), name=f"anyorder-slot-{slot}", daemon=True).start()

    def _work(self, ticket: Ticket[Any], slot: int) -> None:
        torch.set_num_threads(
            1
        )  # of this thread: what it draws is small, and idle helpers would take the forwards' cores
        ticket.started = time.monotonic()
        result, error = None, None
        try:
            ticket.check()
            result = ticket.work(JoinedRunner(self.joiner, slot, self.prefixes, ticket.check))
        except BaseException as raised:
            error = raised
        self.joiner.leave(slot)
        with self._changed:
            self._at_work[slot] = None
            self.finished += 1
            self._fill()
            self._changed.notify_all()
        if error is None:
            ticket.future.set_result(result)
        else:
            ticket.future.set_exception(error)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and let those that were taken end; after so many seconds they are cancelled."""
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not self.at_work and not self._queues, seconds)
            if not done:
                left = [ticket for ticket in self._at_work if ticket is not None]
                left += [ticket for queue in self._queues.values() for ticket in queue]
                logger.warning("%d requests did not end within %g s and are cancelled", len(left), seconds)
                for ticket in left:
                    ticket.cancel()
                self._changed.wait_for(lambda: not self.at_work and not self._queues)
        self.joiner.close()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.drain)
