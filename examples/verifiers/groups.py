"""Turns traces of `verifiers` 0.4 into groups for `gvpo train`, token by token. Rejects a trace that is not exact.

    python examples/verifiers/groups.py outputs/RUN/traces.jsonl groups.jsonl [--agent NAME]
    gvpo train config.toml --data.train groups.jsonl

The traces must contain token ids. The train client of `verifiers` writes them; it samples from an engine with the
tokenizer of the trained model. Rollouts of one task are a group. A trace is a tree of messages. Each path to a leaf is
a context that the policy saw, and becomes a segment. A message on several paths is scored only in the first one.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CUT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")
OF_EACH = ("responses", "response_mask", "response_segments", "rewards", "finished")
Segment = dict[str, list[int]]  # prompt_ids, response_ids, response_mask


class TraceError(ValueError):
    """A trace cannot be turned into an exact response."""


def groups_of(lines: Iterable[Mapping[str, Any]], agent: str = "") -> list[dict[str, Any]]:
    """Returns the groups of a run's episodes, as rows of recorded data.

    Args:
      lines: the lines of traces.jsonl.
      agent: name of the agent to train; "": there is only one.
    Raises: TraceError: a trace cannot be used.
    """
    groups: dict[str, dict[str, Any]] = {}
    names = set()
    for number, episode in enumerate(lines, 1):
        for trace in episode["traces"]:
            names.add(trace["agent"].get("name", ""))
            if agent and trace["agent"].get("name", "") != agent:
                continue
            where = f"line {number}, trace {trace.get('id', '?')}"
            first, *later = segments_of(trace, where)
            task = trace["task"].get("hash") or json.dumps(trace["task"], sort_keys=True)
            group = groups.setdefault(
                task,
                {"prompt": _opening(trace), "prompt_ids": first["prompt_ids"]} | {column: [] for column in OF_EACH},
            )
            if group["prompt_ids"] != first["prompt_ids"]:
                raise TraceError(f"{where} begins with other tokens than the first rollout of its task")
            group["responses"].append(first["response_ids"])
            group["response_mask"].append(first["response_mask"])
            group["response_segments"].append(later or None)
            group["rewards"].append(_reward(trace))
            group["finished"].append(False if _cut(trace) else None)
    if not agent and len(names) > 1:
        raise TraceError(f"the traces are of several agents, {', '.join(sorted(names))}: choose one with --agent")
    return list(groups.values())


def segments_of(trace: Mapping[str, Any], where: str) -> list[Segment]:
    """Returns the contexts in which the policy sampled tokens, starting with that of its first message.

    Raises: TraceError: tokens are missing, were changed after sampling, or are of images.
    """
    nodes = trace["nodes"]
    if trace.get("response_rewrites"):
        raise TraceError(f"{where}: responses were rewritten after they were drawn")
    if trace.get("mm_token_type_id_map"):
        raise TraceError(f"{where} has tokens of images or video, which the policy cannot read")
    for i, node in enumerate(nodes):
        if len(node.get("mask", ())) != len(node.get("token_ids", ())):
            raise TraceError(f"{where}, message {i} has another number of mask entries than of tokens")
        if node.get("sampled") and not any(node.get("mask", ())):
            raise TraceError(f"{where}, message {i} was drawn and has no tokens: run verifiers with its train client")
    segments, counted = [], set[int]()
    for path in sorted(_paths(nodes), key=lambda path: [n for n in path if nodes[n].get("sampled")]):
        ids = [token for n in path for token in nodes[n]["token_ids"]]
        sampled = [bool(mine) and n not in counted for n in path for mine in nodes[n]["mask"]]
        counted.update(path)
        if any(sampled):
            start, stop = sampled.index(True), len(sampled) - sampled[::-1].index(True)
            mask = [int(mine) for mine in sampled[start:stop]]
            segments.append({"prompt_ids": ids[:start], "response_ids": ids[start:stop], "response_mask": mask})
    if not segments or not segments[0]["prompt_ids"]:
        raise TraceError(f"{where} has no tokens that the policy drew after a prompt")
    return segments


def _paths(nodes: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Yields the messages from the root to each leaf."""
    parents = {node.get("parent") for node in nodes}
    for leaf in range(len(nodes)):
        if leaf not in parents:
            path = [leaf]
            while (above := nodes[path[-1]].get("parent")) is not None:
                path.append(above)
            yield path[::-1]


def _opening(trace: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns the messages before the policy's first one, for readers. The tokens are in prompt_ids."""
    messages = []
    for node in (trace["nodes"][n] for n in next(_paths(trace["nodes"]))):
        if node.get("sampled"):
            break
        content = node["message"].get("content") or ""
        text = content if isinstance(content, str) else json.dumps(content)
        messages.append({"role": node["message"]["role"], "content": text})
    return messages


def _reward(trace: Mapping[str, Any]) -> float | None:
    """Returns the weighted sum of rewards, as in verifiers; None: the rollout failed and leaves its group."""
    rewards = [reward for reward in trace.get("rewards", {}).values() if reward is not None]
    if not trace.get("ok") or not rewards:
        return None
    return float(sum(reward["score"] * reward.get("weight", 1.0) for reward in rewards))


def _cut(trace: Mapping[str, Any]) -> bool:
    calls = [call for call in trace.get("calls", ()) if not call.get("error")]
    return trace.get("stop_condition") in CUT or bool(calls and calls[-1].get("finish_reason") == "length")


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes groups for gvpo train from traces of verifiers 0.4.")
    parser.add_argument("traces", type=Path)
    parser.add_argument("groups", type=Path)
    parser.add_argument("--agent", default="", help="agent to train; required if there are several")
    options = parser.parse_args()
    try:
        lines = [json.loads(line) for line in options.traces.read_text(encoding="utf-8").splitlines() if line.strip()]
        groups = groups_of(lines, options.agent)
    except (OSError, TraceError, ValueError) as error:
        print(f"{options.traces}: {error}", file=sys.stderr)
        return 1
    options.groups.write_text("".join(json.dumps(group) + "\n" for group in groups), encoding="utf-8")
    print(f"{sum(len(group['responses']) for group in groups)} rollouts in {len(groups)} groups: {options.groups}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
