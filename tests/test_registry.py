"Promotion and rollback under kills and races: the remote's tags are the old or the new state, and nobody's work is lost."
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from registry import befores, clone, git, locks, quiet, served, shim, state, step, write_record
from defect_detect.release.bounds import Line
from defect_detect.release.promotion import promote, register, rollback
from defect_detect.release.registry import ReleaseError, current, push_tag, read_tags, write_tag


def ask(*a): return [Line("record", True, "whole", "whole")]


def points(at, action, one):
    "Every exec, open, write, fsync, rename and connect of the git calls of a step: (call, system call, its number)."
    env = shim(at/"shim", 0, "", at/"shim/log")
    p = step(action, one, "v0.2.0", at/"gate", env=env)
    out, err = p.communicate(timeout=120)
    assert p.returncode==0, err
    found = []
    for log in sorted((at/"shim").glob("log.*"), key=lambda p: int(p.suffix[1:])):
        each = Counter(m.groups() for m in re.finditer(r"(?m)^(\d+) +(\w+)\(", log.read_text(errors="replace"))) # process, system call
        most = {}
        for (_, name), n in each.items(): most[name] = max(most.get(name, 0), n)
        found += [(int(log.suffix[1:]), name, i+1) for name, n in sorted(most.items()) for i in range(n)]
        log.unlink()
    return found


def stopped_at(at, action, one, point):
    "Run a step, stop it at `point`, kill everything of it; False: it ended before it got there."
    nth, name, i = point
    log = at/f"shim/stop.{nth}"
    log.unlink(missing_ok=True)
    p = step(action, one, "v0.2.0", at/"gate", env=shim(at/"shim", nth, f"{name}:signal=STOP:when={i}", at/"shim/stop"))
    hit = False
    end = time.monotonic()+60
    while p.poll() is None and not hit:
        assert time.monotonic()<end, f"{action} hangs at {point}"
        hit = log.exists() and "stopped by SIGSTOP" in log.read_text(errors="replace")
        time.sleep(.01)
    if hit: os.killpg(p.pid, signal.SIGKILL)
    p.communicate(timeout=60)
    return hit


def asked(at): return len((at/"gate").read_text().splitlines()) if (at/"gate").exists() else 0 # how often the gate was


def settled(at, far, daemon, action, one, old):
    "The remote is old or new and whole; a retry gets there without repair, through the gate; then the old state again. Was the tag there?"
    quiet(daemon)
    now = state(far)
    new = {k: v for k, v in now.items() if k not in old}
    assert {k: v for k, v in now.items() if k in old}==old and len(new)<=1 and locks(one)==[] and git(one, "tag")=="", (old, now)
    gates = asked(at)
    p = step(action, one, "v0.2.0", at/"gate")
    out, err = p.communicate(timeout=120)
    if new and action=="rollback": assert p.returncode and "nothing served at dev before" in err # it was done: what came before is now at the bottom
    else:
        assert p.returncode==0 and json.loads(out)["made"] is (not new), err
        if action=="promote" and not new: assert asked(at)>gates, "a retry asks the gate again"
    assert len(state(far))==len(old)+1
    for k in state(far):
        if k not in old: git(far, "update-ref", "-d", f"refs/tags/{k}")
    return bool(new)


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_promote_kill_sweep(tmp_path, action, many):
    "Killed at every system call of git that matters, and at random times: old or new, never between."
    assert shutil.which("strace"), "this test needs strace"
    with served(tmp_path, 2) as (far, url, daemon):
        one = clone(tmp_path, url, "one")
        for v in ("v0.1.0", "v0.2.0")[:1 if action=="promote" else 2]: assert promote("dev", "m", v, one, ask).made
        old = state(far)
        every = points(tmp_path, action, one)
        for k in state(far):
            if k not in old: git(far, "update-ref", "-d", f"refs/tags/{k}")
        assert len(every)>=200, len(every)
        rng, seen = random.Random(0), Counter()
        late = [p for p in every if p[0]>=max(n for n, _, _ in every)-1] # the push is where it matters
        for point in many(rng.sample(every, 4)+rng.sample(late, 6), every):
            hit = stopped_at(tmp_path, action, one, point)
            seen["stopped" if hit else "ended before"] += 1
            seen["new" if settled(tmp_path, far, daemon, action, one, old) else "old"] += 1
        for _ in range(many(2, 150)):
            p = step(action, one, "v0.2.0", tmp_path/"gate")
            time.sleep(rng.uniform(.3, 1.4))
            if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
            p.communicate(timeout=60)
            seen["new" if settled(tmp_path, far, daemon, action, one, old) else "old"] += 1
        print(action, len(every), "points;", dict(seen))
        assert seen["old"] and seen["stopped"]


