"""Orders the responses to a prompt as a tree of common beginnings, so that a packed row computes each token once."""

from collections.abc import Sequence

from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.protocol import Tokens


def depth_first(responses: Sequence[Tokens]) -> list[tuple[int, int]]:
    """Returns the responses in depth-first order of their tree, with the inputs that each shares with the one before.

    Two responses share at most the minimum of the counts after the first one, up to and including the second one.
    Branches of a node keep the given order, so responses without a common beginning keep it too. A response's last
    token is not an input.

    Returns: (index of the response, inputs in common with the response before it) for each response.
    """
    shared = [0] * len(responses)
    nodes: list[tuple[int, list[tuple[int, list[int]]]]] = [(0, [])]  # depth, branches: (first in order given, members)

    def closed(depth: int, branches: list[tuple[int, list[int]]]) -> tuple[int, list[int]]:
        branches.sort()
        for _, members in branches[1:]:
            shared[members[0]] = depth
        return branches[0][0], [i for _, members in branches for i in members]

    # In sorted order, neighbours have the most in common. A node stays open while the next response may belong to it.
    order = sorted(range(len(responses)), key=responses.__getitem__)
    for i, after in zip(order, [*order[1:], None], strict=True):
        depth = 0 if after is None else _common_inputs(responses[i], responses[after])
        branch = (i, [i])
        while nodes[-1][0] > depth:
            nodes[-1][1].append(branch)
            branch = closed(*nodes.pop())
        if nodes[-1][0] < depth:
            nodes.append((depth, []))
        nodes[-1][1].append(branch)
    return [(i, shared[i]) for i in closed(*nodes[0])[1]]


def _common_inputs(a: Tokens, b: Tokens) -> int:
    return min(common(a, b), len(a) - 1, len(b) - 1)
