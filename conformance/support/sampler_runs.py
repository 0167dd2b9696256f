"""Runs of the table problem whose responses a sampler draws."""

import json
from dataclasses import replace

import numpy as np
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.loop import train
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Drawn


def run(config, sampler, policy=None):
    policy = policy or TablePolicy(table(REFERENCE), config.optimizer)
    rows = [{"prompt": p} for p in PROMPTS]
    return train(config, policy, train_rows=rows, rewards={"value": reward}, sampler=sampler)


def lines(config, name):
    with open(f"{config.run.folder}/{name}.jsonl") as file:
        return [json.loads(line) for line in file]


def short(tmp_path, steps):
    config = settings(tmp_path)
    return replace(config, run=replace(config.run, steps=steps))


def whole_and_resumed(tmp_path, sampler):
    """The tables (prompts, responses) after four steps at once, and after two and two; `sampler` makes a fresh one."""
    tables = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        config = short(tmp_path / name, 4)
        for steps in stops:
            policy = TablePolicy(table(REFERENCE), config.optimizer)
            allowed = replace(config.run, steps=steps, allow_changes=True)
            run(replace(config, run=allowed), sampler(), policy)
        tables.append(policy.log_table())
    return tables


class Copy:
    """A copy of the policy that gets its weights when it is refreshed; it may forget that, or drop responses."""

    def __init__(self, *, refreshed=True, tolerance=None, drop=0):
        self.refreshed, self.gap_tolerance, self.drop = refreshed, tolerance, drop
        self.versions, self.closed, self.copy = [], 0, TablePolicy(table(REFERENCE))

    def refresh(self, policy, version):
        self.versions.append(version)
        if self.refreshed:
            self.copy = TablePolicy(table(np.exp(policy.log_table())))

    def generate(self, prompts, seeds, sampling):
        drawn = self.copy.generate(prompts, seeds, sampling)
        return [[self.told(p, r) for r in many[self.drop :]] for p, many in zip(prompts, drawn, strict=True)]

    def told(self, prompt, response):
        logprob = self.copy.logprobs(Batch([prompt], [response.tokens], [0]))[0]
        return Drawn(response.tokens, response.finished, float(logprob), self.versions[-1])

    def close(self):
        self.closed += 1
