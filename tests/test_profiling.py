"""--profile_steps: what is a range, which ranges a run can do."""

import pytest

from jaxpost.errors import ConfigError
from jaxpost.profiling import Profile, parse_steps


def test_a_range():
    assert parse_steps("10:12") == (10, 12) and parse_steps("0:1") == (0, 1) and parse_steps(None) is None


@pytest.mark.parametrize("text", ["", "10", "10-12", "10:", ":12", "a:b", "-3:2", "1:2:3", "1.5:2", " 1:2", "１:２"])
def test_what_is_no_range(text):
    with pytest.raises(ConfigError, match="--profile_steps: .* is not a range of steps such as 10:12"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["12:12", "12:10"])
def test_a_range_without_a_step(text):
    with pytest.raises(ConfigError, match=f"--profile_steps: {text} holds no step"):
        parse_steps(text)


def test_ranges_that_the_run_does_not_do():
    profile = Profile("run", (4, 6), print)
    profile.check(4, 6)
    with pytest.raises(ConfigError, match="4:6 ends behind the run, which has 5 steps"):
        profile.check(0, 5)
    with pytest.raises(ConfigError, match="4:6 begins before step 5, from which the run goes on"):
        profile.check(5, 8)
