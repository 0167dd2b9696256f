"""What the trainers cost at scale, as counts: collectives, bytes, FLOPs, host waits, programs, peak memory.

Each module `BACKEND_SUBJECT.py` has a function `counts()` that yields the counts of its subject. A count is the same on
every machine, so exceeding its bound is an error. Times are measured by `nox -s bench`.
"""
