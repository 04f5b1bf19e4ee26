"""--print_cost: how long a data set would take, going by the run."""

import re

import pytest

from stagewise.arguments import RunArguments
from stagewise.errors import InputError
from stagewise.run.cost import describe_cost, measured_rate
from tests.stages import run_sft

LOG = [
    {"loss": 3.0, "tokens_per_second": 10.0, "num_tokens": 100},  # compilation
    {"loss": 2.0, "tokens_per_second": 400.0, "num_tokens": 4_100},
    {"eval_loss": 2.0},
    {"loss": 1.0, "tokens_per_second": 50.0, "num_tokens": 6_600},
    {"train_loss": 2.0},
]


def test_the_rate_is_tokens_over_seconds_without_the_first_stretch():
    """4,000 tokens in 10 s and 2,500 in 50 s, not the mean of their rates."""
    assert measured_rate(LOG) == pytest.approx(6_500 / 60)
    assert measured_rate(LOG[:1]) == pytest.approx(10.0)
    assert measured_rate([]) is None


def test_extrapolation():
    """6,500 tokens a minute on 2 machines are 13,000 on 4: 3.9 million tokens take 300 minutes, of 8 devices."""
    text = describe_cost(LOG, (3_900_000, 4), processes=4, machines=2)
    assert "measured 108 tokens/s with 4 processes on 2 machines" in text
    assert "3,900,000 tokens on 4 machines of 2 processes: 5.00 hours, 40.00 device hours" in text
    assert "taken for granted" in text
    assert "lower --logging_steps" in describe_cost([], (1, 1), 1, 1)


@pytest.mark.parametrize(("text", "found"), [("1e9", (10**9, 1)), ("1e9,4", (10**9, 4)), ("1500, 2", (1500, 2))])
def test_tokens_and_machines(text, found):
    assert RunArguments(print_cost=text).cost == found


@pytest.mark.parametrize("text", ["many", "0", "1e9,0", "1.5", "1,2,3", "1e9,", "nan", "inf"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(InputError, match="--print_cost"):
        RunArguments(print_cost=text)


def test_a_run_prints_it(tiny_model_dir, sft_file, tmp_path, capsys):
    flags = ("--max_steps", "4", "--do_train", "True", "--save_strategy", "no", "--print_cost", "36e6")
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags)
    found = re.search(r"measured ([\d,]+) tokens/s .*: ([\d,.]+) hours, ([\d,.]+) device", capsys.readouterr().out)
    rate, hours, device_hours = (float(text.replace(",", "")) for text in found.groups())
    assert hours == pytest.approx(10_000 / rate, rel=0.02, abs=0.01)
    assert hours == device_hours


def test_nothing_is_measured_in_a_dry_run():
    with pytest.raises(InputError, match="without --dry_run"):
        RunArguments(print_cost="1e9", dry_run=True)
