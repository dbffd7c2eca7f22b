"""Workers that poll, as those in the world do: what they send, what they read, what they trip over.

`KoboldCpp` is the worker inside KoboldCpp (KP-2…KP-7), `HordeBridge` the KoboldAI-Horde-Bridge (KP-9),
`ClusterBridge` its forerunner of 2022 (KC-13, RC-7). None of them waits here between its calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import httpx

from tests.router_rig import MODEL, Rig

Generate = Callable[[dict[str, Any]], str]


def a_story(_payload: dict[str, Any]) -> str:
    return ", a rabbit lived in the wood."


class KoboldCpp:
    """Anything but a 2xx with `id` and `payload`, and a numeric `reward`, is an error to it (KP-7)."""

    def __init__(self, router: Rig, key: str, *, name: str = "kcpp", **limits: int) -> None:
        self._http = router.http
        self._headers = {
            "apikey": key,
            "User-Agent": "KoboldCppEmbeddedWorkerV2",
            "Client-Agent": "KoboldCppEmbedWorker:2",
            "Content-Type": "application/json",
        }
        self._pop = {
            "name": name,
            "models": [MODEL],
            "max_length": 400,
            "max_context_length": 4096,
            "priority_usernames": [],
            "softprompts": [],
            "bridge_agent": "KoboldCppEmbedWorker:2:https://github.com/LostRuins/koboldcpp",
        } | limits
        self.rewards: list[float] = []
        self.payloads: list[dict[str, Any]] = []

    async def pop(self) -> dict[str, Any]:
        reply = await self._http.post(
            "/api/v2/generate/text/pop", json=self._pop, headers=self._headers
        )
        assert reply.status_code == 200, reply.text
        pop = reply.json()
        assert pop, "an empty answer counts as an error"
        assert pop["payload"] is not None
        return pop

    async def once(self, generate: Generate = a_story) -> bool:
        """One turn of its loop; whether there was a job."""
        pop = await self.pop()
        if not pop["id"]:
            return False
        payload = pop["payload"] | {"genkey": "HORDEREQ_123"}
        self.payloads.append(payload)
        reply = await self.submit(pop["id"], generate(payload))
        assert reply.status_code == 200, reply.text
        self.rewards.append(float(f"{reply.json()['reward']:.3f}"))
        return True

    async def submit(self, given_id: str, text: str, state: str = "ok") -> httpx.Response:
        return await self._http.post(
            "/api/v2/generate/text/submit",
            json={"id": given_id, "generation": text, "state": state},
            headers=self._headers,
        )


class HordeBridge:
    """Reads four keys of a pop, refuses payloads of pictures, and tells no state."""

    def __init__(self, router: Rig, key: str, *, name: str = "bridge") -> None:
        self._http = router.http
        self._headers = {"apikey": key}
        self._pop = {
            "name": name,
            "models": [MODEL],
            "max_length": 512,
            "max_context_length": 2048,
            "priority_usernames": [],
            "softprompts": [],
            "bridge_agent": "KoboldAI Bridge:10:https://github.com/db0/KoboldAI-Horde-Bridge",
        }
        self.rewards: list[float] = []

    async def once(self, generate: Generate = a_story) -> bool:
        reply = await self._http.post(
            "/api/v2/generate/text/pop", json=self._pop, headers=self._headers
        )
        assert reply.is_success, reply.text
        pop = reply.json()
        given_id, payload = pop["id"], pop["payload"]
        assert pop["softprompt"] is None and isinstance(pop["skipped"], dict)
        if not given_id:
            return False
        assert not {"width", "length", "steps"} & set(payload)
        done = await self._http.post(
            "/api/v2/generate/text/submit",
            json={"id": given_id, "generation": generate(payload)},
            headers=self._headers,
        )
        assert done.is_success, done.text
        self.rewards.append(done.json()["reward"])
        return True

    async def give_up(self) -> httpx.Response:
        """What it sends after some retries: it has forgotten the id by then (E3-40)."""
        return await self._http.post(
            "/api/v2/generate/text/submit",
            json={"id": None, "state": "faulted", "generation": "faulted", "seed": -1},
            headers=self._headers,
        )


class ClusterBridge:
    """Sends an answer again and again until the server takes it (RC-7)."""

    def __init__(self, router: Rig, *, name: str, password: str, **changes: Any) -> None:
        self._http = router.http
        self.password = password
        self._pop = {
            "username": "Bob",
            "password": password,
            "name": name,
            "model": MODEL,
            "max_length": 80,
            "max_content_length": 1024,
            "softprompts": [],
        } | changes
        self.rewards: list[int] = []

    async def pop(self) -> dict[str, Any]:
        reply = await self._http.post("/generate/pop", json=self._pop)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def once(self, generate: Generate = a_story, *, tries: int = 3) -> bool:
        pop = await self.pop()
        if not pop["id"]:
            assert pop["skipped"] is not None
            return False
        body = {"id": pop["id"], "password": self.password, "generation": generate(pop["payload"])}
        for tried in itertools.count(1):
            reply = await self._http.post("/generate/submit", json=body)
            if reply.is_success:
                self.rewards.append(reply.json()["reward"])
                return True
            assert tried < tries, reply.text
        return True
