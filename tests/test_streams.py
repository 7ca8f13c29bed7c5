"""Keyed streams: what a seed means must not change unnoticed.

A digest that differs says that every seeded result of users changes: enter that in the changelog, then commit the new
digest.
"""

import hashlib
import inspect

import pytest
import torch

from problems import Directions
from zograd._base.streams import FnStream, Purpose, derive, key
from zograd._base.trees import Space
from zograd.distributions import (
    Coordinate,
    Dense,
    Gaussian,
    Guided,
    Hadamard,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
)

FAMILIES = {"gaussian": Gaussian(), "rademacher": Rademacher(), "sphere": Sphere()}
CAPABILITY = torch.backends.cpu.get_cpu_capability()
DIGESTS = {  # of the bytes, and of the signs alone
    ("gaussian", "float32", 3): ("e28b8c581d124644", "e66879b2179ce584"),
    ("gaussian", "float32", 1000): ("5d22806395d10660", "32a778262a71a2df"),
    ("gaussian", "float32", 70000): ("af042c6907e4ae14", "2a8c2c1033702bd7"),
    ("gaussian", "float64", 3): ("50e14e96438b91ce", "2fc260413c1342f4"),
    ("gaussian", "float64", 1000): ("501de88554993108", "b4c9c8d940394c8d"),
    ("gaussian", "float64", 70000): ("4f78c9bd69ad1f25", "32923bfd93ea1e37"),
    ("rademacher", "float32", 3): ("44332dcbeec2d7b9", "878798be5f3911bf"),
    ("rademacher", "float32", 1000): ("88c476c4a0b60b1c", "cd98ebb71d5e5a15"),
    ("rademacher", "float32", 70000): ("d714637c6b6d64a4", "33d395f5e79a3cea"),
    ("rademacher", "float64", 3): ("98fe329f27d19d2b", "1e4f6797ccd57530"),
    ("rademacher", "float64", 1000): ("a8a75a5a727d51d1", "213d8633806e5626"),
    ("rademacher", "float64", 70000): ("dc707c08f17ea146", "da522eb44bd190a5"),
    ("sphere", "float32", 3): ("2cbe67d2f54e7f4f", "e66879b2179ce584"),
    ("sphere", "float32", 1000): ("611f757d60954e1d", "32a778262a71a2df"),
    ("sphere", "float32", 70000): ("d6ac09a635b6a437", "2a8c2c1033702bd7"),
    ("sphere", "float64", 3): ("ba365e54b874aa2b", "2fc260413c1342f4"),
    ("sphere", "float64", 1000): ("76cabea1802e07aa", "b4c9c8d940394c8d"),
    ("sphere", "float64", 70000): ("f4ce198d8899fd44", "32923bfd93ea1e37"),
}


def first_block(family, dtype, size):
    layout = Space.of((torch.empty(size, dtype=dtype),))
    d = Directions(FAMILIES[family], layout, 2**40 + 7, 4 * 65536)
    return d.noise(*next(iter(d.blocks())))[0].clone()


def digest(values):
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:16]


def signs_digest(values):
    return digest(values > 0)


@pytest.mark.parametrize("size", [3, 1000, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_block_is_the_committed_one(family, dtype, size):
    values = first_block(family, dtype, size)
    exact, signs = DIGESTS[family, str(dtype).removeprefix("torch."), size]
    assert signs_digest(values) == signs
    # Logarithms, cosines and sums may differ in the last bit between instruction sets; signs do not.
    portable = {"rademacher": True, "gaussian": "AVX" in CAPABILITY, "sphere": CAPABILITY == "AVX2"}
    if portable[family]:
        assert digest(values) == exact


GROUPS = {
    "orthogonal": Orthogonal(),
    "hadamard": Hadamard(),
    "sobol": Sobol(),
    "coordinate": Coordinate(),
    "guided": Guided(torch.linspace(-1, 1, 40).exp().view(20, 2).cumsum(0).cos()),
}
GROUP_DIGESTS = {  # of the signs, or the indices, of the second group
    "orthogonal": "5e87214edfb26e8e",
    "hadamard": "e70da4bfe047e1fc",
    "sobol": "3e4febde7331eb5b",
    "coordinate": "465a36cc340043dc",
    "guided": "a0eafdbcd5e54c6a",
}


@pytest.mark.parametrize("family", GROUPS)
def test_the_second_group_is_the_committed_one(family):
    d = Directions(GROUPS[family], Space.of((torch.empty(20),)), 2**40 + 7, 16_384)
    values = d.noise(d.block, 2 * d.block)[0]
    assert digest(values if family == "coordinate" else values > 0) == GROUP_DIGESTS[family]


@pytest.mark.parametrize("family", [Orthogonal(), Hadamard(), Sobol(), Coordinate(), Guided(torch.ones(3))], ids=str)
def test_every_stream_of_every_group_has_a_key_of_its_own(family, monkeypatch):
    used = []

    def noted(seed, purpose, counter):
        used.append(counter)
        return key(seed, purpose, counter)

    for kind in (Dense, Coordinate, Hadamard, Sobol):
        monkeypatch.setattr(inspect.getmodule(kind), "key", noted)
    for kind in (Dense, Guided, Hadamard, Orthogonal):
        monkeypatch.setattr(inspect.getmodule(kind), "TILE", 4)  # several streams a block
    monkeypatch.setattr(inspect.getmodule(Dense), "BLOCK", 300)
    space = Space.of((torch.empty(3),))
    d = Directions(family, space, 3, 6 * family.rows(space, 10**6) - 1)
    for lo, hi in d.blocks():
        d.noise(lo, hi)
    assert len(used) == len(set(used)) >= 6


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_no_two_streams_of_an_estimate_share_a_key(seed):
    near = {key(seed, purpose, i) for purpose in Purpose for i in range(2**16)}
    assert len(near) == 3 * 2**16
    far = {key(seed, purpose, (i * 40503 + (i << 14)) % 2**30) for purpose in Purpose for i in range(2**14)}
    counters = {(i * 40503 + (i << 14)) % 2**30 for i in range(2**14)}
    assert len(far) == 3 * len(counters)
    assert all(0 <= k < 2**32 for k in near | far)  # all that torch's CPU generator reads


def test_a_counter_that_does_not_fit_is_an_error():
    key(5, Purpose.DIRECTION, 2**30 - 1)
    with pytest.raises(OverflowError, match=r"at most 2\*\*30 streams for each purpose, got number 1073741824"):
        key(5, Purpose.DIRECTION, 2**30)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 47, 62])
