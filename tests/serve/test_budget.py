from __future__ import annotations

import pytest

from omni_jax.serve.budget import Budget, Share, client_name


def test_budget_is_shared_and_each_client_has_a_part() -> None:
    budget = Budget(10, 6)
    with Share(budget, "a") as share, Share(budget, "b") as other:
        assert share.take(6)
        assert not share.take(1)
        assert (budget.left("a"), budget.left("b"), budget.left(None)) == (0, 4, 4)
        assert not other.take(5)
        assert other.take(4)
        other.give_back()
        assert budget.left("b") == 4
    assert (budget.left("a"), budget.left(None)) == (6, 10)
    with Share(budget, None) as proxy:
        # One that stands for many.
        assert proxy.take(10)
        assert not Share(budget, "a").take(1)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_client_name(address: str, name: str) -> None:
    assert client_name(address) == name


def test_change_keeps_what_was_taken_if_more_does_not_fit() -> None:
    budget = Budget(10, 6)
    share, other = Share(budget, "a"), Share(budget, "b")
    assert share.change(4)
    assert other.take(5)
    assert not share.change(6)
    assert budget.left("c") == 1
    assert share.change(5)
    assert share.change(0)
    assert budget.left("a") == 5
