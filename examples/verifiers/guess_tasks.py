"""A verifiers environment with several turns: its user says higher or lower until the secret is guessed."""

import verifiers.v1 as vf

__all__ = ["Guess", "Secrets"]


class SecretData(vf.TaskData):
    """The data of a task: the number to find."""

    secret: int


class Secret(vf.Task[SecretData]):
    """Find the secret in few turns."""

    @vf.reward
    async def found(self, task: SecretData, trace: vf.Trace) -> float:
        """1 if the last guess is the secret, minus 0.1 for each turn."""
        return float((trace.last_reply or "").strip() == str(task.secret)) - 0.1 * trace.num_turns


class Secrets(vf.Taskset[Secret, vf.TasksetConfig]):
    """One task for each number from 1 to 9."""

    def load(self):
        """The tasks."""
        for secret in range(1, 10):
            yield Secret(SecretData(prompt="Guess my number from 1 to 9.", secret=secret), self.config.task)


class GuessConfig(vf.EnvConfig):
    """The only agent."""

    agent: vf.AgentConfig = vf.AgentConfig()


class Guess(vf.Env[GuessConfig]):
    """The conversation."""

    async def run(self, task: Secret, agents: vf.Agents) -> None:
        """Answers each guess with a hint."""
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            while not said.terminated and said.last_reply != str(task.data.secret):
                said = await talk.turn("higher" if said.last_reply < str(task.data.secret) else "lower")
