"""What the trainers cost at scale, as counts: collectives, bytes, FLOPs, host waits, programs, peak memory.

Each module `BACKEND_SUBJECT.py` has a function `counts()` that yields the counts of its subject. A count is the same on
every machine, so it has a bound that fails; time belongs to `nox -s bench`.
"""
