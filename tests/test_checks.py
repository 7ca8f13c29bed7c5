"""The rules that all arguments are checked by, and the bytes that values travel as."""

import math
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch

from zograd._base import checks
from zograd._base.buffers import from_bytes, memory, to_bytes

TYPED = "`Thing(size=...)`"


def raised(call):
    try:
        return call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("given", [3, np.int64(3), np.array(3), np.uint8(3)], ids=repr)
def test_an_int_is_what_python_takes_for_one(given):
    got = checks.integer(given, TYPED, least=3)
    assert (got, type(got)) == (3, int)


@pytest.mark.parametrize("given", [True, 3.0, "3", torch.tensor(3), None, np.bool_(True), np.ones(2, int), int])
def test_nothing_else_is_an_int(given):
    said = f"TypeError: {TYPED} must be an int, got {type(given).__name__} {given!r:.80}."
    assert raised(lambda: checks.integer(given, TYPED)) == said
    optional = said if given is not None else None
    assert raised(lambda: checks.integer(given, TYPED, none=True)) == (
        optional and optional.replace("an int", "an int or None")
    )


@pytest.mark.parametrize(
    ("given", "is_seed"), [(0, True), ((1 << 63) - 1, True), (1 << 63, False), (-1, False), (np.uint64(1 << 63), False)]
)
def test_a_seed_has_63_bits(given, is_seed):
    wrong = f"ValueError: {TYPED} must lie in [0, 2**63), got {int(given)}."
    assert raised(lambda: checks.seed(given, TYPED)) == (given if is_seed else wrong)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (2, 2),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], dtype=torch.float64), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (Fraction(1, 2), 0.5),
        (10**400, 10**400),
    ],
    ids=repr,
)
def test_a_number_is_kept_as_one_of_python(given, plain):
    got = checks.number(given, TYPED, checks.POSITIVE)
    assert (got, type(got)) == (plain, type(plain))


@pytest.mark.parametrize(
    "given",
    [True, "1", b"1", 1j, None, [1.0], np.bool_(True), torch.tensor(True), torch.ones(2), np.ones(2), torch.Tensor],
    ids=repr,
)
def test_nothing_else_is_a_number(given):
    said = f"TypeError: {TYPED} must be a length, got {type(given).__name__} {given!r:.80}."
    assert raised(lambda: checks.number(given, TYPED, kind="a length")) == said


RANGES = {
    "POSITIVE": ([5e-324, math.inf, 10**400], [0, -0.0, -1.0, -(10**400)]),
    "FINITE": ([0, -1e308, 1e308], [math.inf, -math.inf, 10**400, -(10**400)]),
    "POSITIVE_FINITE": ([5e-324, 1e308], [0, -1.0, math.inf, 10**400]),
    "NOT_NEGATIVE_FINITE": ([0, 1e308], [-5e-324, math.inf]),
    "UNIT": ([0, 0.5, 1], [-5e-324, 1 + 1e-15]),
    "FRACTION": ([5e-324, 1], [0, 1 + 1e-15]),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    span, (inside, outside) = getattr(checks, name), RANGES[name]
    assert [checks.number(value, TYPED, span) for value in inside] == inside
    for value in [*outside, math.nan]:
        said = f"ValueError: {TYPED} must {span.text}, got {value!r:.80}."
        assert raised(lambda value=value: checks.number(value, TYPED, span)) == said


def test_every_range_is_looked_at():
    assert {name for name, value in vars(checks).items() if isinstance(value, checks.Range)} == RANGES.keys()


def test_the_first_range_that_does_not_hold_is_named():
    both = (checks.POSITIVE, checks.FINITE)
    assert "must be positive, got -inf" in raised(lambda: checks.number(-math.inf, TYPED, *both))
    assert "must be finite, got inf" in raised(lambda: checks.number(math.inf, TYPED, *both))


@pytest.mark.parametrize(
    ("check", "good", "bad", "kind"),
    [
        (checks.boolean, True, 1, "a bool"),
        (checks.boolean, False, np.bool_(True), "a bool"),
        (checks.function, len, 3, "a function"),
    ],
)
def test_bools_and_functions(check, good, bad, kind):
    check(good, TYPED)
    check(good, TYPED, none=True)
    check(None, TYPED, none=True)
    for wrong in (bad, None):
        said = f"TypeError: {TYPED} must be {kind}, got {type(wrong).__name__} {wrong!r}."
        assert raised(lambda wrong=wrong: check(wrong, TYPED)) == said
    assert f"must be {kind} or None, got" in raised(lambda: check(bad, TYPED, none=True))


def test_instances():
    checks.instance("x", (str, bytes), TYPED, "a text")
    assert raised(lambda: checks.instance(3, str, TYPED, "a text")) == f"TypeError: {TYPED} must be a text, got int 3."


# ------------------------------------------------------------------------------------------------------------- buffers

TENSORS = {
    "scalar": torch.tensor(math.pi),
    "strided": torch.arange(12.0).view(3, 4).T[1:],
    "expanded": torch.ones(1).expand(4),
    "half": torch.arange(3, dtype=torch.float16),
    "leaf": torch.ones(2, requires_grad=True),
    "negated": torch.tensor([1 + 2j]).conj().imag,  # a view that negates when it is read
    "conjugated": torch.tensor([1 + 2j]).conj(),
    "empty": torch.ones(0, 3),
    "bools": torch.tensor([True, False]),
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_memory_of_a_tensor(name):
    tensor = TENSORS[name]
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    wanted = plain.numpy().tobytes()
    assert bytes(memory(tensor)) == wanted
    assert zlib.crc32(memory(tensor)) == zlib.crc32(wanted)


def test_the_memory_outlives_its_tensor():
    buffers = [memory(torch.full((1000,), i, dtype=torch.float32).double()) for i in range(20)]
    assert [torch.frombuffer(b, dtype=torch.float64).unique().tolist() for b in buffers] == [[i] for i in range(20)]


@pytest.mark.parametrize("name", sorted(TENSORS.keys() - {"conjugated"}))
def test_values_come_back_as_they_went(name):
    tensor = TENSORS[name]
    data = to_bytes(tensor)
    assert len(data) == 8 * tensor.numel()
    assert torch.equal(from_bytes(data, tensor.shape), tensor.detach().to(torch.float64))
    assert torch.equal(from_bytes(data), tensor.detach().to(torch.float64).reshape(-1))


@pytest.mark.parametrize("value", [0.1, -0.0, math.inf, 5e-324, 3], ids=repr)
def test_floats_go_like_tensors(value):
    assert to_bytes(value) == to_bytes(torch.tensor(value, dtype=torch.float64))


def test_nan_keeps_its_bits():
    data = (0x7FF8_0000_DEAD_BEEF).to_bytes(8, "little")
    assert to_bytes(from_bytes(data)) == data


@pytest.mark.parametrize("data", [b"", bytes(16)], ids=len)
def test_values_come_to_the_cpu(data):
    with torch.device("meta"):
        values = from_bytes(data)
    assert (values.device.type, values.numel()) == ("cpu", len(data) // 8)
    values.add_(1)  # writable, and memory of its own
    assert not any(data)
