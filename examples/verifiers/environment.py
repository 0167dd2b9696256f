"""Uses environments of `verifiers` 0.4 for episodes: the trained policy samples the turns of their model.

    [environment]
    path = "examples/verifiers/environment.py:Verifiers"
    max_turns = 4

    [environment.options.env]
    taskset = { id = "my-taskset" }

`environment.options.env` is the block [env] of verifiers. Rows name tasks by number, {"task": 0}:

    python examples/verifiers/environment.py my-taskset train.jsonl --limit 1000

Needs `pip install verifiers==0.4.0`. An episode is one run of verifiers' own environment. Its calls of the model wait
until all episodes wait, and then get the policy's turns. Rewards come from the trace, tools from the tool servers.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.clients import Client, ModelContext, TrainClientConfig
from verifiers.v1.clients.train import serialize_completion, tool_to_wire
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.dialects.chat import ChatDialect, message_to_wire
from verifiers.v1.env import Env
from verifiers.v1.graph import message_hash
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult, SubprocessConfig
from verifiers.v1.types import AssistantMessage, Response, ToolCall
from verifiers.v1.utils.loaders import default_harness_id, load_environment, resolve_env_config

__all__ = ["ChatLoop", "Verifiers"]  # verifiers looks up the harness here

MODEL = "policy"
NOWHERE = TrainClientConfig(base_url="http://localhost", api_key_var="")  # stands for the policy; gets no requests
Message = dict[str, Any]


class RolloutError(RuntimeError):
    """A rollout failed in verifiers, or cannot be trained on exactly."""


class ChatLoop(vf.Harness[vf.HarnessConfig]):
    """Verifiers' null harness in this process: answers and tool results, until an answer calls no tool."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> ProgramResult:
        """See Harness.launch."""
        messages = _prompt(data)
        spec = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        headers = {"Authorization": f"Bearer {secret}"}
        async with contextlib.AsyncExitStack() as stack, httpx.AsyncClient(timeout=None, headers=headers) as client:
            tools, dispatch, servers = await connect_mcp({"mcpServers": spec}, stack)
            while True:
                body = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                if answer.is_error:  # a limit or @stop of the task, or an error that verifiers recorded
                    return ProgramResult(exit_code=1, stdout="", stderr=answer.text)
                message = answer.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    name = call["function"]["name"]
                    content: Any = f"error: unknown tool {name!r}"
                    if name in dispatch:
                        content = await call_mcp(servers, dispatch, name, json.loads(call["function"]["arguments"]))
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})


def _prompt(data: vf.TaskData) -> list[Message]:
    """Returns the first messages of a task, as the chat loop sends them."""
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if data.prompt is None or isinstance(data.prompt, str):
        return system + ([{"role": "user", "content": data.prompt}] if data.prompt else [])
    return system + [message_to_wire(message) for message in data.prompt]


class Policy(Client):
    """The model that verifiers calls. Passes each call to the episode of its trace, and waits for the policy's turn."""

    def __init__(self) -> None:
        self.episodes: dict[str, Verifiers] = {}  # trace id -> episode

    async def get_response(self, dialect, body, sampling, session_id=None, turn=None, headers=None) -> Response:
        """See Client.get_response. Ignores verifiers' sampling settings."""
        if not isinstance(dialect, ChatDialect):
            raise NotImplementedError(f"the harness uses {type(dialect).__name__}; expected chat completions")
        answer, finish_reason = await self.episodes[session_id].call(turn.prompt, turn.tools)
        response = Response(id="", created=0, model=MODEL, message=answer, finish_reason=finish_reason)
        response.raw = serialize_completion(response, MODEL)
        return response


