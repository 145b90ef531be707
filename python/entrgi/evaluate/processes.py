"""Running a plan: in this process, as one of several under torchrun or accelerate, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError, require, telling
from .config import EvaluationConfig
from .judging import order as judgement_order
from .judging import pending, run_judges
from .plan import Plan
from .prompts import check_templates
from .runner import Worker, run_batches
from .specs import TINY
from .store import Store

T = TypeVar("T")


class Alone:
    """The group of one process."""

    rank, size, device = 0, 1, None

    def share(self, make: Callable[[], T]) -> T:
        """What the first process makes of it, in every process; its UsageError too."""
        return make()

    def wait(self) -> None:
        """Until every process is here."""

    def leave(self) -> None:
        """The group is no longer needed."""


class Launched(Alone):
    """This process among those that torchrun or `accelerate launch` started.

    Only plans and small facts go between them; samples go to files.

    Args:
        cpu: leave accelerators alone.
    """

    def __init__(self, cpu: bool) -> None:
        accelerate = require("accelerate", "running several processes", "evaluate")
        # Whoever is done waits for the slowest: much longer than the half hour that a collective is given by default.
        self._state = accelerate.PartialState(cpu=cpu, timeout=datetime.timedelta(days=30))
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device = str(self._state.device)

    def share(self, make: Callable[[], T]) -> T:
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except UsageError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def leave(self) -> None:
        self._state.destroy_process_group()


def group_of(config: EvaluationConfig) -> Alone:
    """The processes that were launched together with this one."""
    cpu = config.device == "cpu" or (config.device == "auto" and config.model == TINY)
    return Launched(cpu) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()


def evaluate(
    plan: Plan, folder: Path, *, extend: bool = False, progress: bool = True, ray_actors: int | None = None
) -> bool:
    """Do what is missing of a plan and merge the results.

    Args:
        plan: of the evaluation.
        folder: where its results are or will be; for several machines one that they share.
        extend: accept results of another configuration there.
        progress: a bar on standard error, where it is a terminal.
        ray_actors: run the batches on so many actors of a Ray cluster.

    Returns:
        Whether this process is the one to report: the first of its group.

    Raises:
        UsageError: the folder holds something else, or cannot be written; models that cannot be loaded.
    """
    store = Store(folder)
    group = group_of(plan.config)
    if ray_actors and group.size > 1:
        raise UsageError("--ray has processes of its own: start it without torchrun or accelerate launch")
    with contextlib.ExitStack() as stack:
        stack.callback(group.leave)

        def start() -> tuple[list[int], set[str]]:
            stack.enter_context(store.lock())
            if plan.todo(store):
                check_templates(plan.config, plan.prompts)  # before the folder remembers these prompts
            store.begin(plan.header(), extend=extend)
            store.recover()
            done = store.keys("samples")
            todo = plan.todo(store)
            _warn_of_losses(plan, store, todo, done)
            partly = done & {key for place in todo for key in plan.batches[place].sample_keys()}
            return todo, partly

        todo, partly = group.share(start)
        stack.callback(store.close)
        if group.rank == 0 and len(todo) < len(plan.batches):
            print(f"{len(plan.batches) - len(todo)} of {len(plan.batches)} batches were already done", file=sys.stderr)
        worker = Worker(plan.config, group.device)
        with telling(lambda: f"finished batches are kept in {folder}: the same command goes on"):
            if ray_actors and todo:
                from .ray_data import run_on_ray

                run_on_ray(plan, todo, store, partly, actors=ray_actors, progress=progress)
            elif todo:
                _run_own(plan, todo[group.rank :: group.size], worker, store, partly, group, progress)
            group.wait()

            def generated() -> tuple[int, set[str]]:
                lost = plan.todo(store)
                if lost:
                    raise UsageError(f"{len(lost)} batches are not in {folder}: do all machines share that folder?")
                return len(pending(plan, store)), store.keys("judgements")

            unjudged, judged = group.share(generated)
            if unjudged:
                mine = pending(plan, store)[group.rank :: group.size]
                group.wait()  # all have read what there is before one of them adds to it
                run_judges(mine, plan, worker, store, judged, writer=group.rank, progress=progress and group.rank == 0)
            group.wait()
        group.share(lambda: store.finish({**plan.order(), "judgements": judgement_order(plan, store)}))
    return group.rank == 0


def _warn_of_losses(plan: Plan, store: Store, todo: list[int], done: set[str]) -> None:
    """A batch's samples are written last: times or traces that are missing beside them were removed."""
    whole = [place for place in todo if done.issuperset(plan.batches[place].sample_keys())]
    if whole:
        print(
            f"{store.folder}: batches.jsonl or traces.jsonl lacks lines of {len(whole)} finished batches: they are run "
            "again, their samples stay",
            file=sys.stderr,
        )


def _run_own(
    plan: Plan, mine: list[int], worker: Worker, store: Store, done: set[str], group: Alone, progress: bool
) -> None:
    from tqdm import tqdm

    total = sum(len(plan.batches[place].items) for place in mine)
    with tqdm(total=total, unit="prompt", disable=None if progress and group.rank == 0 else True) as bar:
        run_batches(
            plan, mine, worker, store, done, writer=group.rank, on_batch=lambda batch: bar.update(len(batch.items))
        )
