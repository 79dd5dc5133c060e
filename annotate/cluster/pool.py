"""The driver's half of the job: hands shards to teacher actors and outlives their deaths."""

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

from ...errors import JobError, StorageError, TokenLabelError, output_error
from ..plan import Identity, Plan
from .actor import SHARDS_AT_ONCE, remote_actor
from .session import Resources, alive_nodes, places

_log = logging.getLogger(__name__)
#: Times in a row that no actor gets ready before the job gives up.
_STARTS = 3
_POLL_SECONDS = 0.5
#: How often the cluster's nodes are looked at.
_LOOK_SECONDS = 1.0
#: After this, other nodes know of one that has joined, and put there what belongs there.
_SETTLE_SECONDS = 3.0
_LAST_WORD_SECONDS = 5.0
#: After this a job gives up on a cluster without nodes, and says that it waits for a teacher.
_PATIENCE_SECONDS = 60


@dataclass(eq=False)
class _Actor:
    handle: Any
    starting: Any  # the call of ready(), None once it has come back
    node: str | None = None  # where it was put; None where Ray chose
    shards: dict[Any, int] = field(default_factory=dict)
    progress: Any = None  # a pending call
    last: Any = None  # the Progress it returned last, by this process's clock
    lag: float = float("inf")  # of the actor's monotonic clock behind this process's, at most


@dataclass
class Tally:
    """What a run did: filled while it goes on."""

    images: int = 0
    errors: int = 0
    busy: float = 0.0  # seconds the teachers computed
    span: float = 0.0  # seconds from each teacher's first batch to its last, added up
    rate: float | None = None  # images a second, from the first batch to the last
    teachers: int = 0
    written: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    lost_actors: int = 0


