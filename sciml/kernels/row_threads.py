"""Share the rows of an array among threads.

Two ways to use several cores on K(X, Y): one matrix product after the other, each with all
threads, or tiles of rows side by side, each with one. Epilogues between the products make the
first way slow, since the threads of a BLAS go on waiting, at full speed, for the next product.

Threads come from a pool of Python's: compiled functions and BLAS release the GIL, and unlike the
threading layers of Numba the pool can be entered by two threads at once, and be forked.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise

from numba import config
from threadpoolctl import ThreadpoolController

__all__ = ["N_THREADS", "over_rows", "over_tiles"]

N_THREADS: int = vars(config)["NUMBA_NUM_THREADS"]  # environment variable, or number of cores
_pool: ThreadPoolExecutor | None = None
_lane = threading.local()  # whether this thread works on a tile already
# Held while tiles run side by side: two that limit BLAS and restore it in turn would leave it
# limited, each taking the limit of the other for the normal state.
_turn = threading.Lock()


def _forget_threads() -> None:
    global _pool, _turn
    _pool, _turn = None, threading.Lock()


# Threads do not survive a fork: the child starts its own pool.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def over_rows(function: Callable[[int, int], None], n_rows: int, cost: int) -> None:
    """Call ``function(first, last)`` on ranges of rows, one for each thread.

    Parameters
    ----------
    function : callable
        Compiled, without the GIL.
    n_rows : int
        Number of rows.
    cost : int
        Entries that all rows have together. Handing a range to a thread costs about 30
        microseconds, 10^4 entries of the cheapest pass: a few rows stay in the calling thread.
    """
    parts = max(1, min(N_THREADS, n_rows, cost // 20_000))
    if parts == 1 or getattr(_lane, "taken", False):
        function(0, n_rows)
        return
    bounds = [n_rows * part // parts for part in range(parts + 1)]
    pending = [_threads().submit(function, first, last) for first, last in pairwise(bounds[1:])]
    function(0, bounds[1])
    for future in pending:
        future.result()


def over_tiles(
    function: Callable[[slice], None], n_rows: int, height: int, n_threads: int | None = None
) -> None:
    """Call ``function(rows)`` on tiles of rows, several side by side.

    Matrix products and epilogues inside `function` use the calling thread alone. If tiles of
    another call are under way, these are taken one after the other, in all threads.

    Parameters
    ----------
    function : callable
        Takes a slice of rows; writes results that belong to these rows only.
    n_rows : int
        Number of rows.
    height : int
        Rows of a tile.
    n_threads : int, default=None
        Number of threads; None means `N_THREADS`.
    """
    todo = deque(slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height))
    n_threads = min(N_THREADS if n_threads is None else n_threads, len(todo))
    turn = _turn
    if n_threads <= 1 or getattr(_lane, "taken", False) or not turn.acquire(blocking=False):
        for rows in todo:
            function(rows)
        return

    def work() -> None:
        _lane.taken = True
        try:
            while True:
                try:
                    rows = todo.popleft()
                except IndexError:
                    return
                function(rows)
        except BaseException:
            todo.clear()  # the others stop after their tile
            raise
        finally:
            _lane.taken = False

    try:
        with _blas().limit(limits=1, user_api="blas"):
            pending = [_threads().submit(work) for _ in range(n_threads - 1)]
            try:
                work()
            finally:
                wait(pending)
    finally:
        turn.release()
    for future in pending:
        future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix="sciml-kernels")
    return _pool


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all libraries, which takes milliseconds
