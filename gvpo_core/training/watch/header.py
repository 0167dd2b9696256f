"""What a run says of itself before its first step."""

from collections.abc import Sequence
from typing import Any

from gvpo_core.training.config import Config
from gvpo_core.training.config.secrets import hide
from gvpo_core.training.data import Prompts
from gvpo_core.training.policy.facts import PolicyFacts
from gvpo_core.training.policy.memory import advice, estimate_memory, gib, in_words, machine_memory
from gvpo_core.training.rewards import Reward


def header(
    config: Config, facts: PolicyFacts, prompts: Prompts, held_out: Prompts | None, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """The facts of a run, by name, in the order in which the console prints them.

    Args:
      facts: what `Policy.describe` gives.
    """
    own, rollout = facts.as_dict(), config.rollout
    counted = ", ".join(
        text
        for text in (
            f"{len(prompts)} training",
            f"{prompts.dropped} dropped as too long" if prompts.dropped else "",
            f"{len(held_out)} held out" if held_out else "",
        )
        if text
    )
    code = {"remote code": f"allowed, at revision {config.model.revision}"} if config.model.trust_remote_code else {}
    return {
        "model": hide(config.model.path) or "given in Python",
        **code,
        **_merged(own),
        "objective": f"{config.objective.name}, beta {config.objective.beta:g}, reference {config.objective.reference}",
        "step": f"{rollout.prompts} prompts x {rollout.responses} responses of at most {rollout.max_tokens} tokens",
        "updates a step": str(config.objective.epochs * config.objective.minibatches),
        "prompts": counted,
        "rewards": ", ".join(f"{r.name} x {r.weight:g}" for r in rewards),
        **_memory(config, facts, prompts),
        "run folder": config.run.folder,
    }


def _merged(facts: dict[str, Any]) -> dict[str, Any]:
    """A policy's facts in as few lines as a person needs."""
    for name, of in (("device_name", "device"), ("architecture", "backend"), ("layout_reason", "layout")):
        if name in facts and of in facts:
            said = str(facts.pop(name))
            if said.lower() != str(facts[of]).lower():
                facts[of] = f"{facts[of]}, {said}"
    if facts.get("ranks") == 1:
        del facts["ranks"]
        facts.pop("sharding", None)
    if facts.get("trainable_parameters") == facts.get("parameters"):
        facts.pop("trainable_parameters", None)
    return {name: value for name, value in facts.items() if name not in ("memory", "vocabulary")}


def _memory(config: Config, facts: PolicyFacts, prompts: Prompts) -> dict[str, str]:
    longest = max(len(tokens) for tokens in prompts.tokens)
    memory, have = estimate_memory(facts, config, longest), machine_memory(facts)
    if memory is None:
        return {}
    said = {"estimated memory": in_words(memory, have, facts.ranks)}
    if have and memory.peak > have:
        said["too much memory"] = f"{gib(memory.peak)} GiB estimated, {gib(have)} GiB there: {advice(facts, config)}"
    return said
