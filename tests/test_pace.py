"""The budget of a step, from simulated machines: prompts slow answers down by a bounded amount, fast or slow."""

import random

import pytest

from puna.engine.pace import LARGEST, SMALLEST, TELLING, Pace


class Machine:
    """Takes `step` seconds for any pass, and more for each answer and each token of a prompt."""

    def __init__(self, step: float, answer: float, prompt: float, seed: int = 0) -> None:
        self.step, self.answer, self.prompt = step, answer, prompt
        self.random = random.Random(seed)

    def seconds(self, answers: int, others: int) -> float:
        return (self.step + self.answer * answers + self.prompt * others) * self.random.uniform(0.95, 1.1)


@pytest.mark.parametrize("machine", [Machine(0.005, 0.0002, 0.0002), Machine(0.06, 0.001, 0.004),
                                     Machine(0.5, 0.02, 0.012), Machine(0.001, 0.0, 0.00001)])
@pytest.mark.parametrize("answers", [1, 4, 16])
def test_p99_between_tokens_stays_below_three_times_its_quiet_value(machine: Machine, answers: int) -> None:
    pace = Pace()
    times = []
    for _ in range(600):  # a prompt without end beside some answers
        others = pace.budget(answers) - answers
        assert 0 <= others <= LARGEST
        times.append(machine.seconds(answers, others))
        pace.record(answers, others, times[-1])
    quiet = machine.seconds(answers, 0)
    p99 = sorted(times[20:])[int(0.99 * (len(times) - 20))]
    assert p99 <= 3 * quiet
    assert sum(times) / len(times) > 1.3 * quiet or others == LARGEST, "prompts get their share"
    assert others >= SMALLEST


def test_a_crowd_of_prompts_gets_more_than_a_few_but_no_step_lasts_for_long() -> None:
    pace, machine = Pace(), Machine(0.03, 0.002, 0.004)
    for _ in range(50):
        for others in (0, 16):
            pace.record(2, others, machine.seconds(2, others))
    assert pace.budget(2, prompts=2) == pace.budget(2)
    few, many = pace.budget(2) - 2, pace.budget(2, prompts=8) - 2
    assert many > 3 * few
    assert machine.seconds(2, pace.budget(2, prompts=1000)) < 0.7


def test_prompts_alone_come_in_large_pieces_but_no_step_lasts_for_long() -> None:
    for machine in (Machine(0.005, 0.0, 0.0002), Machine(0.06, 0.0, 0.004), Machine(0.5, 0.0, 0.05)):
        pace = Pace()
        assert pace.budget(0) == LARGEST
        for _ in range(30):
            pace.record(0, 4, machine.seconds(0, 4))  # tiny prompts say nothing about large pieces
            count = pace.budget(0)
            pace.record(0, count, machine.seconds(0, count))
        assert machine.seconds(0, pace.budget(0)) < 1.0 or pace.budget(0) == TELLING
        assert pace.budget(0) >= TELLING
    assert Pace(fixed=True).budget(3) == 3 + LARGEST
