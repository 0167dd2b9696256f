"""Plants pickles in a checkpoint, past its checksums, and lets a backend's own `restore` meet them.

A process of its own, since a reader that refuses may leave work behind in threads, which would disturb other tests.

python pickle_worker.py BACKEND MODEL FOLDER    prints how many planted files were read; fails where a pickle ran
"""

import shutil
import sys
from pathlib import Path

import pickles
import trainer_backends


def main() -> None:
    backend, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    policy, whole, mark = trainer_backends.BACKENDS[backend].policies.policy(model), folder / "whole", folder / "mark"
    whole.mkdir()
    policy.save(whole)
    names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    read = set()
    for form, content in pickles.forms(mark):
        for name in names:
            planted = folder / "planted"
            shutil.copytree(whole, planted)
            (planted / name).write_bytes(content)
            try:
                policy.restore(planted)
            except Exception:  # each reader has its own error for a file that is none of its own
                read.add(name)
            if mark.exists():
                sys.exit(f"{form} ran instead of {name}")
            shutil.rmtree(planted)
    for name in pickles.USUAL:
        (whole / name).write_bytes(next(pickles.forms(mark))[1])
    policy.restore(whole)
    if mark.exists():
        sys.exit("a pickle beside the checkpoint's files ran")
    print("files read:", len(read))


if __name__ == "__main__":
    main()
