"""Triton kernels of the experts' delta, Eq. 6 and 9: what the GPU runs for `alter_core.delta`.

Once a step `plan` sorts the tokens by the experts that they use, cuts them into blocks and lists the experts
of every block, in one tensor that all sites read; then each site runs two kernels over the blocks:

    shrink    s = A x             in slices of I, each to its own float32 partial
    expand    y += B_e (w_e s)    the partials summed in order, then the block's experts in order

All on the device with grids that depend on shapes alone: nothing synchronises with the host, and CUDA graphs
replay it with other weights. A block without a routed token returns at once; B is read for a block's own
experts only, so a site's cost does not grow with E; the plan's does, once a step.

A token's result does not depend on its batch: tiles are 16 tokens by the same slices of I at every T, sums
have one order, there are no atomics, and an expert that only a neighbour uses adds a zero to a float32 sum
that is never -0 (B is finite: bundles are checked, empty slots are 0). That leans on one thing outside this
file: that a matrix instruction computes each row of its tile alike and apart. Tiles are kept at 16 rows so
that one kind of instruction serves every T. Across GPU models, Triton versions or tensor-parallel sizes,
results may differ in rounding.

Legend: T tokens, G blocks of tokens, E experts, R rank, I input features, O output features.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from alter_core.errors import EngineError

RANKS = (8, 16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_TOKENS = 16
"""Tokens of a block: the fewest rows that a matrix instruction takes."""

_UNROUTED = tl.constexpr(2**31 - 1)
"""Sort key of a token without experts: behind all others."""
_SORT_TOKENS = 128
"""Keys that a token is compared with at a time."""
_DECODE_TOKENS = 64
_EXACT = {"enable_fp_fusion": False}
"""Roundings as written: Triton's default differs from version to version."""
_IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Without a device (TRITON_INTERPRET=1). The interpreter's dot takes bf16 for integers: widen them there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How expand cuts O. Changes the speed, never a result."""

    block_outputs: int
    """Columns of one tile."""
    num_tiles: int
    """Tiles that one program computes after summing the partials once."""
    num_warps: int
    num_stages: int


DECODE = Tiling(block_outputs=64, num_tiles=1, num_warps=2, num_stages=3)
"""Few blocks: many programs, so that every multiprocessor reads its part of B."""
PREFILL = Tiling(block_outputs=128, num_tiles=4, num_warps=4, num_stages=3)
"""Many blocks: wide tiles, and the partials read once for four of them."""


