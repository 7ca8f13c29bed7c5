"""Compare the speed and memory of the working tree with those of an older commit, row by row of ``make bench``.

Both trees run the same workloads, those of this folder, through zograd's public names. In each round a row gets a fresh
process of either tree. The two take turns, so that both see the same moment of the machine, and the round yields one
ratio, the median over the turns. The interval of a row is Student's 95 % interval of the mean log ratio over the
rounds. Fresh processes make the rounds independent: two processes of the same code can differ by several percent for as
long as they live, by the addresses and the state of memory that they happen to get, and turns between them do not show
it. Rounds are added until half the width of the interval is at most .02, or until ``--most-rounds``, and the row is
then marked as not settled. A row is worse if the lower bound of its interval exceeds 1.03, or 1.3 with a single
direction. The exit status is 1 if a row is worse or fails, and 2 if the comparison could not be made.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT, LIMIT_OF_ONE = 1.03, 1.3
HALF_WIDTH = 0.02
LEAST_ROUNDS = 4
LEAST_TURNS, MOST_TURNS, MOST_SECONDS = 3, 9, 10
# The 0.975 quantile of Student's distribution by degrees of freedom; beyond 30 it is taken at 30, which is wider.
# fmt: off
STUDENT = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
]
# fmt: on


# In a process of either tree. The process that compares imports no torch: memory rows read the peak of a process, which
# begins with that of its parent.


def speed_rows():
    """Return, by name, a function that makes the call of each row, and the limit of its ratio."""
    from fixed_cost import calls
    from systems import systems
    from workloads import WORKLOADS

    rows = {}
    for name, make in WORKLOADS.items():
        for system in systems(None, name):
            if system.startswith("zograd"):
                limit = LIMIT_OF_ONE if name == "one" else LIMIT
                rows[f"{name}: {system}"] = (lambda m=make, n=name, s=system: systems(m("cpu"), n)[s][0](), limit)
    for name in ("estimate and its gradient", "decorated call under no_grad"):
        rows[f"fixed cost: {name}"] = (lambda n=name: calls()[n], LIMIT_OF_ONE)
    return rows


def memory_rows():
    from memory import CASES

    return {f"memory: {name}": case for name, case in CASES.items()}


def serve():
    """Answer requests, one line of JSON each, about one row, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not get in between
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["ask"] == "time":
                run = run or prepared(request["row"])
                answer = timed(run, request["seconds"])
            else:
                answer = {"hello": hello, "rows": rows, "memory": memory_peak}[request["ask"]](request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def hello(request):
    import torch
    from fixed_cost import processor

    import zograd

    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    return {"zograd": zograd.__file__, "machine": machine}


def rows(request):
    return {"speed": {name: limit for name, (_, limit) in speed_rows().items()}, "memory": list(memory_rows())}


def prepared(row):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = speed_rows()[row][0]()
    run()
    return run


def timed(run, seconds):
    """Measure the seconds a call, over calls that together take about the given time."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        run()
        calls += 1
    return {"seconds": (time.perf_counter() - start) / calls}


def memory_peak(request):
    from memory import peak

    return {"peak": peak(*memory_rows()[request["row"]])[1]}


# In the process that compares.


class Failed(Exception):
    """A row that one tree cannot run."""


class Tree:
    """A process that runs zograd from one tree.

    Args:
        side: how failures call the tree.
        folder: where it is.
    """

    def __init__(self, side, folder):
        self._side = side
        self._source = Path(folder).resolve() / "src"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "PYTHONPATH": str(self._source), "OMP_NUM_THREADS": "1"},
            cwd=ROOT / "benchmarks",
        )

    def hello(self):
        """Return the machine's description, once it is sure that this is the tree's zograd."""
        answer = self.ask("hello")
        if not Path(answer["zograd"]).resolve().is_relative_to(self._source):
            raise Failed(f"{self._side}: zograd was imported from {answer['zograd']}, not from {self._source}")
        return answer["machine"]

    def ask(self, what, **more):
        try:
            print(json.dumps({"ask": what, **more}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._said.seek(0)
            raise Failed(f"{self._side}: the process ended: {self._said.read()[-500:].strip()}")
        answer = json.loads(answer)
        if "error" in answer:
            raise Failed(f"{self._side}: {answer['error']}")
        return answer

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()


@contextlib.contextmanager
def checked_out(revision):
    """A git worktree of the revision in a temporary folder, which is removed afterwards."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        print(f"--base {revision}: {found.stderr.strip()}", file=sys.stderr)
        raise SystemExit(2)
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="zograd-base-") as folder:
        tree = Path(folder) / "base"
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree), commit], check=True)
        try:
            yield tree, commit
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def log_ratio(trees, name, seconds, swap):
    """Return the median over the turns of the log of the first tree's time over the second's, in fresh processes."""
    order, ratios = [1, 0] if swap else [0, 1], []
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(contextlib.closing(Tree(*tree))) for tree in trees]
        for k in order:
            processes[k].hello()
            processes[k].ask("time", row=name, seconds=0)  # builds the row, and warms it up
        start = time.perf_counter()
        while len(ratios) < LEAST_TURNS or (len(ratios) < MOST_TURNS and time.perf_counter() - start < MOST_SECONDS):
            taken = [0.0, 0.0]
            for k in order:
                taken[k] = processes[k].ask("time", row=name, seconds=seconds)["seconds"]
            order.reverse()
            ratios.append(math.log(taken[0] / taken[1]))
    return statistics.median(ratios)


