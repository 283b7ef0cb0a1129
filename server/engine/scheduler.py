"""vLLM's scheduler, for a switch that recomputes only what it can have changed.

`alter serve` names it with vLLM's own `scheduler_cls`. It schedules as vLLM's does; only
`reset_prefix_cache` can do more: let requests keep their keys and values and their place, and end the pause.
Which ones, the workers say (`AlterWorkerMixin.alter_commit`); what makes one doubtful here, it is
recomputed all the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared
from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus


class AlterScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's synchronous scheduler with a reset of the prefix cache that can spare requests."""

    def reset_prefix_cache(
        self,
        reset_running_requests: bool | Mapping[str, Mapping[str, int]] = False,
        reset_connector: bool = False,
    ) -> Any:
        """Drops the prefix cache whole; preempts running requests.

        `reset_running_requests` is vLLM's flag, or `{"untouched": {request: tokens}}`: requests that the
        change does not touch within their first `tokens` tokens. Such a mapping is true, so that vLLM's
        own scheduler would recompute everything. With it generation goes on afterwards, paused or not, and
        the answer is a mapping too: `kept_requests`, `recomputed_requests` and `recomputed_tokens`, those
        computed before.

        No request ever finds a block from before by its hash, not even one of a kept request; two that
        share such blocks and are both kept go on sharing them.

        Raises: RuntimeError, as vLLM does, if something else holds keys and values.
        """
        if not isinstance(reset_running_requests, Mapping):
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        kept = self._requests_to_keep(reset_running_requests["untouched"])
        spared = set(kept)
        others = [request for request in self.running if request not in spared]
        report = {
            "kept_requests": len(kept),
            "recomputed_requests": len(others),
            "recomputed_tokens": sum(request.num_computed_tokens for request in others),
        }
        if not kept:
            if not super().reset_prefix_cache(True, reset_connector):
                raise RuntimeError(
                    "vLLM could not drop everything that it keeps of earlier requests"
                )
            self.set_pause_state(PauseState.UNPAUSED)
            return report
        self.running[:] = kept
        timestamp = time.monotonic()
        for request in reversed(others):  # first of the queue is who was first in the batch
            self._preempt_request(request, timestamp, drop_stale_output=True)
        # The runner drops and adds again who is preempted and resumed in one step, and only them.
        self.prev_step_scheduled_req_ids.difference_update(r.request_id for r in others)
        self._forget_cached_blocks(kept)
        self.set_pause_state(PauseState.UNPAUSED)
        return report

    def _requests_to_keep(self, untouched: Mapping[str, int]) -> list[Request]:
        """Of the running requests those that the workers vouch for and that raise no doubt, in order."""
        pools = {id(m.block_pool) for m in self.kv_cache_manager.coordinator.single_type_managers}
        connectors = (self.connector, self.ec_connector, self.aux_output_connector)
        if len(pools) != 1 or any(connector is not None for connector in connectors):
            return []
        return [
            request
            for request in self.running
            if request.num_tokens == untouched.get(request.request_id) and self._is_plain(request)
        ]

    def _is_plain(self, request: Request) -> bool:
        """True for text that is decoded, one token a step, with nothing in flight."""
        return (
            request.status == RequestStatus.RUNNING
            and request.num_output_tokens > 0
            and request.num_computed_tokens == request.num_tokens - 1
            and request.prompt_token_ids is not None
            and request.prompt_embeds is None
            and request.pooling_params is None
            and request.lora_request is None
            and not request.has_encoder_inputs
            and not request.resumable
            and not request.spec_token_ids
            and not request.num_in_flight_tokens
            and not request.num_output_placeholders
            and not request.num_stale_output_tokens
        )

    def _forget_cached_blocks(self, kept: list[Request]) -> None:
        """`BlockPool.reset_prefix_cache`, which wants every block free, with those of `kept` in use."""
        manager = self.kv_cache_manager
        pool: BlockPool = manager.block_pool
        blocks_in_use = {pool.null_block.block_id}
        for request in kept:
            blocks_in_use.update(*manager.get_block_ids(request.request_id))
        num_used = pool.num_gpu_blocks - pool.get_num_free_blocks()
        if num_used != len(blocks_in_use):
            raise RuntimeError(
                f"{num_used - len(blocks_in_use)} blocks of keys and values belong to no running request"
            )
        if pool.enable_caching:
            self._cache_only_later_blocks(kept)
        pool.cached_block_hash_to_block = BlockHashToBlockMap()
        pool.cached_block_hashes_by_block.clear()
        for block in pool.blocks:
            block.reset_hash()
        if pool.metrics_collector:
            pool.metrics_collector.reset()
        if pool.enable_kv_cache_events:
            pool.kv_event_queue.append(AllBlocksCleared())
        if manager.log_stats:
            manager.prefix_cache_stats.reset = True

    def _cache_only_later_blocks(self, kept: list[Request]) -> None:
        """From now on only blocks without a token from before enter the prefix cache.

        Each manager caches from its count of cached blocks on, so the count passes the block that is
        half full.
        """
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            for request in kept:
                num_begun = -(-request.num_computed_tokens // manager.block_size)
                manager.num_cached_block[request.request_id] = num_begun
