"""The facts that a run prints before its first step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gvpo_core.training.config import Config
from gvpo_core.training.config.secrets import hide
from gvpo_core.training.inputs import HeldOut
from gvpo_core.training.policy.facts import PolicyFacts
from gvpo_core.training.policy.memory import advice, available_memory, estimate_memory, gib, in_words
from gvpo_core.training.rewards import Reward
from gvpo_core.training.sources import Source, teacher_of


def header(
    config: Config, facts: PolicyFacts, source: Source, held_out: HeldOut | None, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """The facts of a run, by name, in the order in which the console prints them.

    Args:
      facts: the facts that `Policy.describe` returns.
    """
    policy_facts, prompts = facts.as_dict(), source.prompts
    prompt_counts = ", ".join(
        text
        for text in (
            f"{len(prompts)} training",
            f"{prompts.dropped} dropped as too long" if prompts.dropped else "",
            held_out.describe() if held_out else "",
        )
        if text
    )
    code = {"remote code": f"allowed, at revision {config.model.revision}"} if config.model.trust_remote_code else {}
    return {
        "model": hide(config.model.path) or "given in Python",
        **code,
        **_merged(policy_facts),
        "objective": f"{config.objective.name}, beta {config.objective.beta:g}, reference {config.objective.reference}",
        **source.describe(),
        "updates a step": str(config.objective.epochs * config.objective.minibatches),
        "prompts": prompt_counts,
        **({"rewards": ", ".join(f"{r.name} x {r.weight:g}" for r in rewards)} if rewards else {}),
        **_memory(config, facts, source),
        "run folder": config.run.folder,
    }


def _merged(facts: dict[str, Any]) -> dict[str, Any]:
    """Merges a policy's facts into fewer lines."""
    for name, target in (("device_name", "device"), ("architecture", "backend"), ("layout_reason", "layout")):
        if name in facts and target in facts:
            detail = str(facts.pop(name))
            if detail.lower() != str(facts[target]).lower():
                facts[target] = f"{facts[target]}, {detail}"
    if facts.get("ranks") == 1:
        del facts["ranks"]
        facts.pop("sharding", None)
    if facts.get("trainable_parameters") == facts.get("parameters"):
        facts.pop("trainable_parameters", None)
    return {name: value for name, value in facts.items() if name not in ("memory", "vocabulary")}


def _memory(config: Config, facts: PolicyFacts, source: Source) -> dict[str, str]:
    longest = max(len(tokens) for tokens in source.prompts.tokens)
    responses, tokens = source.largest
    config = replace(config, rollout=replace(config.rollout, responses=responses, max_tokens=tokens))
    memory, available = estimate_memory(facts, config, longest, teacher_of(source)), available_memory(facts)
    if memory is None:
        return {}
    lines = {"estimated memory": in_words(memory, available, facts.ranks)}
    if available and memory.peak > available:
        lines["too much memory"] = (
            f"{gib(memory.peak)} GiB estimated, {gib(available)} GiB available: {advice(facts, config)}"
        )
    return lines
