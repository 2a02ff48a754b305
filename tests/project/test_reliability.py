"""A short form of `benchmarks/reliability.py`; its kills are in training/test_faults.py, its networks in models/."""

from collections import Counter

import pytest

from support import damage, hostile


@pytest.mark.filterwarnings("ignore")
def test_damage_is_put_right_or_refused_in_one_line(tmp_path):
    outcomes = damage.run(tmp_path, count=60, seed=0)
    assert not [outcome for outcome in outcomes if outcome.result in ("silent", "traceback")]
    assert Counter(outcome.result for outcome in outcomes)["refused"] > 20


def test_hostile_files_are_refused_and_never_run(tmp_path):
    outcomes = hostile.run(tmp_path)
    assert len(outcomes) > 70
    assert not [outcome for outcome in outcomes if not outcome.is_refused]
