"""A scan makes no cycles, and leaves Python's collector as it found it."""

import gc
import threading

import pytest

from puna import guard
from puna.guard.code.collecting import uncollected
from puna.guard.code.rule import rules_for
from puna.guard.code.scan import PIECE, scan

CODE = {
    "python": "import os\n\n\ndef run(request):\n    os.system('ls ' + request.args['d'])\n",
    "javascript": "app.get('/', (req, res) => { const f = (x) => `<p>${x}</p>`; res.send(f(req.query.a)) })\n",
    "c": "int f(char *p, int n) { char b[4]; if (n > 4) return 0; strcpy(b, p); return b[n]; }\n",
    "yaml": "jobs:\n  a:\n    steps:\n      - run: echo ${{ github.event.issue.title }}\n",
}


@pytest.fixture
def collector():
    was = gc.isenabled()
    yield
    gc.enable() if was else gc.disable()


@pytest.mark.parametrize("language", CODE)
def test_nothing_is_left_for_the_collector(language, collector):
    assert guard.scan_code(CODE[language], language) is not None  # rules are read
    gc.collect()
    gc.disable()
    for _ in range(3):
        guard.scan_code(CODE[language], language)
    assert gc.collect() == 0


def test_the_collector_is_on_again_after_a_scan_and_after_a_failure(collector):
    gc.enable()
    guard.scan_code("x = 1", "python")
    assert gc.isenabled()
    with pytest.raises(KeyError):
        scan("x = 1", "no such language")
    assert gc.isenabled()


def test_a_program_without_collector_stays_without(collector):
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_overlapping_scans_leave_it_on(collector):
    gc.enable()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with uncollected():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with uncollected():
        assert not gc.isenabled()
    assert not gc.isenabled()  # the other one still reads
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_functions_of_a_later_piece_are_judged_though_they_lie_where_earlier_ones_lay():
    """A long file is read in pieces, whose trees are gone when the next one is read."""
    code = "".join(f"int drop{i}(char *p) {{ free(p); return p[0]; }} /* {'-' * 60} */\n" for i in range(1800))
    assert len(code) > 1.5 * PIECE
    rules = [rule for rule in rules_for("c") if rule.id == "c-use-after-free"]
    assert [f.line for f in scan(code, "c", rules, seconds=60)] == list(range(1, 1801))
