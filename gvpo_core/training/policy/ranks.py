"""What the ranks of a run do together."""

import numpy as np

from gvpo_core.training.policy.protocol import Policy


def agree(policy: Policy, error: Exception | None, kind: type[Exception] = RuntimeError) -> None:
    """Raises on every rank when any rank has an error, so that none waits for a rank that left."""
    message = np.frombuffer((f"{error}\n" if error else "").encode(), np.uint8)
    text = policy.gather(message).tobytes().decode().strip()
    if error:
        raise error
    if text:
        raise kind(text)
