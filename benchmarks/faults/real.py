"""The slice of the run against vLLM: three `alter serve` of a tiny model, each in processes of its own.

What a server applies is seen from outside: every set of active experts has its own answer to one prompt,
noted before anything is injected. An answer must be that of the epoch that its header names, and the epoch
one that was active, or came later, when the request was sent. The model computes in float32, and no token of
any answer is a close call: which slots the experts are in changes the last bits of a sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from alter_cli.demo.tokenizer import train_tokenizer
from alter_core.bundle import read_manifest
from server.api.middleware import EPOCH, EPOCH_FINAL
from server.client import AdminClient
from tests.support import postgres
from tests.support.tiny import VOCAB_SIZE, TinyBundles, make_bundles

from .churn import churn
from .database import PostgresPlace
from .episode import Episode
from .fleet import ADMIN_TOKEN, Fleet, NotReadyError, ServerProcess, free_port
from .injectors import REAL, Scene
from .ledger import Token
from .settings import FaultSettings

MAX_DOMAINS = 4
MARGIN_S = 2.0
"""`alter serve` has no flag for it."""
LEASE_S = 2.0
NUM_TOKENS = 8
NUM_PROMPTS = 32
MIN_MARGIN = 1e-3
"""Nats between a token of an answer and the next likely one; slots change some 1e-5 of it."""
START_TIMEOUT_S = 600.0
"""Where there are more engines than cores, they wait for one another."""
_TEXT = [
    "the quick brown fox jumps over the lazy dog and the five boxing wizards jump quickly",
    "pack my box with five dozen liquor jugs",
]


def make(folder: Path) -> TinyBundles:
    """The model with a tokenizer, its substrate and experts that are heard in every answer."""
    made = make_bundles(folder, num_experts=4, trigger_rate=0.3)
    train_tokenizer(_TEXT * 20, vocab_size=VOCAB_SIZE).save_pretrained(made.model)
    return made


class RealReplica(ServerProcess):
    """One `alter serve`. The face of `fleet.Replica`, without its points."""

    def __init__(self, index: int, bundles: TinyBundles, folder: Path, registry: str) -> None:
        self.name = f"replica-{index}"
        self.started_at = 0.0
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder / self.name
        self._folder.mkdir(parents=True)
        self._command = [
            *(sys.executable, "-m", "alter_cli.main", "serve", str(bundles.model)),
            *("--alter-substrate", str(bundles.substrate)),
            *("--alter-max-domains", str(MAX_DOMAINS), "--alter-lease-s", str(LEASE_S)),
            *("--alter-registry", registry, "--alter-store", str(folder / "store")),
            *("--alter-audit-log", str(self._folder / "audit.sqlite")),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"),
            *(
                "--enforce-eager",
                "--dtype",
                "float32",
                "--max-model-len",
                "256",
                "--max-num-seqs",
                "8",
            ),
        ]
        self._environment = os.environ | {
            "ALTER_ADMIN_TOKEN": ADMIN_TOKEN,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # One core each: threads that wait for each other spin.
            "VLLM_CPU_OMP_THREADS_BIND": str(index % (os.cpu_count() or 1)),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the API server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Begins; see `Fleet.ready`."""
        self.started_at = time.monotonic()
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, process_group=0
            )

    @property
    def is_alive(self) -> bool:
        """False once the API server is gone."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the API server, then for what is left of its engine."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None


class RealFleet(Fleet):
    """Servers with vLLM."""

    ready_timeout_s = START_TIMEOUT_S

    def __init__(self, bundles: TinyBundles, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._bundles = bundles
        self.prompt: list[int] = []
        self._answers: dict[tuple[int, ...], frozenset[str]] = {}
        self.num_spanned = 0
        """Answers that a switch fell into: their tokens are of two epochs, and are not looked at."""

    async def add(self) -> Any:
        """A new server, started."""
        index = len(self.replicas)
        registry = await self.place.url_of(index)
        replica: Any = RealReplica(index, self._bundles, self.folder, registry)
        self.replicas.append(replica)
        await asyncio.to_thread(replica.start)
        return replica

    def follow(self, replica: Any) -> None:
        """From now on answers are asked for, and checked."""
        self._streams[replica.name] = asyncio.create_task(self._follow(replica))

    async def learn(self, by_digest: Mapping[str, Path], names: tuple[str, ...]) -> None:
        """Notes the answer of every set of experts. Raises: NotReadyError if two are hard to tell apart."""
        replica = self.replicas[0]
        chance = random.Random(0)
        prompts = [[chance.randrange(4, VOCAB_SIZE) for _ in range(24)] for _ in range(NUM_PROMPTS)]
        is_clear = [True] * NUM_PROMPTS
        digests = sorted(by_digest)
        found: list[dict[frozenset[str], tuple[int, ...]]] = [{} for _ in prompts]
        for size in range(len(names) + 1):
            for active in itertools.combinations(digests, size):
                for name, digest in zip(names, active, strict=False):
                    await self.active(await self.change(replica, name, by_digest[digest]))
                await self.ready()
                for index, prompt in enumerate(prompts):
                    tokens, answer = await self._complete(replica, prompt, logprobs=2)
                    found[index][frozenset(active)] = tokens
                    is_clear[index] &= _margin(answer.json()) >= MIN_MARGIN
                for name, _ in zip(names, active, strict=False):
                    await self.active(await self.change(replica, name, None))
        for prompt, answers, clear in zip(prompts, found, is_clear, strict=True):
            self._answers = {tokens: active for active, tokens in answers.items()}
            if clear and len(self._answers) == len(answers):
                self.prompt = prompt
                return
        raise NotReadyError("no prompt tells every set of experts from every other one")

    async def _complete(
        self, replica: Any, prompt: list[int], **more: Any
    ) -> tuple[tuple[int, ...], httpx.Response]:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **more,
        }
        answer = await self._http.post(f"{replica.url}/v1/completions", json=body, timeout=30)
        answer.raise_for_status()
        return tuple(answer.json()["choices"][0]["token_ids"]), answer

    async def _follow(self, replica: Any) -> None:
        while True:
            sent = time.monotonic()
            with contextlib.suppress(httpx.HTTPError):
                tokens, answer = await self._complete(replica, self.prompt)
                if EPOCH_FINAL in answer.headers:
                    self.num_spanned += 1
                else:
                    active = self._answers.get(tokens, frozenset(["another answer"]))
                    epoch = int(answer.headers[EPOCH])
                    for _ in tokens:
                        self.ledger.generated(Token(replica.name, sent, epoch, active))
            await asyncio.sleep(0.05)


def _margin(answer: Mapping[str, Any]) -> float:
    """Nats between each token and the next likely one, at the closest."""
    likely = answer["choices"][0]["logprobs"]["top_logprobs"]
    ranked = [sorted(each.values(), reverse=True) for each in likely]
    return float(min(values[0] - values[1] for values in ranked))


def measure(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    """Faults against three servers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bundles = make(folder / "bundles")
    with postgres.server() as server:
        return asyncio.run(_measure(bundles, folder, settings, server))


