"""Large prompt sets on a Ray cluster: batches go through Ray Data to actors that keep the models loaded.

The actors only compute; this process alone writes, and knows what is written by its key. A batch of an actor that dies
is done again by another, and is in the results once whatever happened to the first try.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from typing import Any

from ..errors import require
from .plan import Plan
from .runner import Worker, save
from .store import Store

_MOST_BLOCKS = 20_000  # beyond that Ray's own bookkeeping is felt


class Actor:
    """What Ray Data makes one of for every actor: a worker and the plan.

    Args:
        plan: the plan, pickled.
    """

    def __init__(self, plan: bytes) -> None:
        self._plan: Plan = pickle.loads(plan)
        self._worker = Worker(self._plan.config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        # JSON, not columns: the lines of different streams have different fields.
        return {"lines": json.dumps(self._worker.run(self._plan.batches[int(row["place"])]))}


def run_on_ray(
    plan: Plan, places: Sequence[int], store: Store, done: set[str], *, actors: int, progress: bool = True
) -> None:
    """Run batches on Ray actors and append what they give, as it comes.

    A running cluster is joined where RAY_ADDRESS or `ray start` says so; otherwise one is started on this machine.

    Args:
        plan: whose batches.
        places: which of them.
        store: where lines go.
        done: keys of samples that are there already.
        actors: how many; each takes one GPU unless the configuration's device is cpu or there is none.
        progress: a bar on standard error, where it is a terminal.

    Raises:
        UsageError: without Ray.
    """
    require("ray.data", "--ray", "ray")
    import ray
    from tqdm import tqdm

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # One batch a block, and so a task: what a dead actor takes with it is the batch it was at.
        blocks = min(len(places), _MOST_BLOCKS)
        dataset = ray.data.from_items([{"place": place} for place in places], override_num_blocks=blocks)
        on_gpu = plan.config.device != "cpu" and plan.config.model != "tiny" and ray.cluster_resources().get("GPU", 0)
        results = dataset.map(
            Actor,
            fn_constructor_args=(pickle.dumps(plan),),
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(places))),
            **({"num_gpus": 1} if on_gpu else {"num_cpus": 1}),
        )
        with tqdm(total=len(places), unit="batch", disable=None if progress else True) as bar:
            for row in results.iter_rows():
                lines = json.loads(row["lines"])
                save(store, lines, done, 0)
                done.update(line["key"] for line in lines["samples"])
                bar.update()
    finally:
        if started:
            ray.shutdown()
