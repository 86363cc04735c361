"""Applies a method to many items in several processes of one thread each.

The bundled model has many short steps, so two threads of one process gain little, while two processes take half the
time.
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
    """``work(item)`` for every item, in their order; the first error ends the run.

    Args:
        work: a module-level function.
        items: its arguments.
        processes: number of processes; 1 works in this process, with all its threads.
        start: called once with `args` at the start of every process.
        args: arguments of `start`.
        on_result: called in this process with every item and its result, as they finish.
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
        # Set in the parent, because a process reads it when it first loads torch.
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