class Served:
    """An environment of verifiers that runs in this process for all its episodes."""

    def __init__(self, settings: Mapping[str, Any], seat: str) -> None:
        """Raises: ValueError: the settings do not say which agent is trained, or what plays the others."""
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        added = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
        os.environ["PYTHONPATH"] = os.pathsep.join(added)  # tool servers find the taskset here
        config = resolve_env_config(dict(settings) | {"interception": {"type": "server"}})
        agents = agent_config_fields(config)
        self.seat = seat or (next(iter(agents)) if len(agents) == 1 else "")
        if self.seat not in agents:
            raise ValueError(f"policy = {seat!r}; expected the agent that is trained, one of {', '.join(agents)}")
        for name, agent in agents.items():
            if name != self.seat and (agent.client is None or agent.model is None):
                raise ValueError(f"env.{name} needs a client and a model of its own: the policy plays {self.seat}")
        policy = agents[self.seat]
        for name in ("client", "model", "sampling", "max_input_tokens", "max_output_tokens", "max_total_tokens"):
            if getattr(policy, name) is not None:
                raise ValueError(f"env.{self.seat}.{name} is set; the policy draws its turns, as [rollout] says")
        if policy.harness is None and default_harness_id(config.taskset.id) == "bash":  # nobody chose it
            changes: dict[str, Any] = {"harness": vf.HarnessConfig(id=__name__)}
            if "runtime" not in policy.model_fields_set:
                changes["runtime"] = SubprocessConfig()
            config = config.model_copy(update={self.seat: policy.model_copy(update=changes)})
        self.env: Env = load_environment(config)
        self.policy = Policy()
        self.tools: list[dict[str, Any]] = []
        self._tasks: list[vf.Task] = []
        self._more: Iterator[vf.Task] = iter(self.env.taskset)

    async def run(self, ready: "asyncio.Future[Served]") -> None:
        """Runs the servers until cancelled. Sets `ready` when they run and the tools of the first task are known."""
        try:
            async with self.env.serving():
                self.env._interception.clients[NOWHERE.model_dump_json()] = self.policy
                probe = Verifiers({}, "")
                try:
                    probe.begin(self, self.task(0))
                    await probe.answered()
                    self.tools = probe.tools
                finally:
                    await probe.close()
                ready.set_result(self)
                await asyncio.get_running_loop().create_future()
        except Exception as e:
            ready.set_exception(e)

    def task(self, number: int) -> vf.Task:
        """Returns a task. Raises: IndexError: the taskset has no such task."""
        if number >= len(self._tasks):
            self._tasks += itertools.islice(self._more, number + 1 - len(self._tasks))
        if not 0 <= number < len(self._tasks):
            raise IndexError(f"task = {number}; the taskset has {len(self._tasks)} tasks")
        return self._tasks[number]


_served: dict[str, tuple["asyncio.Future[Served]", "asyncio.Task[None]"]] = {}  # options -> what runs in this process


async def _serve(env: Mapping[str, Any], policy: str) -> Served:
    key = json.dumps([env, policy], sort_keys=True)
    if key not in _served:
        ready: asyncio.Future[Served] = asyncio.get_running_loop().create_future()
        _served[key] = ready, asyncio.create_task(Served(env, policy).run(ready))
    return await asyncio.shield(_served[key][0])


