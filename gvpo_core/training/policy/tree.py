"""Responses to one prompt as a tree of common beginnings: the order in which a packed row computes each token once."""

from collections.abc import Sequence

from gvpo_core.training.policy.prefixes import common
from gvpo_core.training.policy.protocol import Tokens


def depth_first(responses: Sequence[Tokens]) -> list[tuple[int, int]]:
    """The responses in depth-first order of their tree, and how many inputs each shares with the one before it.

    No two responses share more than the least of the numbers after the first up to the second. Branches of a node keep
    the given order, so that of responses without a common beginning is the given one. A response's last token is not
    an input.

    Returns: (number of the response, inputs that it has in common with the response before) each.
    """
    shared = [0] * len(responses)
    nodes: list[tuple[int, list[tuple[int, list[int]]]]] = [(0, [])]  # depth, branches: (the first given, members)

    def closed(depth: int, branches: list[tuple[int, list[int]]]) -> tuple[int, list[int]]:
        branches.sort()
        for _, members in branches[1:]:
            shared[members[0]] = depth
        return branches[0][0], [i for _, members in branches for i in members]

    # Neighbours in sorted order have the most in common. A node is open while the next response may belong to it.
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
