"""Estimates shared out among ranks: the bits of one process, and named errors whatever happens to a rank."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rank_cases
import zograd
from rank_cases import X
from zograd import zero_order
from zograd.evaluators import Distributed, Journal, Loop, Vmap

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
DEADLINE = 120  # seconds: three processes import torch side by side


@pytest.fixture
def ranks(tmp_path):
    """Runs a case of rank_cases.py on so many ranks; their results, None of one that died."""
    processes = []

    def run(case, count):
        folder = tmp_path / f"{case.__name__}{count}"
        folder.mkdir()
        for rank in range(count):
            given = [case.__name__, str(rank), str(count), str(folder)]
            command = [sys.executable, "-c", "import rank_cases; rank_cases.main()", *given]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, cwd=Path(__file__).parent, **pipes))
        said = [process.communicate(timeout=DEADLINE)[0] for process in processes[-count:]]
        results = [folder / f"result{rank}" for rank in range(count)]
        assert any(path.exists() for path in results), "\n".join(said)
        return [torch.load(path, weights_only=False) if path.exists() else None for path in results]

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def assert_equal(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_equal(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert_equal(a, b)
    else:
        assert got == wanted


two_and_three = pytest.mark.parametrize("count", [2, 3])


@two_and_three
def test_every_rank_has_the_bits_of_one_process(ranks, count):
    wanted = rank_cases.bits()
    for result in ranks(rank_cases.same_bits, count):
        assert_equal(result, wanted)


def test_ranks_with_data_of_their_own_agree_on_value_and_gradient(ranks):
    first, second = ranks(rank_cases.other_data, 2)
    assert_equal(first, second)
    assert first["value"] == X.sum()  # the first rank's


def test_a_wrapped_module_trains_as_in_one_process_its_buffers_included(ranks):
    wanted = rank_cases.train("loop", rank_cases.Outer)
    for result in ranks(rank_cases.in_a_wrapper, 2):
        assert_equal(result, wanted)


def test_it_works_inside_ddp(ranks):
    # Two ranks: DDP's mean of two equal gradients is exact.
    wanted = rank_cases.train("loop", torch.nn.Sequential)
    for result in ranks(rank_cases.in_ddp, 2):
        assert_equal(result, wanted)


def test_each_rank_counts_its_own_calls(ranks):
    results = ranks(rank_cases.counts, 3)
    for of_rank in results:
        assert all(calls == reported == tracked for calls, reported, tracked in of_rank)
    totals = [sum(of_rank[k][0] for of_rank in results) for k in range(3)]
    assert totals == [3 + 2 * num for num in (1, 4, 7)]  # each evaluates the center


def test_journals_inside_and_outside(ranks):
    wanted = rank_cases.plain(zero_order(num_samples=7, method="antithetic", seed=3)(rank_cases.cubes).estimate(X))
    for result in ranks(rank_cases.with_journals, 2):
        for k, (estimate, calls) in enumerate(result):
            assert_equal(estimate, wanted)
            assert (calls == 0) if k % 2 else (calls > 0)


def test_a_journal_serves_another_number_of_ranks(ranks, tmp_path):
    wanted = ranks(rank_cases.with_journals, 3)[0][0][0]
    rank_cases.CALLS.clear()
    journal = Journal("loop", tmp_path / "with_journals3" / "shared")
    settings = {"num_samples": 7, "method": "antithetic", "seed": 3}
    assert_equal(rank_cases.plain(zero_order(**settings, evaluator=journal)(rank_cases.counted).estimate(X)), wanted)
    assert not rank_cases.CALLS


def test_a_group_of_some_ranks(ranks):
    wanted = rank_cases.plain(zero_order(num_samples=7, method="antithetic", seed=3)(rank_cases.cubes).estimate(X))
    first, outside, second = ranks(rank_cases.in_a_group, 3)
    assert_equal(first, wanted)
    assert_equal(second, wanted)
    assert "has no rank in the group" in outside


# ------------------------------------------------------------------------------------------------------ what goes wrong


def same_error(results, *words):
    """The error that all ranks raised, which says these words."""
    assert all(results), results
    kinds, texts, causes, seconds = zip(*results, strict=True)
    assert set(kinds) == {"RankError"}
    for text in texts:
        assert all(word in text for word in words), text
    assert max(seconds) < 30
    return texts, causes


POLITE = {
    "one_raises": ["failed on rank 1", "raised OSError at direction", "the simulator is gone"],
    "one_raises_at_the_center": ["failed on rank 1", "OSError", "the simulator is gone"],
    "one_exits": ["failed on rank 1", "SystemExit"],
    "other_seed": ["do not agree on the seed: those of rank 1 differ", "torch.manual_seed"],
    "other_parameters": ["do not agree on the parameters: those of rank 1 differ"],
    "other_shapes_of_parameters": ["do not agree on the parameters"],
    "other_points": ["do not agree on the points asked for", "num_samples"],
    "other_directions": ["do not agree on the directions", "distribution"],
    "other_shape_of_values": ["one shape on all ranks", "got (2,) on rank 1 and (1,) on rank 0"],
}
ALIKE = {
    "all_raise": ("TypeError", "must return a tensor or a number, got None"),
    "one_is_not_finite": ("NonFiniteError", "non-finite values at"),
    "no_replay": ("ReplayError", "cannot be made again on another rank"),
}


@two_and_three
def test_what_leaves_the_group_whole(ranks, count):
    # One after the other in the same processes: after each error the next estimate finds the ranks in step.
    results = ranks(rank_cases.polite, count)
    got = {name: [result[name] for result in results] for name in rank_cases.POLITE}
    for name, words in POLITE.items():
        texts, causes = same_error(got[name], *words)
        assert len(set(texts)) == 1
        assert [cause != "None" for cause in causes] == [
            rank == 1 and "rank 1. It raised" in texts[0] for rank in range(count)
        ]
    assert "OSError" in got["one_raises"][1][2]
    # What all ranks meet alike is raised as in one process.
    for name, (kind, word) in ALIKE.items():
        assert {result[0] for result in got[name]} == {kind}
        assert {word in result[1] for result in got[name]} == {True}
    assert len({result[1] for result in got["one_is_not_finite"]}) == 1


def test_what_fails_on_one_rank_is_left_out_on_all(ranks):
    first, second = ranks(rank_cases.one_drops, 2)
    assert_equal(first, second)
    assert first["warned"] == 1
    assert torch.isfinite(first["grad"]).all()


@two_and_three
def test_a_rank_dies(ranks, count):
    results = ranks(rank_cases.one_dies, count)
    assert results.pop(1) is None
    same_error(results, "a rank died, left the estimate, or did not answer within 5 s")


def test_a_rank_hangs(ranks):
    first, second = ranks(rank_cases.one_hangs, 2)
    same_error([first], "did not answer within 2 s")
    assert first[3] < 15
    same_error([second], "a rank died, left")  # once it is back


def test_a_rank_leaves(ranks):
    first, second = ranks(rank_cases.one_leaves, 2)
    same_error([first], "a rank died, left the estimate")
    assert second is None


def test_the_example_ends_with_the_same_parameters(tmp_path):
    pytest.importorskip("matplotlib")

    def run(*launcher):
        script = Path(__file__).parent.parent / "examples" / "torchrun_es.py"
        ran = subprocess.run(
            [sys.executable, *launcher, str(script), "--quick", "--output", str(tmp_path / "picture.png")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()[-1]

    assert run() == run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


# -------------------------------------------------------------------------------------------------------- one process


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_is_one_process(alone):
    assert_equal(rank_cases.bits(lambda inner: Distributed(inner=inner)), rank_cases.bits())


def test_without_a_process_group():
    with pytest.raises(zograd.RankError, match=r"call `torch.distributed.init_process_group\(\)` before"):
        zero_order(evaluator=Distributed())(rank_cases.cubes).estimate(X)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"inner": 3}, TypeError, r"`Distributed\(inner=...\)` must be a name or an Evaluator, got int 3"),
        ({"inner": "pool"}, ValueError, r"`Distributed\(inner=...\)` must be one of 'loop', .* got 'pool'"),
        ({"timeout": "1"}, TypeError, r"`Distributed\(timeout=...\)` must be a number of seconds, got str '1'"),
        ({"timeout": True}, TypeError, "must be a number of seconds, got bool True"),
        ({"timeout": 0}, ValueError, "must be positive and finite, got 0"),
        ({"timeout": float("inf")}, ValueError, "must be positive and finite, got inf"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        Distributed(**settings)


def test_it_shows_compares_and_copies(alone):
    evaluator = Distributed(inner=Vmap(8), timeout=5)
    assert repr(evaluator) == "Distributed(inner=Vmap(chunk_size=8), timeout=5)"
    assert copy.deepcopy(evaluator) == evaluator == Distributed(None, Vmap(8), 5.0)
    assert evaluator != Distributed(inner=Loop(), timeout=5)
    group = dist.new_group([0])
    assert copy.deepcopy(Distributed(group)).group is group