def supports(rank: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take A and B of this rank and data type."""
    return rank in RANKS and dtype in DTYPES


def plan_shape(num_tokens: int, num_experts: int) -> tuple[int, int]:
    """Shape of a plan. No branch on `num_tokens`, which may be symbolic."""
    num_blocks = (num_tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    return num_blocks, 1 + num_experts + BLOCK_TOKENS * (1 + num_experts)


def plan(weights: Tensor) -> Tensor:
    """Groups a step's tokens by the experts that they use; all sites share the result.

    A row is a block: the number of experts in use; those experts in rising order (E places, the rest
    undefined); the block's 16 tokens (-1 for none); their weights (16, E) in float32's bits. Tokens with the
    same experts stand together, in their own order; those without experts stand nowhere.

    Shapes: weights (T, E) float32 -> (G, 1 + E + 16 + 16 E) int32.
    """
    num_tokens, num_experts = weights.shape
    routes = torch.empty(
        plan_shape(num_tokens, num_experts), dtype=torch.int32, device=weights.device
    )
    num_blocks = routes.shape[0]
    if num_blocks == 0:
        return routes
    keys = torch.empty(num_blocks * BLOCK_TOKENS, dtype=torch.int32, device=weights.device)
    sizes = {"NUM_EXPERTS": num_experts, "BLOCK_T": BLOCK_TOKENS}
    padded = {"EXPERTS_PADDED": triton.next_power_of_2(num_experts)}
    _token_keys[(num_blocks,)](
        weights, keys, num_tokens, *weights.stride(), **sizes, **padded, **_EXACT
    )
    _sort_tokens[(num_blocks,)](keys, routes, len(keys), **sizes, SORT_T=_SORT_TOKENS, **_EXACT)
    _list_experts[(num_blocks,)](weights, routes, *weights.stride(), **sizes, **padded, **_EXACT)
    return routes


def add_expert_delta(
    y: Tensor,
    x: Tensor,
    routes: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
) -> None:
    """y += scaling * sum_e w_e B_e A x, in place; rows of y without a weight are not touched.

    Sums in float32; rounds w_e A x to x.dtype, as `multi_expert_delta` does, and the sum once, into y.
    `routes` is `plan(weights)`.

    Shapes: y (T, O), x (T, I), routes (G, ...) int32, lora_a (R, I), lora_b (E, R, O).
    Raises: EngineError for a rank or data type that `supports` denies.
    """
    rank, num_inputs = lora_a.shape
    num_experts, _, num_outputs = lora_b.shape
    if not supports(rank, lora_a.dtype) or not x.dtype == y.dtype == lora_a.dtype == lora_b.dtype:
        raise EngineError(
            "The Triton delta cannot take this site",
            expected=f"rank in {RANKS}, one dtype in {DTYPES}",
            got=f"rank {rank}, x {x.dtype}, y {y.dtype}, A {lora_a.dtype}, B {lora_b.dtype}",
            fix="Ask supports() first, and take the dense path where it says no.",
        )
    assert routes.shape == plan_shape(len(x), num_experts), "the plan is of another step"
    num_blocks = routes.shape[0]
    if num_blocks == 0:
        return
    slice_inputs = _slice_inputs(rank)
    num_slices = triton.cdiv(num_inputs, slice_inputs)
    partials = torch.empty(
        (num_slices, num_blocks * BLOCK_TOKENS, rank), dtype=torch.float32, device=x.device
    )
    sizes = {
        "NUM_EXPERTS": num_experts,
        "RANK": rank,
        "BLOCK_T": BLOCK_TOKENS,
        "RANK_PADDED": max(16, rank),
        "WIDEN": _IS_INTERPRETED,
    }
    _shrink[(num_blocks, num_slices)](
        x,
        lora_a,
        routes,
        partials,
        *x.stride(),
        *lora_a.stride(),
        partials.stride(0),
        **sizes,
        NUM_INPUTS=num_inputs,
        SLICE_I=slice_inputs,
        BLOCK_I=128,
        num_warps=4,
        num_stages=3,
        **_EXACT,
    )
    tiling = DECODE if len(x) <= _DECODE_TOKENS else PREFILL
    columns = tiling.block_outputs * tiling.num_tiles
    _expand[(num_blocks, triton.cdiv(num_outputs, columns))](
        y,
        lora_b,
        routes,
        partials,
        scaling,
        *y.stride(),
        *lora_b.stride(),
        partials.stride(0),
        **sizes,
        NUM_OUTPUTS=num_outputs,
        NUM_SLICES=num_slices,
        BLOCK_O=tiling.block_outputs,
        NUM_TILES=tiling.num_tiles,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **_EXACT,
    )


def _slice_inputs(rank: int) -> int:
    """Input features of one partial. Of the rank alone: a slice that moved with T would move the rounding."""
    return 512 if rank <= 16 else 1024


@triton.jit(do_not_specialize=["num_tokens"])  # type: ignore[untyped-decorator]
def _token_keys(
    weights: tl.tensor,
    keys: tl.tensor,
    num_tokens: tl.tensor,
    stride_wt: tl.tensor,
    stride_we: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
) -> None:
    """Equal experts, equal key: the highest expert, then one bit an expert, modulo 16."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, EXPERTS_PADDED)
    loaded = tl.load(
        weights + tokens[:, None].to(tl.int64) * stride_wt + experts[None, :] * stride_we,
        mask=(tokens[:, None] < num_tokens) & (experts[None, :] < NUM_EXPERTS),
        other=0.0,
    )
    is_used = loaded != 0
    highest = tl.max(tl.where(is_used, experts[None, :], -1), axis=1)
    bits = tl.sum(tl.where(is_used, 1 << (experts % 16)[None, :], 0), axis=1)
    # Masks keep every key below _UNROUTED; where they or the modulo merge two sets, only the order blurs.
    key = tl.where(highest >= 0, ((highest & 0x3FF) << 20) + (bits & 0xFFFFF), _UNROUTED)
    tl.store(keys + tokens, key)


@triton.jit(do_not_specialize=["num_keys"])  # type: ignore[untyped-decorator]
def _sort_tokens(
    keys: tl.tensor,
    routes: tl.tensor,
    num_keys: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SORT_T: tl.constexpr,
) -> None:
    """Places each token by counting those before it: stable, and every place is written once."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    own = tl.load(keys + tokens)
    place = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start in range(0, num_keys, SORT_T):
        others = start + tl.arange(0, SORT_T)
        # Keys behind the last count as unrouted, and as later than any token.
        other = tl.load(keys + others, mask=others < num_keys, other=_UNROUTED)
        is_before = (other[None, :] < own[:, None]) | (
            (other[None, :] == own[:, None]) & (others[None, :] < tokens[:, None])
        )
        place += tl.sum(is_before.to(tl.int32), axis=1)
    width = 1 + NUM_EXPERTS + BLOCK_T * (1 + NUM_EXPERTS)
    target = routes + (place // BLOCK_T) * width + 1 + NUM_EXPERTS + place % BLOCK_T
    tl.store(target, tl.where(own == _UNROUTED, -1, tokens))


@triton.jit  # type: ignore[untyped-decorator]
def _list_experts(
    weights: tl.tensor,
    routes: tl.tensor,
    stride_wt: tl.tensor,
    stride_we: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
) -> None:
    """Writes how many experts each block uses, which, and the weights of its tokens."""
    row = routes + tl.program_id(0) * (1 + NUM_EXPERTS + BLOCK_T * (1 + NUM_EXPERTS))
    tokens = tl.load(row + 1 + NUM_EXPERTS + tl.arange(0, BLOCK_T))
    experts = tl.arange(0, EXPERTS_PADDED)
    loaded = tl.load(
        weights + tokens[:, None].to(tl.int64) * stride_wt + experts[None, :] * stride_we,
        mask=(tokens[:, None] >= 0) & (experts[None, :] < NUM_EXPERTS),
        other=0.0,
    )
    tl.store(
        row
        + (1 + NUM_EXPERTS + BLOCK_T)
        + tl.arange(0, BLOCK_T)[:, None] * NUM_EXPERTS
        + experts[None, :],
        loaded.to(tl.int32, bitcast=True),
        mask=experts[None, :] < NUM_EXPERTS,
    )
    is_used = tl.max((loaded != 0).to(tl.int32), axis=0)
    tl.store(row, tl.sum(is_used, axis=0))
    tl.store(row + tl.cumsum(is_used, axis=0), experts, mask=is_used > 0)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    x: tl.tensor,
    lora_a: tl.tensor,
    routes: tl.tensor,
    partials: tl.tensor,
    stride_xt: tl.tensor,
    stride_xi: tl.tensor,
    stride_ar: tl.tensor,
    stride_ai: tl.tensor,
    stride_ps: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    SLICE_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """partials[slice, block's tokens] = x A^T over one slice of I."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    row = routes + block * (1 + NUM_EXPERTS + BLOCK_T * (1 + NUM_EXPERTS))
    if tl.load(row) == 0:
        return
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, RANK_PADDED)
    tokens = tl.load(row + 1 + NUM_EXPERTS + rows)
    x_rows = x + tokens[:, None].to(tl.int64) * stride_xt
    a_columns = lora_a + ranks[None, :] * stride_ar
    total = tl.zeros((BLOCK_T, RANK_PADDED), dtype=tl.float32)
    for step in range(SLICE_I // BLOCK_I):
        inputs = part * SLICE_I + step * BLOCK_I + tl.arange(0, BLOCK_I)
        is_input = inputs < NUM_INPUTS
        x_TI = tl.load(
            x_rows + inputs[None, :] * stride_xi,
            mask=(tokens[:, None] >= 0) & is_input[None, :],
            other=0.0,
        )
        a_IR = tl.load(
            a_columns + inputs[:, None] * stride_ai,
            mask=is_input[:, None] & (ranks[None, :] < RANK),
            other=0.0,
        )
        if WIDEN:
            x_TI, a_IR = x_TI.to(tl.float32), a_IR.to(tl.float32)
        total = tl.dot(x_TI, a_IR, total, input_precision="ieee")
    places = block * BLOCK_T + rows
    tl.store(
        partials + part.to(tl.int64) * stride_ps + places[:, None] * RANK + ranks[None, :],
        total,
        mask=ranks[None, :] < RANK,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    y: tl.tensor,
    lora_b: tl.tensor,
    routes: tl.tensor,
    partials: tl.tensor,
    scaling: tl.tensor,
    stride_yt: tl.tensor,
    stride_yo: tl.tensor,
    stride_be: tl.tensor,
    stride_br: tl.tensor,
    stride_bo: tl.tensor,
    stride_ps: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    NUM_TILES: tl.constexpr,
) -> None:
    """y[block's tokens, some columns] += sum over the block's experts of (w_e s) B_e."""
    block = tl.program_id(0)
    row = routes + block * (1 + NUM_EXPERTS + BLOCK_T * (1 + NUM_EXPERTS))
    num_used = tl.load(row)
    if num_used == 0:
        return
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, RANK_PADDED)
    tokens = tl.load(row + 1 + NUM_EXPERTS + rows)
    is_token = tokens >= 0
    tokens = tokens.to(tl.int64)
    places = block * BLOCK_T + rows
    shrunk_TR = tl.zeros((BLOCK_T, RANK_PADDED), dtype=tl.float32)
    for part in range(NUM_SLICES):
        shrunk_TR += tl.load(
            partials + part * stride_ps + places[:, None] * RANK + ranks[None, :],
            mask=ranks[None, :] < RANK,
            other=0.0,
        )
    shrunk_TR *= scaling
    for tile in range(NUM_TILES):
        outputs = (tl.program_id(1) * NUM_TILES + tile) * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output = outputs < NUM_OUTPUTS
        delta_TO = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
        for used in range(num_used):
            expert = tl.load(row + 1 + used)
            weight = tl.load(row + (1 + NUM_EXPERTS + BLOCK_T) + rows * NUM_EXPERTS + expert).to(
                tl.float32, bitcast=True
            )
            gated_TR = weight[:, None] * shrunk_TR
            b_RO = tl.load(
                lora_b
                + expert.to(tl.int64) * stride_be
                + ranks[:, None] * stride_br
                + outputs[None, :] * stride_bo,
                mask=(ranks[:, None] < RANK) & is_output[None, :],
                other=0.0,
            )
            gated_TR = gated_TR.to(b_RO.dtype)
            if WIDEN:
                gated_TR, b_RO = gated_TR.to(tl.float32), b_RO.to(tl.float32)
            delta_TO = tl.dot(gated_TR, b_RO, delta_TO, input_precision="ieee")
        y_TO = y + tokens[:, None] * stride_yt + outputs[None, :] * stride_yo
        is_ours = is_token[:, None] & is_output[None, :]
        before = tl.load(y_TO, mask=is_ours, other=0.0).to(tl.float32)
        tl.store(y_TO, (before + delta_TO).to(y.dtype.element_ty), mask=is_ours)
