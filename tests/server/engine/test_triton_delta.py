"""The Triton delta against the reference: compiled where there is a GPU, else by Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alter_core.delta import multi_expert_delta
from alter_core.errors import EngineError
from server.engine import triton_delta
from tests.support import triton_process
from tests.support.triton_process import DEVICE, Kernels

SCALING = 1.5
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with triton_process.running() as running:
        yield running


@dataclasses.dataclass
class Site:
    """Tensors of one site and step. Shapes: y (T, O), x (T, I), weights (T, E), A (R, I), B (E, R, O)."""

    y: Tensor
    x: Tensor
    weights: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def args(self) -> tuple[Tensor | float, ...]:
        return self.y, self.x, self.weights, self.lora_a, self.lora_b, SCALING

    def tokens(self, chosen: Tensor) -> Site:
        return dataclasses.replace(
            self, y=self.y[chosen], x=self.x[chosen], weights=self.weights[chosen]
        )

    def expected(self) -> Tensor:
        """By the reference, in float64."""
        x, lora_a, lora_b, weights = (
            t.double() for t in (self.x, self.lora_a, self.lora_b, self.weights)
        )
        delta = multi_expert_delta(x, lora_a, lora_b.transpose(1, 2), weights, SCALING)
        return self.y.double() + delta


def make_site(
    num_tokens: int,
    *,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    num_inputs: int = 1100,
    num_outputs: int = 150,
    num_experts: int = 20,
) -> Site:
    """Tokens with 1, 4 and 0 experts in turn. I crosses slices, and no size is a multiple of its block."""
    draw = torch.Generator().manual_seed(num_tokens + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    weights = torch.zeros(num_tokens, num_experts)
    for token in range(num_tokens):
        count = (1, 4, 0)[token % 3]
        used = torch.randperm(num_experts, generator=draw)[:count]
        weights[token, used] = torch.rand(count, generator=draw) + 0.1
    site = Site(
        y=normal(num_tokens, num_outputs).to(dtype),
        x=normal(num_tokens, num_inputs).to(dtype),
        weights=weights,
        lora_a=(normal(rank, num_inputs) / num_inputs**0.5).to(dtype),
        lora_b=(normal(num_experts, rank, num_outputs) / rank**0.5).to(dtype),
    )
    return Site(**{name: tensor.to(DEVICE) for name, tensor in vars(site).items()})


def add(site: Site, routes: Tensor) -> None:
    """The operator itself: into the site's y, on this process's device."""
    triton_delta.add_expert_delta(site.y, site.x, routes, site.lora_a, site.lora_b, SCALING)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """A few units in the last place of the data type; the interpreter cuts bf16 off instead of rounding."""
    unit = max(torch.finfo(actual.dtype).eps, 2**-20)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * unit, atol=4 * unit)


def same_bits(left: Tensor, right: Tensor) -> bool:
    integer = _INTEGERS[left.dtype]
    return torch.equal(left.view(integer), right.view(integer))


@pytest.mark.parametrize("rank", triton_delta.RANKS)
@pytest.mark.parametrize("dtype", triton_delta.DTYPES)
def test_delta_equals_the_reference(kernels: Kernels, rank: int, dtype: torch.dtype) -> None:
    site = make_site(65, rank=rank, dtype=dtype)
    assert_close(kernels.delta(*site.args()), site.expected())


@pytest.mark.parametrize("num_tokens", [1, 16, 300])
def test_delta_equals_the_reference_at_every_batch_size(kernels: Kernels, num_tokens: int) -> None:
    site = make_site(num_tokens)
    assert_close(kernels.delta(*site.args()), site.expected())


def test_no_tokens_is_no_error(kernels: Kernels) -> None:
    site = make_site(3).tokens(torch.tensor([], dtype=torch.long, device=DEVICE))
    assert kernels.delta(*site.args()).shape == (0, 150)


def test_other_ranks_and_dtypes_are_refused() -> None:
    assert not triton_delta.supports(12, torch.bfloat16)
    assert not triton_delta.supports(128, torch.bfloat16)
    assert not triton_delta.supports(8, torch.float64)
    routes = torch.empty(triton_delta.plan_shape(3, 20), dtype=torch.int32, device=DEVICE)
    with pytest.raises(EngineError, match="rank 12"):
        add(make_site(3, rank=12), routes)
    site = make_site(3)
    site.x = site.x.half()
    with pytest.raises(EngineError, match=r"x torch\.float16"):
        add(site, routes)


def test_an_empty_routing_leaves_y_as_it_is(kernels: Kernels) -> None:
    site = make_site(65)
    site.weights.zero_()
    site.y[:, 3], site.y[:, 4] = -0.0, torch.nan
    assert same_bits(kernels.delta(*site.args()), site.y)


def test_tokens_without_experts_keep_their_bits_and_reach_no_one(kernels: Kernels) -> None:
    site = make_site(65)
    is_unrouted = (site.weights == 0).all(dim=1)
    before = kernels.delta(*site.args())
    site.x[is_unrouted] = torch.nan
    site.y[is_unrouted] = -0.0
    after = kernels.delta(*site.args())
    assert same_bits(after[is_unrouted], site.y[is_unrouted])
    assert same_bits(after[~is_unrouted], before[~is_unrouted])


def test_a_token_with_infinite_features_reaches_no_other(kernels: Kernels) -> None:
    site = make_site(16)
    before = kernels.delta(*site.args())
    site.x[0] = torch.inf
    after = kernels.delta(*site.args())
    assert not after[0].isfinite().all()
    assert same_bits(after[1:], before[1:])


def test_experts_that_no_token_uses_are_not_read(kernels: Kernels) -> None:
    site = make_site(65, num_experts=70)
    used = torch.zeros(70, dtype=torch.bool)
    used[[0, 5, 6, 37, 69]] = True
    site.weights[:, ~used] = 0
    before = kernels.delta(*site.args())
    site.lora_b[~used.to(DEVICE)] = torch.nan
    assert same_bits(kernels.delta(*site.args()), before)


def test_column_parallel_shards_are_the_columns_of_the_whole(kernels: Kernels) -> None:
    site = make_site(65, rank=16, num_outputs=180)
    whole = kernels.delta(*site.args())
    for columns in (slice(0, 90), slice(90, 180)):
        shard = dataclasses.replace(site, y=site.y[:, columns], lora_b=site.lora_b[:, :, columns])
        assert same_bits(kernels.delta(*shard.args()), whole[:, columns])


def test_row_parallel_shards_add_up_to_the_whole(kernels: Kernels) -> None:
    site = make_site(65, rank=16, dtype=torch.float32)
    y = site.y
    for inputs in (slice(0, 550), slice(550, 1100)):
        shard = dataclasses.replace(site, y=y, x=site.x[:, inputs], lora_a=site.lora_a[:, inputs])
        y = kernels.delta(*shard.args())
    assert_close(y, site.expected())


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.bfloat16), (32, torch.float32)])
def test_a_token_gets_the_same_bits_in_every_batch(
    kernels: Kernels, rank: int, dtype: torch.dtype
) -> None:
    site = make_site(300, rank=rank, dtype=dtype)
    whole = kernels.delta(*site.args())
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for chosen in (order, order[:65], order[:9], *order[:6].split(1)):
        alone = kernels.delta(*site.tokens(chosen).args())
        if DEVICE == "cpu" and dtype == torch.float32:
            # Interpreted, a product is numpy's: its last bits may follow from where a row lies.
            torch.testing.assert_close(alone, whole[chosen], rtol=1e-5, atol=1e-5)
        else:
            assert same_bits(alone, whole[chosen])


@dataclasses.dataclass
class Block:
    experts: list[int]
    tokens: list[int]
    weights: Tensor
    """(tokens, E)."""


def read_plan(plan: Tensor, num_experts: int) -> list[Block]:
    blocks = []
    sizes = [1, num_experts, triton_delta.BLOCK_TOKENS, triton_delta.BLOCK_TOKENS * num_experts]
    for row in plan.cpu():
        count, experts, tokens, bits = row.split(sizes)
        weights = bits.clone().view(torch.float32).reshape(-1, num_experts)
        assert not weights[tokens < 0].any()
        is_token = tokens >= 0
        blocks.append(Block(experts[:count].tolist(), tokens[is_token].tolist(), weights[is_token]))
    return blocks


@pytest.mark.parametrize("num_tokens", [1, 16, 65, 300])
def test_plan_holds_every_routed_token_once_with_its_blocks_experts(
    kernels: Kernels, num_tokens: int
) -> None:
    weights = make_site(num_tokens, num_experts=70).weights
    plan = kernels.plan(weights)
    assert plan.shape == triton_delta.plan_shape(num_tokens, 70)
    blocks = read_plan(plan, 70)
    routed = weights.any(dim=1).nonzero().flatten().tolist()
    assert sorted(token for block in blocks for token in block.tokens) == routed
    for block in blocks:
        assert torch.equal(block.weights, weights[block.tokens].cpu())
        assert block.experts == weights[block.tokens].any(dim=0).nonzero().flatten().tolist()
    is_empty = [not block.tokens for block in blocks]
    assert is_empty == sorted(is_empty), "blocks with work come first"


def test_plan_puts_tokens_of_one_expert_together(kernels: Kernels) -> None:
    experts = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0)) * 16 + 1
    weights = torch.zeros(300, 80)
    weights[torch.arange(300), experts] = 1
    blocks = read_plan(kernels.plan(weights.to(DEVICE)), 80)
    assert sum(len(block.experts) for block in blocks) <= len(blocks) + 4
    tokens = [token for block in blocks for token in block.tokens]
    assert tokens == experts.sort(stable=True).indices.tolist()


_POINTERS = {"weights": "*fp32", "routes": "*i32", "partials": "*fp32", "keys": "*i32"}


def _ptx(kernel: Any, capability: int, **constants: Any) -> str:
    """As the launcher would compile it for a contiguous bf16 site whose sizes are multiples of 16."""
    names = kernel.arg_names
    constants |= {name: 1 for name in names if name in ("stride_xi", "stride_ai", "stride_yo")}
    constants |= {name: 1 for name in names if name in ("stride_we", "stride_bo")}
    kinds = _POINTERS | dict.fromkeys(("x", "y", "lora_a", "lora_b"), "*bf16")
    kinds |= {"scaling": "fp32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names}
    aligned = [n for n in names if n not in constants and not n.startswith(("num_", "scaling"))]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"enable_fp_fusion": False, "num_warps": 4, "num_stages": 3}
    return str(triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"])


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_with_one_kind_of_matrix_instruction(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = {"NUM_EXPERTS": 66, "BLOCK_T": triton_delta.BLOCK_TOKENS}
    _ptx(triton_delta._token_keys, capability, **shared, EXPERTS_PADDED=128)
    _ptx(triton_delta._sort_tokens, capability, **shared, SORT_T=128)
    _ptx(triton_delta._list_experts, capability, **shared, EXPERTS_PADDED=128)
    shared |= {"RANK": 8, "RANK_PADDED": 16, "WIDEN": False}
    shrink = {"NUM_INPUTS": 4096, "SLICE_I": 512, "BLOCK_I": 128}
    found = [_ptx(triton_delta._shrink, capability, **shared, **shrink)]
    for tiling in (triton_delta.DECODE, triton_delta.PREFILL):
        expand = {"NUM_OUTPUTS": 12288, "NUM_SLICES": 8, "NUM_TILES": tiling.num_tiles}
        expand["BLOCK_O"] = tiling.block_outputs
        found.append(_ptx(triton_delta._expand, capability, **shared, **expand))
    for ptx in found:
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in ptx
        assert "wgmma" not in ptx
        assert "tcgen05" not in ptx
        assert "atom." not in ptx
        assert "cp.async" in ptx, "loads of the loop are not pipelined"


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 300])
def test_a_captured_graph_follows_the_weights(num_tokens: int) -> None:
    site = make_site(num_tokens, num_experts=70)
    before, drawn = site.y.clone(), site.weights.clone()

    def step() -> None:
        add(site, triton_delta.plan(site.weights))

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for weights in (drawn.flip(0), torch.zeros_like(drawn), drawn.roll(1, dims=1)):
        site.weights.copy_(weights)
        site.y.copy_(before)
        graph.replay()
        replayed = site.y.clone()
        site.y.copy_(before)
        step()
        assert same_bits(replayed, site.y)
        site.y.copy_(before)
        assert_close(replayed, site.expected())
