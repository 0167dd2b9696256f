"""The paper's claims as experiments that anyone can repeat: `nox -s paper` writes docs/evidence.md."""
