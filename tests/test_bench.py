"""bench: how measured numbers are said."""

import pytest

from bench.run_all import CLAIMS, claims_table, said


@pytest.mark.parametrize(
    "runs, words",
    [
        ([[7.14, 2]], "7.1 x faster, 2 MB"),
        ([[7.14, 2], [6.9, 2.2], [7.3, 1.9]], "7.1 (6.9 to 7.3) x faster, 2 MB"),
    ],
)
def test_a_claim_is_said_with_the_spread_of_its_runs(runs, words):
    assert said("{:.1f} x faster, {:.0f} MB", runs) == words


def test_every_claim_stands_in_the_table():
    table = "\n".join(claims_table())
    for claims in CLAIMS.values():
        assert all(f"| {claim[0]} |" in table for claim in claims)
