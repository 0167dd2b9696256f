"""The paper's claims as experiments that anyone can run again: `nox -s paper` writes docs/evidence.md."""
