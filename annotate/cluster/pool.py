"""The driver's half of the job: schedules shards on teacher actors and tolerates their failures."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions as rx
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...dataset.sources.image_source import Entry
from ...errors import JobError, StorageError, TokenLabelError, output_error
from ..plan import Identity, Plan
from ..report import Progress, Tally
from .actor import SHARDS_AT_ONCE, remote_actor
from .session import Resources, alive_nodes, teacher_slots

_log = logging.getLogger(__name__)
#: Failed starts in a row, of any actors, after which the job gives up.
_STARTS = 3
_POLL_SECONDS = 0.5
#: How often the cluster's nodes are listed.
_LIST_SECONDS = 1.0
#: After this, all other nodes know a node that has joined, and Ray can place actors on it.
_SETTLE_SECONDS = 3.0
_LAST_PROGRESS_SECONDS = 5.0
#: After this, a job without any node gives up, and one without a teacher says what it waits for.
_PATIENCE_SECONDS = 60


@dataclass(eq=False)
class _Actor:
    handle: Any
    starting: Any  # the call of ready(), None once it has returned
    node: str | None = None  # where it was placed; None if Ray chose
    shards: dict[Any, int] = field(default_factory=dict)  # by call
    progress: Any = None  # a pending call
    last: Progress | None = None  # its last answer, by this process's clock
    lag: float = float("inf")  # upper bound of this process's clock minus the actor's


#: An attempt at a shard: its number, its sha256 or why it failed, and whether its actor died.
_Ended = tuple[int, str | Exception, bool]


class Pool:
    """Teacher actors that are replaced when they die; leaving the context kills them all.

    Args:
        arguments: of the actors: config, image source, threads.
        resources: how many actors, with what.
    """

    def __init__(self, arguments: tuple[Any, ...], resources: Resources) -> None:
        self._class = remote_actor(resources.gpus)
        self._arguments, self._resources = arguments, resources
        self._actors: list[_Actor] = []
        # How many actors to run, and the cluster's slots when it was last listed.
        self._teachers = self._slots = resources.teachers
        # When each living node was first seen.
        self._nodes = dict.fromkeys((node["NodeID"] for node in alive_nodes()), float("-inf"))
        self._failed_starts = 0
        self._identity: Identity | None = None
        self._dead: list[Progress] = []  # last progress of actors that died
        self._node_seen = time.monotonic()
        self._listed = self._counted = float("-inf")
        self._lost = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()

    def identify(self, wanted: int) -> Identity:
        """Start up to `wanted` actors, wait for the first, and return how it describes its teacher.

        Raises:
            TokenLabelError: the teacher cannot be built; the actor's own error.
        """
        patience = time.monotonic() + _PATIENCE_SECONDS
        while self._identity is None:
            self._start(wanted)
            self._wait()
            if time.monotonic() > patience:
                patience = float("inf")
                _log.warning(
                    "no teacher is ready yet: waiting for weights to download, or for a node with "
                    "%g free GPUs",
                    self._resources.gpus,
                )
        return self._identity

    def answers(self, entries: list[Entry]) -> list[int]:
        """The class that a teacher finds most probable for each image; -1 where it says none.

        Raises:
            TokenLabelError: the actor's own error.
        """
        actor = next(actor for actor in self._actors if actor.starting is None)
        try:
            found: list[int] = ray.get(actor.handle.answers.remote(entries))
        except rx.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except rx.RayError:  # it has died: `run` replaces it
            return [-1] * len(entries)
        return found

    def run(
        self,
        plan: Plan,
        todo: Sequence[int],
        retries: int,
        tally: Tally,
        report: Callable[[Tally], None] = lambda _: None,
    ) -> None:
        """Make the shards `todo`, in order; returns when each is written or has failed for good.

        A shard whose actor died is a suspect: it is retried alone on an actor, after all others,
        so that a shard that kills its actor does not fail its neighbours.

        Args:
            plan: of the run.
            todo: numbers of shards.
            retries: further attempts per shard.
            tally: updated while it runs, and valid after an exception too.
            report: called some times a second.

        Raises:
            OutputError: the folder cannot be written to any more.
            JobError: no actor can be started.
        """
        attempts = dict.fromkeys(todo, 0)
        queue, suspects = deque(todo), deque[int]()
        while left := len(queue) + len(suspects) + sum(len(actor.shards) for actor in self._actors):
            self._start(left)
            for actor in self._actors:
                while actor.starting is None:
                    if queue and len(actor.shards) < SHARDS_AT_ONCE:
                        shard = queue.popleft()
                    elif suspects and not queue and not actor.shards:
                        shard = suspects.popleft()
                    else:
                        break
                    actor.shards[actor.handle.annotate.remote(plan, shard)] = shard
            for shard, outcome, died in self._wait():
                if isinstance(outcome, str):
                    tally.written[shard] = outcome
                    continue
                attempts[shard] += 1
                if attempts[shard] > retries:
                    tally.failed[shard] = _text(outcome)
                    _log.error("shard %d failed for good: %s", shard, _text(outcome))
                else:
                    _log.warning("retrying shard %d: %s", shard, _text(outcome))
                    (suspects if died else queue).append(shard)
            if time.monotonic() - self._counted >= _POLL_SECONDS:
                self._count(tally)
                report(tally)
        self._count(tally, wait=_LAST_PROGRESS_SECONDS)
        report(tally)

    def _start(self, wanted: int) -> None:
        while len(self._actors) < min(self._teachers, wanted):
            # Actors with GPUs go where GPUs are free. Those without would all fit on one node, so
            # each is sent to the node that has the fewest.
            node: str | None = None
            if self._nodes and not self._resources.gpus:
                used = Counter(actor.node for actor in self._actors)
                node = min(self._nodes, key=lambda node: used[node])
            where = NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD"
            handle = self._class.options(scheduling_strategy=where).remote(*self._arguments)
            self._actors.append(_Actor(handle, handle.ready.remote(), node))

    def _wait(self) -> list[_Ended]:
        """Wait a moment for a call to end; the attempts at shards that have ended."""
        self._list_nodes()
        calls = {call: actor for actor in self._actors for call in actor.shards}
        calls |= {actor.starting: actor for actor in self._actors if actor.starting is not None}
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_SECONDS)
        ended: list[_Ended] = []
        for call in ready:
            actor = calls[call]
            try:
                result = ray.get(call)
            except rx.RayTaskError as error:  # raised by our code in the actor, which lives on
                cause = error.cause if isinstance(error.cause, Exception) else error
                if isinstance(cause, TokenLabelError) and not isinstance(cause, StorageError):
                    raise cause from None  # a retry would meet it again
                if fatal := output_error(cause):
                    raise fatal from cause
                if call is actor.starting:
                    ended += self._on_death(actor, cause)
                else:
                    ended.append((actor.shards.pop(call), cause, False))
            except rx.RayError as error:
                ended += self._on_death(actor, error)
            else:
                if call is actor.starting:
                    self._on_ready(actor, result)
                else:
                    ended.append((actor.shards.pop(call), result, False))
        return ended

    def _list_nodes(self) -> None:
        """Follow the number of nodes, and give up when none is left: Ray would wait for ever."""
        now = time.monotonic()
        if now - self._listed < _LIST_SECONDS:
            return
        self._listed = now
        if nodes := alive_nodes():
            self._node_seen = now
            self._nodes = {node["NodeID"]: self._nodes.get(node["NodeID"], now) for node in nodes}
            settled = [n for n in nodes if now - self._nodes[n["NodeID"]] >= _SETTLE_SECONDS]
            self._resize(teacher_slots(settled, self._resources.gpus))
        elif now - self._node_seen > _PATIENCE_SECONDS:
            raise JobError(
                "the cluster has no node left. Finished shards are kept. Remedy: bring it back and "
                "run the same command again"
            )

    def _resize(self, slots: int) -> None:
        """Run one more actor for each slot that was added, and none for slots that have gone.

        Counts the change, not the slots: where no teacher would start, none is tried for ever.
        """
        if self._resources.fixed:
            return
        if slots > self._slots:
            self._teachers = min(self._teachers + slots - self._slots, slots)
            _log.info("the cluster has grown: %d teachers now", self._teachers)
        else:
            self._teachers = min(self._teachers, max(slots, 1))
        self._slots = slots

    def _on_ready(self, actor: _Actor, identity: Identity) -> None:
        actor.starting, self._failed_starts = None, 0
        if self._identity is None:
            self._identity = identity
        elif identity.weights_digest != self._identity.weights_digest:
            raise JobError(
                f"two teachers have different weights: {identity.weights_digest} and "
                f"{self._identity.weights_digest}. Remedy: give every node the same checkpoint"
            )
        elif identity.device != self._identity.device:
            notes = " ".join((*self._identity.notes, *identity.notes))
            raise JobError(
                "all teachers must compute on the same device, or scores differ in their last "
                f"bits; one has {self._identity.device}, one {identity.device}. {notes}"
            )

    def _on_death(self, actor: _Actor, error: Exception) -> list[_Ended]:
        """Forget an actor that died or did not start; its attempts, which have failed."""
        self._actors.remove(actor)
        ray.kill(actor.handle)
        if actor.last:
            self._dead.append(actor.last)
        if actor.starting is None:
            self._lost += 1
            return [(shard, error, True) for shard in actor.shards.values()]
        self._failed_starts += 1
        if self._failed_starts >= _STARTS:
            if not any(other.starting is None for other in self._actors):
                raise JobError(
                    f"no teacher could be started in {_STARTS} attempts: {_text(error)}. Finished "
                    "shards are kept. Remedy: fix the cause and run the same command again"
                ) from error
            # A node without working GPUs, say.
            self._failed_starts = 0
            self._teachers = len(self._actors)
            _log.warning("continuing with %d teachers: %s", self._teachers, _text(error))
        return []

    def _count(self, tally: Tally, wait: float = 0) -> None:
        """Update the tally with the progress that has arrived, or arrives within `wait` seconds."""
        self._counted = time.monotonic()
        ready = [actor for actor in self._actors if actor.starting is None]
        for actor in ready:
            # A pending call may have been answered before the last batch: with `wait`, ask again.
            if wait or actor.progress is None:
                actor.progress = actor.handle.progress.remote()
        calls = {actor.progress: actor for actor in ready}
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=wait)[0] if calls else ():
            actor = calls[call]
            actor.progress = None
            with suppress(rx.RayError):  # the calls for its shards report the death
                last: Progress = ray.get(call)
                # Monotonic clocks of two machines differ by a constant, of which each answer gives
                # an upper bound: it was on its way for some time.
                actor.lag = min(actor.lag, time.monotonic() - last.now)
                actor.last = last._replace(
                    since=last.since + actor.lag, until=last.until + actor.lag
                )
        seen = [*self._dead, *(actor.last for actor in ready if actor.last)]
        seen = [last for last in seen if last.images]
        tally.images = sum(last.images for last in seen)
        tally.errors = sum(last.errors for last in seen)
        tally.busy = sum(last.busy for last in seen)
        tally.span = sum(last.until - last.since for last in seen)
        wall = max((x.until for x in seen), default=0) - min((x.since for x in seen), default=0)
        tally.rate = tally.images / wall if wall > 0 else None
        tally.teachers, tally.lost_actors = len(ready), self._lost


def _text(error: Exception) -> str:
    """An error in one line, without Ray's traceback; why an actor died stands last there."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if isinstance(error, rx.RayActorError) else lines[0]
    return f"{type(error).__name__}: {line}".rstrip(": ")