async def _measure(
    bundles: TinyBundles, folder: Path, settings: FaultSettings, server: postgres.Server
) -> dict[str, Any]:
    place = PostgresPlace(server.folder, "real", server.folder / "proxies")
    await place.create()
    own = settings.with_times(lease_s=LEASE_S, margin_s=MARGIN_S)
    fleet = RealFleet(bundles, place, folder, bundles.substrate, own, max_domains=MAX_DOMAINS)
    by_digest = {read_manifest(path).digest: path for path in bundles.experts.values()}
    scene = Scene(
        fleet=fleet,
        bundles=by_digest,
        settings=own,
        random=random.Random(f"{settings.seed}/real"),
        server=server,
        injectors=REAL,
        restarts_for_torn_files=False,
    )
    try:
        start_s = []
        for index in range(settings.replicas):
            replica = await fleet.add()
            start_s.append(await fleet.ready(replica) - replica.started_at)
            if index == 0:
                await fleet.learn(by_digest, ("authors", "places", "novels"))
            fleet.follow(replica)
        fleet.watch()
        episode = Episode(scene)
        await episode.rounds_until(settings.real_faults)
        return {
            **await episode.result(),
            "database": place.kind,
            "start_s": start_s,
            "answers_across_a_switch": fleet.num_spanned,
        }
    finally:
        await fleet.close()
        await place.close()


def measure_churn(folder: Path, settings: FaultSettings) -> dict[str, Any]:
    """Many switches of one server, with a registry on SQLite."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bundles = make(folder / "bundles")
    replica = RealReplica(0, bundles, folder, f"sqlite:///{folder / 'registry.sqlite'}")
    replica.start()
    try:
        _wait_until_ready(replica)
        with AdminClient(replica.url, token=ADMIN_TOKEN) as client:
            experts = list(bundles.experts.values())
            return churn(client, replica.pid, experts, settings.churn_switches)
    finally:
        replica.kill()


def _wait_until_ready(replica: RealReplica) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while replica.is_alive and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{replica.url}/health/ready", timeout=5, trust_env=False)
            if answer.status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise NotReadyError(f"{replica.name} did not become ready")
