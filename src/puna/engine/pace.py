"""How many tokens a step may compute, so that answers in progress keep their pace while prompts arrive."""

LARGEST = 512  # tokens of prompts in a step: bounds activations, and is enough for the matrix units
SMALLEST = 16
SLOWDOWN = 2.3  # how much longer a step with prompts may take than one without; p99 has to stay below 3
TELLING = 64  # tokens of prompts alone from which on their number decides the time, not the step itself
LONGEST = 0.5  # seconds of a step of prompts alone, after which newcomers and cancellations are looked at
QUIET_STEPS = 256  # after so many steps with prompts, one without measures again what it takes
FIXED_PRICE = 0.1  # of a guess behind one answer, where times don't count
NEW = 0.2  # weight of a new measurement


class Pace:
    """Measures steps and derives the next one's budget. With `fixed`, the budget doesn't depend on time: processes that
    share a model must all take the same steps."""

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed
        self._quiet: dict[int, float] = {}  # seconds of a step of answers alone, by the power of two of their number
        self._cost: float | None = None  # seconds that one more token of a prompt takes beside answers
        self._alone: float | None = None  # and in steps of prompts alone
        self._guess: dict[int, float] = {}  # seconds that one guessed token takes, by the same power as `_quiet`
        self._since_quiet = 0

    def budget(self, answers: int, prompts: int = 0) -> int:
        """Tokens for the next step, in which so many answers go on while so many requests wait with their prompts."""
        if self.fixed:
            return answers + LARGEST
        if not answers:
            return LARGEST if self._alone is None else _bounded(LONGEST / self._alone, TELLING)
        quiet = self._quiet.get(answers.bit_length())
        if quiet is None or self._since_quiet > QUIET_STEPS:
            return answers  # nothing but answers, to see how long that takes
        cost = self._cost or self._alone
        if cost is None:
            return answers + SMALLEST
        crowd = max(1.0, prompts / answers)  # where more wait for a first word than read on, they weigh more
        longest = max(min(SLOWDOWN * quiet * crowd, LONGEST), SLOWDOWN * quiet)
        return answers + _bounded((longest - quiet) / cost)

    def price(self, answers: int) -> float | None:
        """What one guessed token behind so many answers costs, in tokens of answers that come in the same time. None:
        not known yet."""
        if self.fixed:
            return FIXED_PRICE * answers
        quiet, guess = (each.get(answers.bit_length()) for each in (self._quiet, self._guess))
        return None if quiet is None or guess is None else max(guess, 0.0) / quiet * answers

    def record(self, answers: int, others: int, seconds: float, guesses: int = 0, drafting: float = 0.0) -> None:
        """A step took so long, for so many answers, `others` tokens of prompts and so many guesses, which had taken
        `drafting` seconds to make."""
        size = answers.bit_length()
        if guesses and not others:
            self._since_quiet += 1
            if size in self._quiet:
                each = (seconds - self._quiet[size] + drafting) / guesses
                self._guess[size] = _mean(self._guess.get(size), each)
            return
        others += guesses
        if not others:
            self._since_quiet = 0
            self._quiet[size] = _mean(self._quiet.get(size), seconds)
            return
        self._since_quiet += 1
        if not answers and others >= TELLING:
            self._alone = _mean(self._alone, seconds / others)
        elif answers and size in self._quiet:
            self._cost = _mean(self._cost, max(seconds - self._quiet[size], 0.1 * seconds) / others)


def _bounded(tokens: float, smallest: int = SMALLEST) -> int:
    return int(min(max(tokens, smallest), LARGEST))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - NEW) * old + NEW * new
