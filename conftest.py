"""Two levels of tests, and saved outputs that are compared.

Tests marked `nightly` run only with `--nightly i/n`, as part i of n; those that ask for `many` run by day and, with more rounds, at night.
"""
import pytest


def pytest_addoption(parser):
    parser.addoption("--nightly", metavar="i/n", help="run the nightly tests, part i of n (1/1: all)")


def pytest_configure(config):
    config.addinivalue_line("markers", "nightly: too long for every push; run with --nightly i/n")
    part(config.getoption("--nightly"))


def part(text):
    "i and n of `i/n`."
    if text is None: return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1<=int(i)<=int(n)): raise pytest.UsageError(f"--nightly {text}; i/n is allowed, e.g. 1/4, with i from 1 to n")
    return int(i), int(n)


@pytest.fixture
def many(request):
    "Choose a number of rounds: `many(by_day, at_night)`."
    night = request.config.getoption("--nightly")
    return lambda by_day, at_night: at_night if night else by_day


def pytest_collection_modifyitems(config, items):
    for item in items: # nbval compares only cells that have an execution count, and nbdev_clean takes the counts away: give them back
        cell = getattr(item, "cell", None)
        if cell is not None and cell.get("outputs") and not cell.get("execution_count"): cell["execution_count"] = 1
    night = part(config.getoption("--nightly"))
    def marked(item): return item.get_closest_marker("nightly") is not None
    if night:
        mine = sorted((i for i in items if marked(i) or "many" in getattr(i, "fixturenames", ())), key=lambda i: i.nodeid)[night[0]-1::night[1]] # the same for everybody who has these tests
        chosen = [i for i in items if i in set(mine)]
    else: chosen = [i for i in items if not marked(i)]
    if len(chosen)<len(items): config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
    items[:] = chosen
