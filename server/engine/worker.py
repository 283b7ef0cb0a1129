"""vLLM worker classes that install ALTER and answer its remote calls.

Remote methods return plain types only: they travel through vLLM's message queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from alter_core.errors import EngineError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .evidence_bank import StepTokens
from .hook import install

_CANARY_SEED = 20260301
_STAGING_NICENESS = 5
"""Gives a thread that reads a bundle a quarter of a core that is wanted by a step too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Occupant:
    """All that a slot holds, to be put there or to be put back."""

    digest: str | None
    lora_b: dict[str, Tensor] | None
    head: EvidenceHead | None


_EMPTY = _Occupant(digest=None, lora_b=None, head=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Undo:
    """What a commit put an end to."""

    epoch: int
    """The epoch that the commit began."""
    epoch_before: int
    slot: int
    occupant: _Occupant


class AlterWorkerMixin:
    """Loads the model, attaches the substrate, and switches experts on request."""

    vllm_config: Any
    model_runner: Any
    device: torch.device

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Loads as vLLM does, then installs, before profiling, compilation and graph capture."""
        super().load_model(load_dummy_weights=load_dummy_weights)  # type: ignore[misc]
        settings = self.vllm_config.additional_config["alter"]
        scheduler = self.vllm_config.scheduler_config
        self._substrate = Substrate.read(Path(settings["substrate"]))
        # `alter serve` names what it has verified; who builds an engine without it reads its own files.
        wanted = settings.get("substrate_digest", self._substrate.digest)
        if self._substrate.digest != wanted:
            raise EngineError(
                "The substrate changed between verification and loading",
                expected=wanted,
                got=str(self._substrate.digest),
            )
        self._gate, self._slots = install(
            self.model_runner.get_model(),
            self._substrate,
            architecture=self.vllm_config.model_config.architectures[0],
            max_domains=settings["max_domains"],
            max_tokens=scheduler.max_num_batched_tokens,
            vocab_size=self.vllm_config.model_config.get_vocab_size(),
            dtype=self.vllm_config.model_config.dtype,
            device=self.device,
        )
        self._digests: list[str | None] = [None] * settings["max_domains"]
        self._staging: tuple[str, Future[_Occupant]] | None = None
        self._undo: _Undo | None = None
        self._epoch = 0
        self._wrap_model_forward()

    def _wrap_model_forward(self) -> None:
        runner, gate = self.model_runner, self._gate
        model_forward = runner._model_forward

        def routed_model_forward(input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if input_ids is None:
                raise EngineError(
                    "A step came without token ids, so nothing could be routed",
                    expected="token ids",
                    got="prompt embeddings",
                    fix="Serve without --enable-prompt-embeds.",
                )
            gate.prepare(_step_tokens(runner), input_ids.shape[0])
            output = model_forward(input_ids, *args, **kwargs)
            gate.record()
            return output

        runner._model_forward = routed_model_forward

    def alter_stage(self, bundle: str, digest: str) -> None:
        """Reads, verifies and shards an expert into host memory. Nothing that runs changes."""
        self._start_staging(bundle, digest).result()

    def alter_start_staging(self, bundle: str, digest: str) -> None:
        """As `alter_stage` in a thread, beside the steps; takes the place of what was staged before."""
        self._start_staging(bundle, digest)

    def alter_is_staged(self, digest: str) -> bool:
        """Whether the thread is done. Raises: what `alter_stage` would."""
        staged = self._staged(digest)
        if staged.done():
            staged.result()
        return staged.done()

    def alter_prepare(self, digest: str) -> None:
        """Readies the router for what is staged, on all ranks at once; a single rank has done it already."""
        head = self._staged(digest).result(timeout=0).head
        assert head is not None
        self._gate.bank.prepare(head)

    def alter_unstage(self) -> None:
        """Lets go of what is staged; a thread that still reads ends for nothing."""
        self._staging = None

    def _start_staging(self, bundle: str, digest: str) -> Future[_Occupant]:
        staged: Future[_Occupant] = Future()

        def stage() -> None:
            # A CPU worker is bound to the cores that its steps need; whoever started it is not. Linux: both
            # calls are for this thread alone.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STAGING_NICENESS)
            try:
                staged.set_result(self._read(bundle, digest))
            except Exception as error:
                staged.set_exception(error)

        self._staging = (digest, staged)
        threading.Thread(target=stage, name="alter-stage", daemon=True).start()
        return staged

    def _read(self, bundle: str, digest: str) -> _Occupant:
        expert = ForgetExpert.read(Path(bundle), self._substrate)
        if expert.digest != digest:
            raise EngineError(
                "The bundle changed between verification and staging",
                expected=digest,
                got=str(expert.digest),
            )
        lora_b = self._slots.shard_expert(expert.lora_b)
        if self.vllm_config.parallel_config.tensor_parallel_size == 1:
            # On several ranks embeddings are collective, and `alter_prepare` asks for them between steps.
            self._gate.bank.prepare(expert.evidence)
        return _Occupant(digest=digest, lora_b=lora_b, head=expert.evidence)

    def _staged(self, digest: str) -> Future[_Occupant]:
        if self._staging is None or self._staging[0] != digest:
            raise EngineError(
                "No such expert is staged",
                expected=digest,
                got="none" if self._staging is None else self._staging[0],
            )
        return self._staging[1]

    def alter_commit(self, epoch: int, slot: int, digest: str | None) -> dict[str, Any]:
        """Puts the staged expert into a slot, or empties it (None), and begins an epoch.

        Returns `alter_state` and, as `untouched`, the number of tokens by id of each request that neither
        the expert that goes nor the one that comes touches. All ranks scan the same requests as often:
        embeddings of a sharded table are collective.
        """
        occupant = _EMPTY if digest is None else self._staged(digest).result(timeout=0)
        before = self._untouched(slot)
        self._undo = _Undo(
            epoch=epoch, epoch_before=self._epoch, slot=slot, occupant=self._occupant(slot)
        )
        self._occupy(slot, occupant)
        self._gate.reset_counts(slot + 1)
        self._staging = None
        self._epoch = epoch
        untouched = before.items() & self._untouched(slot).items()
        return self.alter_state() | {"untouched": dict(untouched)}

    def alter_rollback(self, epoch: int) -> None:
        """Undoes the commit that began this epoch, if there was one and it is not confirmed."""
        self._staging = None
        if (undo := self._undo) is not None and undo.epoch == epoch:
            self._occupy(undo.slot, undo.occupant)
            self._epoch, self._undo = undo.epoch_before, None

    def alter_confirm(self, epoch: int) -> None:
        """Lets go of what a rollback of the commit that began this epoch would need."""
        if self._undo is not None and self._undo.epoch == epoch:
            self._undo = None

    def _occupant(self, slot: int) -> _Occupant:
        """A copy of what a slot holds."""
        digest = self._digests[slot]
        if digest is None:
            return _EMPTY
        return _Occupant(
            digest=digest,
            lora_b=self._slots.read(slot + 1),
            head=self._gate.bank.head(slot + 1),
        )

    def _occupy(self, slot: int, occupant: _Occupant) -> None:
        self._slots.write(slot + 1, occupant.lora_b)
        self._gate.bank.set_head(slot + 1, occupant.head)
        self._digests[slot] = occupant.digest

    def _untouched(self, slot: int) -> dict[str, int]:
        """Number of tokens by id of each request that the expert in a slot does not touch, if there is one.

        What it changes by less than the served type can resolve at 1 does not count.
        """
        rounding = torch.finfo(self.vllm_config.model_config.dtype).eps / 2
        is_empty = self._digests[slot] is None
        untouched = {}
        for request in self.model_runner.requests:
            token_ids = self._token_ids(request)
            if token_ids is not None and (
                is_empty or not self._gate.bank.touches(slot + 1, token_ids, tolerance=rounding)
            ):
                untouched[request] = len(token_ids)
        return untouched

    def _token_ids(self, request: str) -> NDArray[np.int32] | None:
        """All token ids of a request; None for one that also has embeddings."""
        batch, state = self.model_runner.input_batch, self.model_runner.requests[request]
        if (row := batch.req_id_to_index.get(request)) is not None:
            num_tokens = int(batch.num_tokens_no_spec[row])
            is_text = batch.is_token_ids[row, :num_tokens].all()
            return batch.token_ids_cpu[row, :num_tokens] if is_text else None
        # A step without tokens, as while paused, takes every request out of the batch.
        if state.prompt_token_ids is None or state.prompt_embeds is not None:
            return None
        return np.array([*state.prompt_token_ids, *state.output_token_ids], dtype=np.int32)

    def alter_state(self) -> dict[str, Any]:
        """What this worker applies."""
        return {"epoch": self._epoch, "digests": list(self._digests)}

    def alter_routed_tokens(self) -> list[list[int]]:
        """[high, low] by expert index."""
        return self._gate.routed_tokens()

    def alter_trace(self, requests: str | None) -> list[dict[str, Any]]:
        """Begins to trace the requests whose ids begin so, or ends it (None); see `TracedRows.listed`."""
        trace, self._gate.trace = self._gate.trace, []
        self._gate.traced = requests
        return [rows.listed(self._gate.config.entropy_threshold) for rows in trace]

    def alter_sites(self) -> list[str]:
        """Names of the adapted sites."""
        return list(self._slots.sites)

    def alter_plant(self, site_name: str | None) -> None:
        """Routes every token to a random expert at one site; None takes it out again."""
        slots = self._slots
        slots.write(slots.canary, None)
        self._gate.is_canary_planted = site_name is not None
        if site_name is not None:
            target = slots.sites[site_name].lora_b[slots.canary]
            generator = torch.Generator().manual_seed(_CANARY_SEED)
            target.copy_(torch.randn(target.shape, generator=generator))


class AlterGPUWorker(AlterWorkerMixin, Worker):  # type: ignore[misc]
    """vLLM's GPU worker with ALTER installed."""


class AlterCPUWorker(AlterWorkerMixin, CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker with ALTER installed."""


def _step_tokens(runner: Any) -> StepTokens | None:
    """The requests of the step that the runner has just prepared."""
    batch = runner.input_batch
    num_requests = batch.num_reqs
    if num_requests == 0:
        return None
    return StepTokens(
        request_ids=batch.req_ids[:num_requests],
        token_ids=batch.token_ids_cpu,
        starts=batch.num_computed_tokens_cpu[:num_requests].astype(np.int64),
        counts=np.diff(runner.query_start_loc.np[: num_requests + 1]).astype(np.int64),
    )