def test_promoter_race(tmp_path, many):
    "Eight promoters, some of whom die: each counter has one winner, whose gate was asked about the one before."
    with served(tmp_path, 8) as (far, url, daemon):
        clones, rng = [clone(tmp_path, url, f"c{i}") for i in range(8)], random.Random(1)
        for _ in range(many(2, 40)):
            had = len(befores(far))
            running = [step("promote", c, f"v0.{i+1}.0", tmp_path/f"gate{i}") for i, c in enumerate(clones)]
            dead = rng.sample(running, 2)
            time.sleep(rng.uniform(.5, 1.5))
            for p in dead:
                if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
            said = [(p, *p.communicate(timeout=120)) for p in running]
            quiet(daemon)
            made = [json.loads(out) for p, out, err in said if p.returncode==0 and json.loads(out)["made"]]
            for p, _, err in said: assert p.returncode==0 or p in dead, err
            line = befores(far)
            assert [n for n, _, _ in line]==list(range(1, len(line)+1)), "no counter is missing or taken twice"
            assert [b for _, b, _ in line]==[None, *[v for _, _, v in line]][:len(line)], "each gate knew whom it was asked about"
            assert len({o["ref"] for o in made})==len(made)>=5 and len(line)-had>=len(made), "no lost version"
            assert all(git(c, "tag")=="" and locks(c)==[] for c in clones), "who was slower keeps nothing"
        print(len(line), "tags")


def test_a_gate_left_out_is_seen(tmp_path):
    "The planted fault of both tests: a promoter that pushes what it decided before it lost."
    with served(tmp_path, 3) as (far, url, daemon):
        one, two = clone(tmp_path, url, "one"), clone(tmp_path, url, "two")
        stale = read_tags(two)
        assert promote("dev", "m", "v0.1.0", one, ask).made
        commit = next(t.commit for t in stale if t.version=="v0.2.0")
        assert not push_tag(two, "m#dev#1", write_tag(two, "m#dev#1", commit, "stale"))
        assert push_tag(two, "m#dev#2", write_tag(two, "m#dev#2", commit, "stale\n\nVersion: v0.2.0"))
        line = befores(far)
        assert [b for _, b, _ in line]!=[None, *[v for _, _, v in line]][:len(line)]


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["register", "dev", "prod", "back dev", "back prod", "forget"]), min_size=4, max_size=12))
def test_sequences(tmp_path_factory, words):
    "Any order of steps gives what a stack of versions would."
    at = tmp_path_factory.mktemp("sequence")
    git(at, "init", "-q", "--bare", "far.git")
    git(at, "clone", "-q", "far.git", "one")
    one, have, model, n = at/"one", [], {"dev": [], "prod": []}, 0
    for k, v in (("user.name", "a"), ("user.email", "a@example.org")): git(one, "config", k, v)
    for w in words:
        if w=="register":
            write_record(one, f"model {n}")
            git(one, "push", "-q", "origin", "HEAD")
            n += 1
            assert register("m", root=one, ask=ask).version==f"v0.{n}.0"
            have.append(f"v0.{n}.0")
        elif w=="forget": git(one, "gc", "-q", "--prune=now")
        else:
            stage, back = w.split()[-1], w.startswith("back")
            stack, dev = model[stage], model["dev"]
            below = [v for v in stack[:-1] if v!=stack[-1]]
            want = (have and (have[-1] if stage=="dev" else dev[-1] if dev else None)) if not back else below and below[-1]
            try: o = rollback(stage, root=one) if back else promote(stage, root=one, ask=ask)
            except (ReleaseError, ValueError): assert not want
            else:
                assert o.version==want
                if back: model[stage] = stack[:len(stack)-stack[::-1].index(want)]
                elif o.made: stack.append(want)
        for s in model: assert (t.version if (t := current(read_tags(one), "m", s)) else None)==(model[s][-1] if model[s] else None)