def interval(logs):
    """Return the ratio and the bounds of its 95 % interval: the mean of the logs, and Student's quantile.

    Stopping as soon as it is narrow costs little: with normal logs of a deviation of 1 to 5 % the interval held the
    ratio in 92 to 95 % of 3,000 simulated runs, and a row as fast as before was called worse in at most one of them.
    """
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), 0.0, math.inf
    half = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(x) for x in (mean, mean - half, mean + half))


def settled(logs):
    if len(logs) < LEAST_ROUNDS:
        return False
    _, low, high = interval(logs)
    return (high - low) / 2 <= HALF_WIDTH


def compare_speed(trees, limits, options):
    """Return the log ratios of each row, one a round, or the text of its failure."""
    logs, failures = {name: [] for name in limits}, {}
    for count in range(options.most_rounds):
        left = [name for name in limits if name not in failures and not settled(logs[name])]
        if not left:
            break
        print(f"round {count + 1}: {len(left)} of {len(limits)} rows", file=sys.stderr, flush=True)
        for name in left:
            try:
                logs[name].append(log_ratio(trees, name, options.seconds, swap=count % 2))
            except Failed as error:
                failures[name] = str(error)
    return logs, failures


def compare_memory(trees, names):
    """Return the peaks of both trees for each row, or the text of a failure."""
    peaks, failures = {}, {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        peaks[name] = []
        for tree in trees:
            with contextlib.closing(Tree(*tree)) as process:  # with nothing done before
                try:
                    peaks[name].append(process.ask("memory", row=name)["peak"])
                except Failed as error:
                    failures[name] = str(error)
                    break
    return peaks, failures


def speed_verdict(logs, limit):
    ratio, low, high = interval(logs)
    verdict = "worse" if low > limit else "no worse" if settled(logs) else "not settled"
    rounds = [math.exp(log) for log in logs]
    return {
        "ratio": ratio,
        "interval": [low, high] if len(logs) > 1 else None,
        "limit": limit,
        "rounds": rounds,
        "verdict": verdict,
    }


def memory_verdict(work, base):
    ratio = work / base
    verdict = "worse" if ratio > LIMIT else "no worse"
    return {"ratio": ratio, "peaks": [work, base], "limit": LIMIT, "verdict": verdict}


def show(results):
    width = max(map(len, results))
    print(f"{'row':{width}}   ratio   95 % interval   limit  rounds  verdict")
    for name, row in results.items():
        if "failure" in row:
            print(f"{name:{width}}   fails: {row['failure']}")
        elif "peaks" in row:
            peaks = "{:5.2f} / {:5.2f} x ".format(*row["peaks"])
            print(f"{name:{width}}  {row['ratio']:6.3f}  {peaks}{row['limit']:6.2f}       1  {row['verdict']}")
        else:
            bounds = "{:5.3f} to {:5.3f}".format(*row["interval"]) if row["interval"] else ""
            tail = f"{bounds:15} {row['limit']:5.2f}  {len(row['rounds']):6}  {row['verdict']}"
            print(f"{name:{width}}  {row['ratio']:6.3f}  {tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="the commit to compare with")
    parser.add_argument("--only", nargs="*", default=[""], help="the rows whose names begin with one of these")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the folder whose src/ is compared with the base")
    parser.add_argument("--most-rounds", type=int, default=40, help="where a row that does not settle ends")
    parser.add_argument("--seconds", type=float, default=0.1, help="time of each tree in a turn, one call at least")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "regression.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    if not options.base:
        parser.error("--base is needed: the commit to compare with")
    if options.most_rounds < 1:
        parser.error(f"--most-rounds must be at least 1, got {options.most_rounds}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))  # so that the worktree is removed
    with checked_out(options.base) as (base, commit):
        trees = (("working tree", options.tree), ("base", base))
        with contextlib.closing(Tree(*trees[0])) as process:
            try:
                machine, known = process.hello(), process.ask("rows")
            except Failed as error:
                print(error, file=sys.stderr)
                return 2
        chosen = [n for n in [*known["speed"], *known["memory"]] if n.startswith(tuple(options.only))]
        if not chosen:
            parser.error(f"--only {' '.join(options.only)}: no row begins so; the rows are {', '.join(known['speed'])}")
        limits = {name: limit for name, limit in known["speed"].items() if name in chosen}
        logs, failures = compare_speed(trees, limits, options)
        peaks, more = compare_memory(trees, [name for name in known["memory"] if name in chosen])
    failures |= more
    results = {name: speed_verdict(logs[name], limits[name]) for name in limits if name not in failures}
    results |= {name: memory_verdict(*pair) for name, pair in peaks.items() if name not in failures}
    results |= {name: {"failure": failure, "verdict": "fails"} for name, failure in failures.items()}
    show(results)
    report = {"machine": machine, "base": commit, "most_rounds": options.most_rounds, "results": results}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(row["verdict"] in ("worse", "fails") for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