def test_every_bit_of_the_seed_counts(bit):
    """torch's generator drops the upper 32 bits of its own seed."""
    base = 0x0123456789ABCDEF
    other = base ^ (1 << bit)
    first, second = ([key(s, Purpose.DIRECTION, i) for i in range(1000)] for s in (base, other))
    assert sum(a == b for a, b in zip(first, second, strict=True)) <= 1
    layout = Space.of((torch.empty(20),))
    rows = [Directions(Gaussian(), layout, s, 5).noise(0, 5)[0].clone() for s in (base, other)]
    assert (rows[0] != rows[1]).all()


def test_seeds_do_not_shift_each_other():
    """Neighboring seeds at neighboring counters, where adding the two up would give one stream."""
    keys = [key(seed, Purpose.DIRECTION, i) for seed in range(64) for i in range(64)]
    assert len(set(keys)) >= len(keys) - 2


def test_purposes_differ():
    streams = {purpose: [key(9, purpose, i) for i in range(100)] for purpose in Purpose}
    assert set(streams) == {Purpose.DIRECTION, Purpose.FN, Purpose.INNER}
    assert len({k for keys in streams.values() for k in keys}) == 300


class Keys(Dense):
    """Records the key of every tile it fills, with the length of the tile."""

    def __init__(self):
        self.tiles = []

    def fill(self, out, generator):
        self.tiles.append((generator.initial_seed(), out.numel()))
        out.zero_()


@pytest.mark.parametrize(("size", "num"), [(1, 200_000), (10, 20_000), (1000, 300), (40_000, 6), (70_000, 5)])
def test_every_tile_of_every_block_has_a_stream_of_its_own(size, num):
    family = Keys()
    d = Directions(family, Space.of((torch.empty(size),)), 3, num)
    for lo, hi in d.blocks():
        d.noise(lo, hi)
    keys = [k for k, _ in family.tiles]
    assert len(set(keys)) == len(keys)
    assert sum(length for _, length in family.tiles) == size * num
    assert max(length for _, length in family.tiles) <= 32768


def test_the_keys_of_a_block_do_not_depend_on_how_many_directions_follow():
    tiles = []
    for num in (70_000, 2 * 65_536, 300_000):
        family = Keys()
        Directions(family, Space.of((torch.empty(1),)), 3, num).noise(0, 70_000)
        tiles.append([k for k, _ in family.tiles][:3])
    assert tiles[0] == tiles[1] == tiles[2]


def test_what_fn_sees_is_apart_from_the_directions():
    stream = FnStream(17, torch.device("cpu"), shared=False)
    seen = [stream.key(i) for i in range(-1, 200)]
    assert len(set(seen)) == len(seen)
    assert not set(seen) & {key(17, Purpose.DIRECTION, i) for i in range(10_000)}
    shared = FnStream(17, torch.device("cpu"), shared=True)
    assert {shared.key(i) for i in range(-1, 200)} == {seen[0]}  # the center's


def test_derived_seeds_are_valid_seeds_and_differ():
    seeds = {derive(s, *counters) for s in range(30) for counters in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2, 3)]}
    assert len(seeds) == 180
    assert all(0 <= s < 2**63 for s in seeds)
    assert not seeds & set(range(30))