class Verifiers:
    """One rollout of verifiers. The caller of `step` is its model."""

    def __init__(self, env: Mapping[str, Any], policy: str = "") -> None:
        """
        Args:
          env: verifiers' block [env]: the taskset, and the agents by name.
          policy: name of the trained agent, if there are several.
        """
        self.options = (env, policy)
        self.run: asyncio.Task[Any] | None = None

    @staticmethod
    async def tool_schemas(env: Mapping[str, Any], policy: str = "") -> list[dict[str, Any]]:
        """Returns the tools that the tasks show to the model."""
        return (await _serve(env, policy)).tools

    async def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Starts the task of the row. Returns the messages of its first call of the model."""
        served = await _serve(*self.options)
        self.begin(served, served.task(int(row["task"])))
        messages, _, done = await self.answered()
        if done:
            raise RolloutError(f"task {row['task']} ended before it called the model")
        if self.tools != served.tools:
            raise RolloutError(f"task {row['task']} shows other tools than task 0; the tools of a run are the same")
        return messages

    async def step(self, message: Mapping[str, Any]) -> tuple[list[Message], float | None, bool]:
        """Answers the call with the policy's turn. Returns the next call's new messages, or the reward at the end."""
        self.answer(message, "tool_calls" if message.get("tool_calls") else "stop")
        return await self.answered()

    async def at_limit(self, message: Mapping[str, Any] | None) -> float | None:
        """Ends the rollout as verifiers' own limits do. Returns the reward of the incomplete rollout."""
        if message is not None:
            self.answer(message, "length")
            _, reward, done = await self.answered()
            if done:
                return reward
        self.trace.stop("max_turns" if message is None else "max_output_tokens")
        self.answer({"content": ""}, "length")  # verifiers drops it because the trace has stopped
        while not (result := await self.answered())[2]:
            self.answer({"content": ""}, "length")
        return result[1]

    async def close(self) -> None:
        """Ends the rollout at any point."""
        if self.run is not None:
            self.run.cancel()
            await asyncio.gather(self.run, return_exceptions=True)
            self.served.policy.episodes.pop(self.trace.id if self.trace else "", None)

    def begin(self, served: Served, task: vf.Task) -> None:
        """Starts a rollout of the task."""
        self.served, self.tools = served, []
        self.trace: vf.Trace | None = None
        self.known: list[str] = []  # hashes of the messages of the conversation
        self.calls: asyncio.Queue[list[Message] | Exception] = asyncio.Queue()
        self.waiting: asyncio.Future[tuple[AssistantMessage, str]] | None = None
        self.turns = 0
        context = ModelContext(model=MODEL, client=NOWHERE)
        self.run = asyncio.create_task(served.env.run_episode(task, context, on_trace=self._begun))

    def _begun(self, trace: vf.Trace) -> None:
        if trace.agent is not None and trace.agent.name == self.served.seat:
            if self.trace is not None:
                self.calls.put_nowait(
                    RolloutError("the policy plays several rollouts in one; expected one conversation")
                )
            self.trace = trace
            self.served.policy.episodes[trace.id] = self

    async def call(self, messages: list[Any], tools: list[Any] | None) -> tuple[AssistantMessage, str]:
        """Waits for the policy's turn after a call of the model. Returns its message and finish reason."""
        hashes = [message_hash(message) for message in messages]
        self.tools = [tool_to_wire(tool) for tool in tools or []]
        try:
            grows = len(hashes) > len(self.known) and hashes[: len(self.known)] == self.known
            if self.waiting is not None or not grows:
                raise RolloutError(
                    "the harness calls the model twice at once, or changed what was said before; expected one"
                    " conversation that grows"
                )
            self.calls.put_nowait([_plain(message) for message in messages[len(self.known) :]])
        except RolloutError as e:
            self.calls.put_nowait(e)
        self.known, self.waiting = hashes, asyncio.get_running_loop().create_future()
        return await self.waiting

    def answer(self, message: Mapping[str, Any], finish_reason: str) -> None:
        """Passes the policy's message to the waiting call."""
        assert self.waiting is not None
        thoughts, content = _split(message["content"])
        calls = [
            ToolCall(id=f"call_{self.turns}_{i}", name=call["name"], arguments=json.dumps(call["arguments"]))
            for i, call in enumerate(message.get("tool_calls", ()))
        ]
        if calls:  # verifiers does not count them as text
            content = content.split("<tool_call>")[0].strip() if "<tool_call>" in content else ""
        reply = AssistantMessage(content=content, reasoning_content=thoughts, tool_calls=calls or None)
        self.turns += 1
        self.known.append(message_hash(reply))
        waiting, self.waiting = self.waiting, None
        waiting.set_result((reply, finish_reason))

    async def answered(self) -> tuple[list[Message], float | None, bool]:
        """Returns the messages of the next call of the model, or the reward if there is no further call.

        Raises: RolloutError: verifiers reports a failure.
        """
        call = asyncio.ensure_future(self.calls.get())
        assert self.run is not None
        try:
            await asyncio.wait([call, self.run], return_when=asyncio.FIRST_COMPLETED)
            if call.done():
                messages = call.result()
                if isinstance(messages, Exception):
                    raise messages
                return messages, None, False
        finally:
            call.cancel()
        episode = self.run.result()
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        if errors or self.trace is None:
            first = errors[0] if errors else None
            raise RolloutError(
                f"{first.type}: {first.message}\n{first.traceback or ''}".strip() if first else "no trace"
            )
        rewards = self.trace.rewards.values()
        return [], self.trace.reward if any(reward is not None for reward in rewards) else None, True


def _split(text: str) -> tuple[str | None, str]:
    """Splits thoughts and answer, as engines with a reasoning parser do."""
    thoughts, closed, answer = text.partition("</think>")
    if closed:
        return thoughts.strip().removeprefix("<think>").strip(), answer.strip()
    if text.lstrip().startswith("<think>"):
        return text.strip().removeprefix("<think>").strip(), ""
    return None, text


def _plain(message: Any) -> Message:
    """Returns a message as the chat template reads it. Raises: RolloutError: it has more than text."""
    wire = message_to_wire(message)
    content = wire.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise RolloutError("a message has images, sound or video; expected text")
        content = "\n".join(part["text"] for part in content)
    if wire.get("tool_calls"):
        raise RolloutError("a message calls tools that the policy did not call; expected text")
    name = {"name": wire["name"]} if wire.get("name") else {}
    return {"role": wire["role"], **name, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes rows for gvpo train, one per task of a verifiers taskset.")
    parser.add_argument("taskset", help="id of the taskset")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--limit", type=int, help="most tasks")
    parser.add_argument(
        "--prompts", action="store_true", help="also write the tasks' prompts; else a run starts each task to see them"
    )
    options = parser.parse_args()
    sys.path.append(os.getcwd())
    env = load_environment(resolve_env_config({"taskset": {"id": options.taskset}}))
    with options.rows.open("w", encoding="utf-8") as file:
        for number, task in enumerate(itertools.islice(env.taskset, options.limit)):
            prompt = {"prompt": _prompt(task.data)} if options.prompts else {}
            file.write(json.dumps({"task": number} | prompt) + "\n")


if __name__ == "__main__":
    main()
