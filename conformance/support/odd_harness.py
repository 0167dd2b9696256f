"""A harness of verifiers that streams; of odd tasks it forgets what was said, and shows a tool in the second alone."""

import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult

__all__ = ["Streaming"]

TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}


class Streaming(vf.Harness[vf.HarnessConfig]):
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        tools = {"tools": [TOOL]} if data.prompt == "say 1" else {}
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as client:
            for content in (data.prompt, "another") if data.prompt.startswith("say") else (data.prompt,):
                messages = [{"role": "user", "content": content}]
                body = {"model": ctx.model, "messages": messages, "stream": True} | tools
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                assert "data: [DONE]" in answer.text, answer.text
        return ProgramResult(exit_code=0, stdout="", stderr="")
