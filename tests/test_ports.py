"""Ports that tests give to servers are none that the kernel gives away meanwhile."""

from __future__ import annotations

import pytest

from tests.ports import USUAL, free_port, outside


@pytest.mark.parametrize(
    ("first", "last", "ports"),
    [
        (32_768, 60_999, USUAL),
        (49_152, 65_535, USUAL),
        (10_000, 60_000, range(60_001, 65_536)),
        (20_000, 65_535, range(5_000, 20_000)),
        (1_024, 65_535, USUAL),  # There are no others.
    ],
)
def test_ports_are_taken_where_the_kernel_takes_none(first: int, last: int, ports: range):
    assert outside(first, last) == ports


def test_no_port_is_given_twice():
    given = [free_port() for _ in range(50)]
    assert len(set(given)) == 50
