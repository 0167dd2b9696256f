"""A custom objective for `gvpo train`: name = "examples/own_objective.py:leave_one_out" under [objective].

It is RLOO without a ratio: a response's advantage is its reward minus the mean reward of the others in its group.
"""

import numpy as np


def leave_one_out(logprobs, ref_logprobs, old_logprobs, rewards, group_ids, *, num_groups):
    """(N,) coefficients c; the loss has the gradient -sum_i c_i grad log pi_i."""
    size = np.bincount(group_ids, minlength=num_groups)[group_ids]
    others = (np.bincount(group_ids, rewards, num_groups)[group_ids] - rewards) / np.maximum(size - 1, 1)
    advantages = np.where(size > 1, rewards - others, 0.0)
    counted = np.count_nonzero(np.bincount(group_ids, minlength=num_groups) > 1)
    return advantages / (size * counted)
