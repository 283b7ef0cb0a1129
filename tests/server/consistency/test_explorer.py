"""No state of the model lets a stale replica answer, and each rule that is broken is noticed."""

from __future__ import annotations

import pytest

from .explorer import Explorer, Rules

# A second replica only adds to what a barrier waits for; the large searches are to show just that.
SEARCHES = [
    pytest.param(1, 2, Rules(), id="one-replica-two-changes"),
    pytest.param(2, 1, Rules(lease=1), marks=pytest.mark.slow, id="two-replicas-one-change"),
    pytest.param(
        1, 2, Rules(lease=3, margin=2, skew=2), marks=pytest.mark.slow, id="a-longer-lease"
    ),
]

DEFECTS = {
    "a holder goes on after its lease": (1, Rules(holder_stops=False)),
    "a lease counts from the answer": (1, Rules(counts_from="answer")),
    "a barrier asks nobody": (1, Rules(barrier="none")),
    "a barrier is passed once anybody has applied": (2, Rules(barrier="any")),
    "a laggard gets a lease": (1, Rules(grants_to_laggards=True)),
    "a laggard's lease is prolonged for ever": (1, Rules(prolongs_laggards=True)),
    "a switch is reported before the commit": (1, Rules(reports="begun")),
    "a server starts without the domains": (1, Rules(start="empty", grants_to_laggards=True)),
    "a server answers before its first lease": (1, Rules(waits_for_lease=False)),
    "a server says that it failed, then stops": (1, Rules(failing="reports first")),
    "a clock falls behind by more than the margin": (1, Rules(skew=2)),
    "a registry without a margin": (1, Rules(margin=0)),
}


@pytest.mark.parametrize(("num_replicas", "num_changes", "rules"), SEARCHES)
def test_no_reachable_state_lets_a_stale_replica_answer(
    num_replicas: int, num_changes: int, rules: Rules
) -> None:
    explorer = Explorer(rules, num_replicas=num_replicas, num_changes=num_changes)
    assert explorer.search() is None
    assert explorer.num_states > 50_000


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_broken_rule_is_noticed(defect: str) -> None:
    num_replicas, rules = DEFECTS[defect]
    violation = Explorer(rules, num_replicas=num_replicas, num_changes=1).search()
    assert violation is not None
    assert violation.trace
