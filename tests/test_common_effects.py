"""tests/effects.py on the toy run: each shared run flag has its effect there, and what has none is seen."""

import pytest

from tests import toy_run
from tests.effects import RUN_BASE, RUN_FLAGS, Effect, check_effects

TABLE = {
    **RUN_FLAGS,
    "--width": Effect(8, "shape"),
    "--pause": "seconds of sleep, for tests of interruption",
    "--pause-at-end": "seconds of sleep, for tests of interruption",
    "--dropout": Effect(0.5, "weights"),
    "--die-at": "a fault, for tests/test_common_run.py",
    "--nan-at": "a fault, for tests/test_common_train.py",
    "--wild-at": "a fault, for tests/test_common_train.py",
}


@pytest.mark.slow
def test_every_run_flag_has_its_effect(tmp_path):
    check_effects(toy_run, RUN_BASE, TABLE, tmp_path)


@pytest.mark.slow
def test_a_missing_or_unknown_option_and_an_effect_that_does_not_show_are_named(tmp_path):
    table = {name: "left out here" for name in TABLE if name != "--clip"}
    table |= {
        "--no-such": Effect(1, "weights"),
        "--width": Effect(16, ("weights", "files")),
        "--log-every": Effect(2, "refused"),
        "--seed": Effect("x", "weights"),
        "--save-every": Effect(2, "weights"),
    }
    with pytest.raises(AssertionError) as found:
        check_effects(toy_run, RUN_BASE, table, tmp_path)
    for line in (
        "--clip is in no table",
        "--no-such: the script has no such option",
        "--width 16: the weights are the same",
        "--width 16: files: nothing differs",
        "--log-every 2: not refused: status 0",
        "--seed x: status 2",
        "--save-every 2: the weights are the same",
    ):
        assert line in str(found.value), line
