"""A method applied to many items by several processes of one thread each.

The bundled model is so small that two threads of one process gain little over one (its steps are many and short),
while two processes share nothing and gain twofold.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    processes: int,
    start: Callable[..., None],
    args: Any = (),
    on_result: Callable[[Item, Result], None] = lambda item, result: None,
) -> list[Result]:
    """``work(item)`` of every item, in their order; the first error ends it all.

    Args:
        work: a function of a module.
        items: what it is called with.
        processes: how many there are; 1 works in this one, with all its threads.
        start: called with `args` once in every process, before anything else.
        args: what it needs.
        on_result: called here with every item and its result, as they come.
    """
    bar = tqdm(total=len(items), unit="item", disable=None)
    results: dict[int, Result] = {}

    def take(number: int, result: Result) -> None:
        results[number] = result
        on_result(items[number], result)
        bar.update()

    if processes == 1:
        start(*args)
        for number, item in enumerate(items):
            take(number, work(item))
    else:
        before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
        # Read when a process first loads torch, so set here and not in it.
        os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
        try:
            with ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(start, args)
            ) as pool:
                waiting = {pool.submit(work, item): number for number, item in enumerate(items)}
                try:
                    for done in as_completed(waiting):
                        take(waiting[done], done.result())
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    bar.close()
    return [results[number] for number in range(len(items))]


def _begin(start: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    start(*args)
