"""Rows shared among threads: every row once, errors, and what BLAS is left with."""

import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from sciml.kernels import row_threads
from sciml.kernels.row_threads import over_rows, over_tiles


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch):
    """Whatever the machine has."""
    monkeypatch.setattr(row_threads, "N_THREADS", 3)
    monkeypatch.setattr(row_threads, "_pool", None)
    yield
    if row_threads._pool is not None:
        row_threads._pool.shutdown()


def blas_threads():
    return {p["filepath"]: p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"}


@pytest.mark.parametrize("n", [0, 1, 7, 100])
@pytest.mark.parametrize("height", [1, 7, 200])
@pytest.mark.parametrize("n_threads", [None, 1, 2])
def test_every_row_is_visited_once(n, height, n_threads):
    seen = np.zeros(n, dtype=int)

    def visit(rows):
        assert rows.stop - rows.start <= height
        seen[rows] += 1

    over_tiles(visit, n, height, n_threads)
    assert (seen == 1).all()


@pytest.mark.parametrize(("n", "cost"), [(1, 10**9), (5, 10**9), (100, 10), (100, 10**9)])
def test_ranges_of_rows_are_a_partition(n, cost):
    seen = np.zeros(n, dtype=int)
    threads = set()

    def visit(first, last):
        seen[first:last] += 1
        threads.add(threading.get_ident())
        time.sleep(0.01)

    over_rows(visit, n, cost)
    assert (seen == 1).all()
    assert (len(threads) > 1) == (n > 1 and cost > 10**6)


def test_tiles_run_side_by_side_with_one_blas_thread_each():
    threads, limits = set(), []
    with threadpool_limits(2, "blas"):
        before = blas_threads()

        def visit(rows):
            threads.add(threading.get_ident())
            limits.append(set(blas_threads().values()))
            over_rows(lambda first, last: threads.add(threading.get_ident()), 1000, 10**9)
            time.sleep(0.02)

        over_tiles(visit, 6, 1)
        assert blas_threads() == before
    assert len(threads) == 3
    assert all(limit == {1} for limit in limits)


def test_overlapping_callers_leave_blas_as_it_was():
    """The one who comes second must not take the limit of the first for the normal state."""
    before = blas_threads()
    inside, leave = threading.Event(), threading.Event()

    def first(rows):
        inside.set()
        leave.wait(10)

    outer = threading.Thread(target=over_tiles, args=(first, 2, 1, 2))
    outer.start()
    inside.wait(10)
    over_tiles(lambda rows: leave.set(), 2, 1, 2)
    outer.join()
    assert blas_threads() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_stops_the_tiles_and_comes_out(error):
    before, done = blas_threads(), []

    def visit(rows):
        if rows.start == 5:
            raise error("here")
        time.sleep(0.001)
        done.append(rows.start)

    with pytest.raises(error, match="here"):
        over_tiles(visit, 1000, 1)
    assert len(done) < 900
    assert blas_threads() == before
    over_tiles(lambda rows: done.append(rows.start), 10, 1)  # and nothing is left over
    assert sorted(done[-10:]) == list(range(10))