class Pool:
    """Teacher actors that are replaced when they die.

    A context manager: leaving it kills the actors.

    Args:
        arguments: of the actors: config, image source, threads.
        resources: how many actors, with what.
    """

    def __init__(self, arguments: tuple[Any, ...], resources: Resources) -> None:
        self._class = remote_actor(resources.gpus)
        self._arguments, self._resources = arguments, resources
        self._actors: list[_Actor] = []
        # How many actors to have, and how many places the cluster had when it was looked at last.
        self._teachers = self._places = resources.teachers
        # Of each living node, when it was first seen.
        self._nodes = dict.fromkeys(map(_node_id, alive_nodes()), float("-inf"))
        self._bad_starts = 0
        self._identity: Identity | None = None
        self._gone: list[Any] = []  # last progress of actors that died
        self._alive = time.monotonic()  # when a node was last seen
        self._looked = self._counted = float("-inf")  # when nodes and actors were last asked
        self._lost = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)
        self._actors.clear()

    def identify(self, wanted: int) -> Identity:
        """Start up to `wanted` actors and wait for the first; what it says of its teacher.

        Raises:
            TokenLabelError: the teacher cannot be built; the real cause.
        """
        self._start(wanted)
        patience = time.monotonic() + _PATIENCE_SECONDS
        while self._identity is None:
            self._wait()
            self._start(wanted)
            if time.monotonic() > patience:
                patience = float("inf")
                _log.warning(
                    "no teacher is ready yet: waiting for weights to download, or for a node with "
                    "%g free GPUs",
                    self._resources.gpus,
                )
        return self._identity

    def run(
        self,
        plan: Plan,
        todo: Sequence[int],
        retries: int,
        report: Callable[[Tally], None] = lambda _: None,
    ) -> Tally:
        """Make the shards `todo`, in order; returns when each is written or has failed.

        A shard whose actor died is a suspect: it is tried again alone on an actor, when the
        others are done, so that one that kills its actor does not fail its neighbours.

        Raises:
            OutputError: the folder cannot be written to any more.
            JobError: no actor can be had.
        """
        tally, attempts = Tally(), dict.fromkeys(todo, 0)
        queue, suspects = deque(todo), deque[int]()
        while queue or suspects or any(actor.shards for actor in self._actors):
            left = len(queue) + len(suspects) + sum(len(actor.shards) for actor in self._actors)
            self._start(left)
            self._feed(plan, queue, suspects)
            for shard, outcome, died in self._wait():
                if outcome is None:
                    tally.written.append(shard)
                    continue
                attempts[shard] += 1
                if attempts[shard] > retries:
                    tally.failed[shard] = _text(outcome)
                    _log.error("shard %d failed for good: %s", shard, _text(outcome))
                else:
                    _log.warning("shard %d is tried again: %s", shard, _text(outcome))
                    (suspects if died else queue).append(shard)
            if time.monotonic() - self._counted >= _POLL_SECONDS:
                self._count(tally)
                report(tally)
        self._count(tally, wait=_LAST_WORD_SECONDS)
        report(tally)
        return tally

    def _start(self, wanted: int) -> None:
        while len(self._actors) < min(self._teachers, wanted):
            node = self._emptiest_node()
            where = NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD"
            handle = self._class.options(scheduling_strategy=where).remote(*self._arguments)
            self._actors.append(_Actor(handle, handle.ready.remote(), node))

    def _emptiest_node(self) -> str | None:
        """The node with the fewest actors; None with GPUs, whose number tells Ray enough."""
        if self._resources.gpus or not self._nodes:
            return None
        used = Counter(actor.node for actor in self._actors)
        return min(self._nodes, key=lambda node: used[node])

    def _feed(self, plan: Plan, queue: deque[int], suspects: deque[int]) -> None:
        for actor in self._actors:
            if actor.starting is not None:
                continue
            while queue and len(actor.shards) < SHARDS_AT_ONCE:
                self._give(actor, plan, queue.popleft())
            if suspects and not queue and not actor.shards:
                self._give(actor, plan, suspects.popleft())

    def _give(self, actor: _Actor, plan: Plan, shard: int) -> None:
        actor.shards[actor.handle.annotate.remote(plan, shard)] = shard

    def _wait(self) -> list[tuple[int, Exception | None, bool]]:
        """Wait a moment; (shard, error or None, whether its actor died) of what has ended."""
        calls = {call: actor for actor in self._actors for call in actor.shards}
        calls |= {actor.starting: actor for actor in self._actors if actor.starting is not None}
        self._watch()
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_SECONDS)
        ended: list[tuple[int, Exception | None, bool]] = []
        for call in ready:
            actor = calls[call]
            try:
                result = ray.get(call)
            except rx.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                self._refuse_fatal(cause)
                if call is actor.starting:
                    self._lose(actor, cause, ended)
                else:
                    ended.append((actor.shards.pop(call), cause, False))
            except rx.RayError as error:
                self._lose(actor, error, ended)
            else:
                if call is actor.starting:
                    self._welcome(actor, result)
                else:
                    ended.append((actor.shards.pop(call), None, False))
        return ended

    def _watch(self) -> None:
        """Look at the nodes: follow their number, and give up when none is left.

        Ray itself would wait for ever on a cluster without nodes.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if nodes := alive_nodes():
            self._alive = now
            self._nodes = {node: self._nodes.get(node, now) for node in map(_node_id, nodes)}
            settled = [n for n in nodes if now - self._nodes[_node_id(n)] >= _SETTLE_SECONDS]
            self._follow(places(settled, self._resources.gpus))
        elif now - self._alive > _PATIENCE_SECONDS:
            raise JobError(
                "the cluster has no node left. Finished shards are kept. Remedy: bring it back and "
                "run the same command again"
            )

    def _follow(self, now: int) -> None:
        """Have an actor more for each place that has been added, and none for places that went.

        Counted from the change, so that a place where no teacher would start is not tried for ever.
        """
        if self._resources.fixed:
            return
        if now > self._places:
            self._teachers = min(self._teachers + now - self._places, now)
            _log.info("the cluster has grown: %d teachers now", self._teachers)
        else:
            self._teachers = min(self._teachers, max(now, 1))
        self._places = now

    def _welcome(self, actor: _Actor, identity: Identity) -> None:
        actor.starting, self._bad_starts = None, 0
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
                f"all teachers must compute on the same device, or scores differ in their last "
                f"bits; one has {self._identity.device}, one {identity.device}. {notes}"
            )

    def _lose(
        self, actor: _Actor, error: Exception, ended: list[tuple[int, Exception | None, bool]]
    ) -> None:
        """Forget a dead actor; its shards are to be made by others."""
        self._actors.remove(actor)
        ray.kill(actor.handle)
        if actor.last:
            self._gone.append(actor.last)
        ended += [(shard, error, True) for shard in actor.shards.values()]
        if actor.starting is None:
            self._lost += 1
            return
        self._bad_starts += 1
        if self._bad_starts >= _STARTS and any(other.starting is None for other in self._actors):
            # A node without working GPUs, say: the others go on without it.
            self._bad_starts = 0
            self._teachers = len(self._actors)
            _log.warning("going on with %d teachers: %s", self._teachers, _text(error))
        elif self._bad_starts >= _STARTS:
            raise JobError(
                f"no teacher could be started in {_STARTS} tries: {_text(error)}. Finished shards "
                "are kept. Remedy: mend the cause and run the same command again"
            ) from error

    def _refuse_fatal(self, cause: Exception) -> None:
        """Raise what no other try would mend."""
        if isinstance(cause, TokenLabelError) and not isinstance(cause, StorageError):
            raise cause
        if fatal := output_error(cause):
            raise fatal from cause

    def _count(self, tally: Tally, wait: float = 0) -> None:
        """Bring the tally up to date; without `wait` (seconds), with what has arrived."""
        self._counted = time.monotonic()
        if wait:  # what is under way may have been asked before the last batch
            for actor in self._actors:
                actor.progress = None
        for actor in self._actors:
            if actor.progress is None and actor.starting is None:
                actor.progress = actor.handle.progress.remote()
        pending = {actor.progress: actor for actor in self._actors if actor.progress is not None}
        if pending:
            for call in ray.wait(list(pending), num_returns=len(pending), timeout=wait)[0]:
                with suppress(rx.RayError):  # its shards' calls tell of the death
                    _note(pending[call], ray.get(call))
                pending[call].progress = None
        seen = [*self._gone, *(actor.last for actor in self._actors if actor.last)]
        seen = [last for last in seen if last.images]
        tally.images = sum(last.images for last in seen)
        tally.errors = sum(last.errors for last in seen)
        tally.busy = sum(last.busy for last in seen)
        tally.span = sum(last.until - last.since for last in seen)
        wall = max((x.until for x in seen), default=0) - min((x.since for x in seen), default=0)
        tally.rate = tally.images / wall if wall > 0 else None
        tally.teachers = sum(actor.starting is None for actor in self._actors)
        tally.lost_actors = self._lost


def _note(actor: _Actor, progress: Any) -> None:
    """Keep what an actor tells. Clocks of the wall differ and jump; monotonic ones only differ."""
    actor.lag = min(actor.lag, time.monotonic() - progress.now)
    since, until = (when + actor.lag for when in (progress.since, progress.until))
    actor.last = progress._replace(since=since, until=until)


def _node_id(node: dict[str, Any]) -> str:
    return str(node["NodeID"])


def _text(error: Exception) -> str:
    """The first line of an error, without Ray's traceback."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
