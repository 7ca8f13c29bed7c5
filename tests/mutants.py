"""Plant estimator bugs one at a time and see the test suite kill each; run by ``make mutants``.

Every bug here is of a kind that a library has shipped. A mutant is a piece of source text and what replaces it, in a
copy of the package that the tests import instead of the real one. It is killed if a test fails or does not end; one
that does not apply, or a suite that cannot even be collected, is an error and not a kill.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS_FAILED = 1  # pytest's exit status; 2 and above mean that it did not get to run them
SECONDS = 300  # for the tests of one; the slowest file takes one minute


@dataclass(frozen=True)
class Mutant:
    """One planted bug: where, what stands there, what replaces it, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self) -> str:
        """The file's text with the bug in it.

        Returns:
            The text.

        Raises:
            RuntimeError: if the bug's place is not there exactly once.
        """
        text = (ROOT / "src" / "zograd" / self.file).read_text()
        if text.count(self.old) != 1:
            raise RuntimeError(f"{self.name}: its text stands {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


EXACT, STATISTICS, BITS = "test_estimator_exact.py", "test_estimator_statistics.py", "test_same_bits.py"
CHECK, CHECK_DISTRIBUTION = "test_check.py", "test_check_distribution.py"
FAILURES, POOL = "test_failures.py", "test_pool.py"
DISTRIBUTED = "test_distributed.py"
JOURNAL, TRACKING = "test_journal.py", "test_tracking.py"
UNROLLED = "test_unrolled.py"

MUTANTS = [
    Mutant(
        "gradient times sigma^2",
        "distributions/directions.py",
        "return self._sum.div_(divisor * self._sigma[0])",
        "return self._sum.mul_(self._sigma[0] / divisor)",
        (EXACT, STATISTICS),
    ),
    Mutant(
        "baseline overwritten in the loop",
        "estimate/estimate.py",
        "coefficients.append(combine(s, piece, center))",
        "coefficients.append(combine(s, piece, torch.cat([center[None], piece[:-1, -1]])))",
        (STATISTICS, EXACT),
    ),
    Mutant(
        "missing 1/2",
        "schemes.py",
        "return functools.reduce(operator.add, terms)",
        "return functools.reduce(operator.add, terms) * len(self.sides)",
        (EXACT, STATISTICS),
    ),
    Mutant(
        "sign",
        "schemes.py",
        "return functools.reduce(operator.add, terms)",
        "return -functools.reduce(operator.add, terms)",
        (EXACT, STATISTICS),
    ),
    Mutant(
        "the pair evaluated with different noise",
        "evaluators/task/points.py",
        "yield shift(space, self.params, row, scale)",
        "yield shift(space, self.params, row if scale[0] > 0 else [p.flip(-1) for p in row], scale)",
        (EXACT, STATISTICS),
    ),
    Mutant(
        "divided twice by N",
        "distributions/directions.py",
        "divisor = (len(d) if num is None else num) /",
        "divisor = (len(d) if num is None else num) ** 2 /",
        (EXACT, STATISTICS),
    ),
    Mutant(
        "stale noise",
        "distributions/directions.py",
        "self.distribution.draw(self.space, part, self.seed, block)",
        "self.distribution.draw(self.space, part, self.seed, 0)",
        (STATISTICS, EXACT),
    ),
    Mutant(
        "same noise in equal shapes",
        "distributions/base.py",
        "        fill_tiles(self.fill, noise[0].view(-1), seed, block * tiles)\n",
        "        fill_tiles(self.fill, noise[0].view(-1), seed, block * tiles)\n"
        "        for (a, b), (c, d) in zip(space.bounds, space.bounds[1:]):\n"
        "            if b - a == d - c:\n"
        "                noise[0][:, c:d] = noise[0][:, a:b]\n",
        ("test_distributions.py", STATISTICS),
    ),
    Mutant(
        "frozen leaf perturbed",
        "func/function.py",
        "chosen = tuple([i for i in arguments.chosen if is_tracked(arguments.leaves[i])])",
        "chosen = arguments.chosen if any(map(is_tracked, arguments.params())) else ()",
        ("test_autograd.py",),
    ),
    Mutant(
        "center not shared",
        "estimate/estimate.py",
        "shared=s.scheme.uses_center",
        "shared=False",
        ("test_random_state.py",),
    ),
    Mutant(
        "noise in the parameter's low precision",
        "distributions/base.py",
        "else torch.add(leaf.to(eps.dtype), eps, alpha=c).to(leaf.dtype)",
        "else torch.add(leaf, (eps * c).to(leaf.dtype))",
        (EXACT, STATISTICS, "test_distributions.py"),
    ),
    Mutant(
        "tied weight counted once",
        "_base/isolation.py",
        "{k: new[identity] for k, identity in own.items()}}",
        "{k: new.pop(identity, parameters[k]) for k, identity in own.items()}}",
        ("test_nn.py",),
    ),
    Mutant(
        "state shared between points",
        "_base/isolation.py",
        "            self._before.put_back()\n        except BaseException:  # an interrupt",
        "            pass\n        except BaseException:  # an interrupt",
        ("test_nn.py", "test_zoo.py"),
    ),
    Mutant(
        "unused parameter moved",
        "distributions/directions.py",
        "                leaves[i].zero_()",
        "                pass",
        ("test_isolation.py",),
    ),
    Mutant(
        "unused parameter moved by MeZO",
        "optim/descent.py",
        "if group.lr == 0 or k in still:",
        "if group.lr == 0:",
        ("test_optim.py",),
    ),
    Mutant(
        "a branch's parameter zeroed",
        "_base/isolation.py",
        "{k: self._names[i] for k, i in own.items()}, self._read))",
        "{k: self._names[i] for k, i in own.items()}, set() if self._after else self._read))",
        ("test_isolation.py",),
    ),
    Mutant(
        "what workers read is forgotten",
        "evaluators/task/objective.py",
        "self.module.read |= report.read",
        "pass",
        ("test_isolation.py",),
    ),
    Mutant(
        "frozen parameter written",
        "_base/isolation.py",
        "            if _checksum(x) != old:",
        "            if False:",
        ("test_isolation.py",),
    ),
    Mutant(
        "mode only around the center",
        "evaluators/task/objective.py",
        "                out = call(params)\n            finally:",
        "                with torch.overrides.BaseTorchFunctionMode():\n"
        "                    out = call(params)\n            finally:",
        ("test_isolation.py",),
    ),
    Mutant(
        "signs of a frame left to QR",
        "distributions/orthogonal.py",
        "r.diagonal(dim1=-2, dim2=-1).sign()",
        "r.diagonal(dim1=-2, dim2=-1).abs().sign()",
        ("test_directions.py",),
    ),
    Mutant(
        "one order of rows for all groups",
        "distributions/hadamard.py",
        "orders = [torch.randperm(_order(space.dim), generator=generator)",
        "orders = [torch.arange(_order(space.dim))",
        ("test_directions.py",),
    ),
    Mutant(
        "covariance of another trace",
        "distributions/guided.py",
        "(1 - self.alpha) * basis.shape[1] / basis.shape[2]",
        "(1 - self.alpha) / basis.shape[2]",
        ("test_directions.py",),
    ),
    Mutant(
        "coordinates drawn with replacement",
        "distributions/coordinate.py",
        "torch.randperm(space.dim, generator=generator)",
        "torch.randint(space.dim, (space.dim,), generator=generator)",
        ("test_directions.py",),
    ),
    Mutant(
        "a sequence without its first point",
        "distributions/sobol.py",
        "torch.cat([first, engine.draw(num, dtype=torch.float64)[1:]])",
        "engine.draw(num + 1, dtype=torch.float64)[1:]",
        ("test_directions.py",),
    ),
    Mutant(
        "block order",
        "distributions/directions.py",
        "and used + rows <= known:",
        "and (rows := min(rows, known - used)):",
        (BITS,),
    ),
    Mutant(
        "sigma of the wrong leaf",
        "distributions/directions.py",
        "zip(space.split(self._sum), self._sigma, strict=True)",
        "zip(space.split(self._sum), self._sigma[::-1], strict=True)",
        ("test_contracts.py", "test_nn.py"),
    ),
    Mutant(
        "hessian without its baseline's correction",
        "estimate/second_order.py",
        "(rows - rows.mean(dim=0)) * (num / (num - 1))",
        "rows - rows.mean(dim=0)",
        ("test_second_derivatives.py",),
    ),
    Mutant(
        "nested: the sides of a pair adapt along different directions",
        "_base/streams.py",
        "        self._nested = 0\n        for generator in",
        "        for generator in",
        ("test_es_maml.py",),
    ),
    Mutant(
        "forward mode of forward mode lost",
        "func/autograd.py",
        "        with forward_mode_enabled():\n            vector",
        "        if True:\n            vector",
        ("test_second_derivatives.py",),
    ),
    Mutant(
        "journal: a value of another side",
        "evaluators/journal.py",
        "self._keep({i * sides + columns[j]: to_bytes(value)}",
        "self._keep({i * sides + j: to_bytes(value)}",
        (JOURNAL,),
    ),
    Mutant(
        "journal: one key for all distributions",
        "evaluators/journal.py",
        "    digest.add([leaf.detach() for leaf in points.first()])\n",
        "",
        (JOURNAL,),
    ),
    Mutant(
        "journal: arguments left out of the key",
        "evaluators/journal.py",
        "        if i not in chosen:\n",
        "        if i in chosen:\n",
        (JOURNAL,),
    ),
    Mutant(
        "journal: values written as they are yielded only",
        "evaluators/journal.py",
        "fn.arrived = recorded.listener(columns)",
        "fn.arrived = None",
        (JOURNAL,),
    ),
    Mutant(
        "journal: a module's center is read",
        "evaluators/journal.py",
        "if recorded.center is not None and fn.module is None:",
        "if recorded.center is not None:",
        (JOURNAL,),
    ),
    Mutant(
        "journal: what the center showed about fn is forgotten",
        "evaluators/journal.py",
        'answer.report.facts.differentiates = bool(told["differentiates"])',
        'answer.report.facts.differentiates = told["differentiates"] is None',
        (JOURNAL,),
    ),
    Mutant(
        "journal: a value that is not finite is written at once",
        "evaluators/journal.py",
        "        if not finite:\n",
        "        if not finite and not rows:\n",
        (JOURNAL,),
    ),
    Mutant(
        "journal: what an object holds is left out of the key",
        "_base/digest.py",
        "                    stack.append(part)\n",
        "                    stack.extend([part] * (not hasattr(part, '__dict__') or callable(part)))\n",
        (JOURNAL,),
    ),
    Mutant(
        "journal: two places of one object count as one of another",
        "_base/digest.py",
        'self._head("number", numbers[id(part)])',
        'self._head("number")',
        (JOURNAL,),
    ),
    Mutant(
        "journal: what fn itself assigns to is an input",
        "_base/digest.py",
        "(name in stored or name.startswith",
        "(name.startswith",
        (JOURNAL,),
    ),
    Mutant(
        "journal: no checksum",
        "evaluators/journal_file.py",
        "if not whole or crc != _crc(estimate, point, data):",
        "if not whole:",
        (JOURNAL,),
    ),
    Mutant(
        "journal: a header of another function is taken",
        "evaluators/journal_file.py",
        "            if then != now:\n",
        '            if then != now and "function" not in name:\n',
        (JOURNAL,),
    ),
    Mutant(
        "tracker: plans of running estimates are not set aside",
        "tracking.py",
        "self.budget - self.evaluations - self._planned",
        "self.budget - self.evaluations",
        (TRACKING,),
    ),
    Mutant(
        "tracker: what a failed estimate did not use stays set aside",
        "tracking.py",
        "            tracker._count(0, 0, 0, self._planned)\n        for tracker in self.trackers:\n",
        "            tracker._count(0, 0, 0, 0)\n        for tracker in self.trackers:\n",
        (TRACKING,),
    ),
    Mutant(
        "tracker: evaluations count once they are done",
        "evaluators/task/objective.py",
        "            self.counted(num, 0, 0)\n",
        "            self.counted(0, 0, 0)\n",
        (TRACKING,),
    ),
    Mutant(
        "tracker: the seed is drawn before the budget is asked",
        "func/function.py",
        "        with RunningEstimate(objective.name, self.settings.evaluations) as running:",
        "        draw_seed(self.seed, self.generator)\n"
        "        with RunningEstimate(objective.name, self.settings.evaluations) as running:",
        (TRACKING,),
    ),
    Mutant(
        "a check's squared length with its noise",
        "estimate/statistics.py",
        "    off = gram.sum() - gram.trace()\n    square = float(off) / (num * (num - 1))",
        "    off = gram.sum() - gram.trace()\n    square = float(gram.sum()) / num**2",
        (CHECK,),
    ),
    Mutant(
        "a check that looks at vmap but does not compare",
        "diagnostics/function/vectorized.py",
        "    same = difference <= _VMAP_TOLERANCE",
        "    same = difference <= math.inf or difference <= _VMAP_TOLERANCE",
        (CHECK,),
    ),
    Mutant(
        "covariance checked along vectors only",
        "diagnostics/distribution/moments.py",
        "        if diagonal is not None:",
        "        if diagonal is None:",
        (CHECK_DISTRIBUTION,),
    ),
    Mutant(
        "distributed: each rank keeps its own center",
        "evaluators/distributed.py",
        "values=values[0].to(answer.device or",
        "values=values[exchange.index].to(answer.device or",
        (DISTRIBUTED,),
    ),
    Mutant(
        "distributed: the parameters are not compared",
        "evaluators/distributed.py",
        '"parameters": [leaf.detach() for leaf in points.params]',
        '"parameters": [leaf.shape for leaf in points.params]',
        (DISTRIBUTED,),
    ),
    Mutant(
        "distributed: a rank that raises leaves the others waiting",
        "evaluators/ranks.py",
        "        except (Exception, SystemExit) as error:",
        "        except SystemExit as error:",
        (DISTRIBUTED,),
    ),
    Mutant(
        "distributed: what the others evaluated is counted here",
        "evaluators/distributed.py",
        "        values = gather(exchange, share, Outcome.of(evaluate), fn.name, math",
        "        fn.evaluations += (hi - lo - share.mine) * len(points.offsets)\n"
        "        values = gather(exchange, share, Outcome.of(evaluate), fn.name, math",
        (DISTRIBUTED,),
    ),
    Mutant(
        "a guiding subspace is taken as it is where leaves have a sigma each",
        "distributions/guided.py",
        "_orthonormal(self._columns(space) * self._radii(space))",
        "_orthonormal(self._columns(space))",
        ("test_directions.py",),
    ),
    Mutant(
        "the directions that must survive are counted by the bound of Until",
        "estimate/estimate.py",
        "check_survivors(drop, lost, len(values), objective.name)",
        "check_survivors(drop, lost, len(points.directions), objective.name)",
        ("test_until.py",),
    ),
    Mutant(
        "vjp forgets the surrogate",
        "estimate/result.py",
        "        if self.flat is None:\n            flat = contract(",
        "        if True:\n            flat = contract(",
        ("test_surrogate.py",),
    ),
    Mutant(
        "error bars take dependent directions for independent ones",
        "estimate/statistics.py",
        "        return self.directions.distribution.group(self.directions.space, self.directions.num)\n",
        "        return 1\n",
        ("test_error_bars.py",),
    ),
    Mutant(
        "ranks give equal values the rank of the last",
        "shaping.py",
        "last.double() - (counts + 1).double() / 2",
        "last.double() - 1",
        ("test_shaping.py",),
    ),
    Mutant(
        "PES forgets earlier windows",
        "unrolled/estimators.py",
        "return fresh, held + fresh",
        "return fresh, fresh",
        (UNROLLED,),
    ),
    Mutant(
        "a reset keeps what a particle was perturbed by",
        "unrolled/estimators.py",
        'state["perturbation"].masked_fill(there.unsqueeze(-1), 0.0)',
        'state["perturbation"].clone()',
        (UNROLLED,),
    ),
    Mutant(
        "a pair out of step counts as a difference",
        "unrolled/plan.py",
        "if together.any():",
        "if False:",
        (UNROLLED,),
    ),
    Mutant(
        "Sobol's points not shuffled between windows",
        "unrolled/particles.py",
        "if not family.independent:",
        "if False:",
        (UNROLLED,),
    ),
    Mutant(
        "normalizer: it follows the observations within an estimate",
        "contrib/rl.py",
        "                    normalizer.seen.add(observation)\n",
        "                    normalizer.known.add(observation)\n",
        ("test_contrib_rl.py",),
    ),
    Mutant(
        "moments: merging forgets the distance of the means",
        "contrib/rl.py",
        "self.squares + other.squares + away * away * (self.count * other.count / count)",
        "self.squares + other.squares",
        ("test_contrib_rl.py",),
    ),
    Mutant(
        "the surrogate's factor is fitted to the directions it is used with",
        "estimate/surrogate.py",
        "= (second.factor(), first.factor())",
        "= (first.factor(), second.factor())",
        ("test_surrogate.py",),
    ),
    Mutant(
        "an estimate that stops early divides by its bound",
        "distributions/directions.py",
        "        return self._used\n",
        "        return self.num\n",
        ("test_until.py",),
    ),
    Mutant(
        "the mean over all directions where some were dropped",
        "estimate/settings.py",
        "out[alive] = rows * (len(alive) / len(rows))",
        "out[alive] = rows",
        (FAILURES,),
    ),
    Mutant(
        "a retry at the point that fn wrote to",
        "evaluators/task/objective.py",
        "functools.partial(self._value, call, points, number, None)",
        "functools.partial(self._value, call, points, number, point)",
        (FAILURES,),
    ),
    Mutant(
        "a policy that swallows what is no failure",
        "failures.py",
        "return isinstance(error, Exception) and not isinstance(error, _BEYOND)",
        "return isinstance(error, BaseException)",
        (POOL,),
    ),
    Mutant(
        "values in the order of their arrival",
        "evaluators/workers/dispatch.py",
        "            while (answer := self._error or task.done()) is None:\n                self._step()\n",
        "            while (answer := self._error or next(filter(None, (t.done() for t in tasks)), None)) is None:\n"
        "                self._step()\n",
        (POOL,),
    ),
    Mutant(
        "threads that share a module",
        "evaluators/task/copies.py",
        "return isinstance(value, (nn.Module, optim.Optimizer))",
        "return False",
        (POOL,),
    ),
    Mutant(
        "threads that share an object's class and the module that its methods read",
        "evaluators/task/copies.py",
        "        if own is not kind:\n",
        "        if own is None:\n",
        (POOL,),
    ),
    Mutant(
        "threads that share a module through a function that uses it",
        "evaluators/task/copies.py",
        "        new.extend(more)\n",
        "",
        (POOL,),
    ),
    Mutant(
        "estimates that run into each other in a pool's own processes",
        "evaluators/workers/executor.py",
        "return self._turns if self.owned",
        "return contextlib.nullcontext() if self.owned",
        (POOL,),
    ),
    Mutant(
        "the parameters with every task",
        "evaluators/workers/dispatch.py",
        "with_job = pending.with_job or self._pickled.sent < self._workers.workers",
        "with_job = True",
        (POOL,),
    ),
    Mutant(
        "records that show every number",
        "optim/records.py",
        'return f"Records(steps={len(self)}, num',
        'return f"Records({self.__dict__}{len(self)}, num',
        ("test_public.py",),
    ),
    Mutant(
        "completion that offers the modules of the parts",
        "evaluators/__init__.py",
        "    return list(__all__)",
        "    return list(globals())",
        ("test_public.py",),
    ),
    Mutant(
        "the step's resolution is asked of half precision alone",
        "evaluators/task/points.py",
        "radius > _CLEAR.get(leaf.dtype, math.inf):",
        "radius > 0 and leaf.dtype in _CLEAR:",
        ("test_first_hour.py",),
    ),
    Mutant(
        "an error tells a module's user to name an argument that a module has not",
        "func/function.py",
        'module=o.call != "zero_order"',
        "module=False",
        ("test_first_hour.py",),
    ),
    Mutant(
        "an iterator of parameters passes for any other argument",
        "func/inputs.py",
        "if isinstance(found, Iterator):",
        "if isinstance(found, Generic):",
        ("test_first_hour.py",),
    ),
    Mutant(
        "directions drawn under autocast",
        "distributions/directions.py",
        "with self.space.full_precision():\n            for block",
        "if True:\n            for block",
        ("test_directions.py",),
    ),
    Mutant(
        "factors of a transpose used after its weight was written to",
        "distributions/factored.py",
        "if (self if self._of is None else self._of)._sum is not None:",
        "if self._sum is not None:",
        ("test_low_rank.py",),
    ),
    Mutant(
        "one sigma for all groups of MeZO",
        "optim/descent.py",
        "directions.distribution.scale(space) * sigma[k]",
        "directions.distribution.scale(space) * sigma[0]",
        ("test_optim.py",),
    ),
]


def killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests fail on a copy of the package with this bug in it.

    Args:
        mutant: the bug.
        folder: an empty one, for the copy.

    Returns:
        True if a test failed.

    Raises:
        RuntimeError: if the tests could not run.
    """
    shutil.copytree(ROOT / "src" / "zograd", folder / "zograd")
    (folder / "zograd" / mutant.file).write_text(mutant.planted())
    tests = [str(ROOT / "tests" / name) for name in mutant.tests]
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # nobody overlooks tests that do not end
        print(f"killed   {mutant.name}: no end within {SECONDS} s", flush=True)
        return True
    if run.returncode not in (0, TESTS_FAILED):
        raise RuntimeError(f"{mutant.name}: the tests did not run\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    print(f"{'killed  ' if failed else 'SURVIVED'} {mutant.name}: {failed[0][7:100] if failed else ''}", flush=True)
    return bool(failed)


def main() -> int:
    """Run all mutants, or those whose name holds an argument.

    Returns:
        0 if all were killed.
    """
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    for mutant in chosen:
        mutant.planted()  # so that one whose place has moved is noticed at once
    count = 0
    for mutant in chosen:
        with tempfile.TemporaryDirectory() as folder:
            count += killed(mutant, Path(folder))
    print(f"killed {count}/{len(chosen)}")
    return count < len(chosen)


if __name__ == "__main__":
    sys.exit(main())
