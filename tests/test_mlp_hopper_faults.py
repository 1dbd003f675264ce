"""Faults built into the kernels of compute capability 9.0a are found by the emulation, whatever the order."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import test_mlp_hopper
from cuda_emulation.faults import broken_program
from cuda_emulation.harness import EmulationError
from test_mlp_hopper import (
    PARTS_OF_RAYS,
    SEEDS,
    SMALL,
    Network,
    check_composited,
    check_dgrad,
    check_forward,
    check_wgrad,
    dgrad,
    forward,
    wgrad,
)

# Faults built into a copy of the sources, each chosen at run time: where, what stands there, what stands there when
# broken, the launch that must fail, the check, and what it says ("wrong" where the numbers are found wrong).
CHAIN, FORWARD = "mlp_hopper_chain.cuh", "mlp_hopper_kernels.cuh"
DGRAD, WGRAD = "mlp_hopper_backward_kernels.cuh", "mlp_hopper_wgrad_kernels.cuh"
FAULTS = {
    "no wait for the last products": (
        CHAIN,
        "    wgmma_wait<0>();\n    wgmma_hold(d);\n    ring.release(held);\n}",
        "    if (!fault) wgmma_wait<0>();\n    wgmma_hold(d);\n    ring.release(held);\n}",
        ("forward", "memory", "wrong|wrote to|shapes|a bulk copy replaces|touched since"),
    ),
    "a stage let go while it is read": (
        CHAIN,
        "        wgmma_wait<1>();\n        if (held >= 0) ring.release(held);\n        held = ring.stage;",
        "        if (fault) ring.release(ring.stage);\n        wgmma_wait<1>();\n"
        "        if (!fault && held >= 0) ring.release(held);\n        held = ring.stage;",
        ("forward", "memory", "a bulk copy replaces|may be under way|more arrivals|divergence"),
    ),
    "the wrong parity for a full stage": (
        CHAIN,
        "void wait() const { barrier_wait(full + stage, parity); }",
        "void wait() const { barrier_wait(full + stage, parity ^ unsigned(fault)); }",
        ("forward", "memory", "may be under way|divergence: no thread|a bulk copy replaces|more arrivals"),
    ),
    "no wait for an empty stage": (
        CHAIN,
        "barrier_wait(empty + stage, parity ^ 1u);",
        "if (!fault) barrier_wait(empty + stage, parity ^ 1u);",
        ("forward", "memory", "a bulk copy replaces|more arrivals"),
    ),
    "the wrong stride of an operand": (
        CHAIN,
        "return operand_descriptor(ring.here(), kOctet, 128);",
        "return operand_descriptor(ring.here(), fault ? 128 : kOctet, 128);",
        ("forward", "memory", "wrong"),
    ),
    "a stale stage": (
        CHAIN,
        "return stages + static_cast<unsigned>(stage) * stage_bytes;",
        "return stages + static_cast<unsigned>(threadIdx.x < 256 && fault ? (stage + count - 1) % count : stage) "
        "* stage_bytes;",
        ("forward", "memory", "wrong|a bulk copy|may be under way"),
    ),
    "half of a chunk twice": (
        CHAIN,
        "mine = static_cast<unsigned>(cluster_rank()) * part;",
        "mine = static_cast<unsigned>(fault ? 0 : cluster_rank()) * part;",
        ("forward", "memory", "a bulk copy replaces"),
    ),
    "only the own block's stages let go": (
        CHAIN,
        "barrier_arrive_at(empty + of_stage, t / kWarpSize);",
        "barrier_arrive_at(empty + of_stage, fault ? cluster_rank() : t / kWarpSize);",
        ("forward", "memory", "a bulk copy replaces|more arrivals|divergence: no thread"),
    ),
    "features without a proxy fence": (
        FORWARD,
        "                    proxy_fence();\n",
        "                    if (!fault) proxy_fence();\n",
        ("forward", "races", "without a proxy_fence"),
    ),
    "features replaced too early": (
        FORWARD,
        "barrier_wait(tile_empty + w, (static_cast<unsigned>(round) & 1u) ^ 1u);",
        "if (!fault) barrier_wait(tile_empty + w, (static_cast<unsigned>(round) & 1u) ^ 1u);",
        ("forward", "races", "race: |more arrivals|divergence: no thread"),
    ),
    "gone before the neighbour has finished": (
        FORWARD,
        "cluster_sync();  // nobody leaves",
        "if (!fault) cluster_sync();  // nobody leaves",
        ("forward", "memory", "may end before|has ended|ends while"),
    ),
    "composited before the colours have come": (
        FORWARD,
        "barrier_wait(colour_full, static_cast<unsigned>(round) & 1u);",
        "if (!fault) barrier_wait(colour_full, static_cast<unsigned>(round) & 1u);",
        ("composited", "races", "race: |has not written|more arrivals|divergence: no thread"),
    ),
    "colours replaced while they are composited": (
        FORWARD,
        "barrier_wait(colour_empty, (static_cast<unsigned>(round) & 1u) ^ 1u);",
        "if (!fault) barrier_wait(colour_empty, (static_cast<unsigned>(round) & 1u) ^ 1u);",
        ("composited", "races", "race: |more arrivals|divergence: no thread"),
    ),
    "the progress of a long ray forgotten": (
        FORWARD,
        "if (rows.before > 0) progress = kept_progress(colours + 3, 4);",
        "if (rows.before > 0 && !fault) progress = kept_progress(colours + 3, 4);",
        ("composited", "memory", "wrong"),
    ),
    "the ray of the next group": (
        FORWARD,
        "rows.ray = group * tiling.rays;",
        "rows.ray = group * tiling.rays + (fault && group == 0);",
        ("composited", "memory", "wrong"),
    ),
    "the neighbour's mask": (
        DGRAD,
        "mask.value[i / 16] << (i % 8);",
        "mask.value[i / 16] << ((i + int(fault)) % 8);",
        ("dgrad", "memory", "wrong"),
    ),
    "a block of samples left out": (
        WGRAD,
        "return unit <= g.first_unit ? 0 : (block < blocks ? block : blocks);",
        "return unit <= g.first_unit ? 0 : (block < blocks ? block : blocks - std::int64_t(fault));",
        ("wgrad", "memory", "wrong"),
    ),
    "the strides of an operand exchanged": (
        WGRAD,
        "const std::uint64_t b = operand_descriptor(stage + my_columns, 128, kOctet);",
        "const std::uint64_t b =\n"
        "                        operand_descriptor(stage + my_columns, fault ? kOctet : 128, fault ? 128 : kOctet);",
        ("wgrad", "memory", "wrong"),
    ),
    "a partial sum of another block": (
        WGRAD,
        "const float* partial = workspace + partial_place<W>(g, pair, rank);",
        "const float* partial = workspace + partial_place<W>(g, pair + int(fault), rank);",
        ("wgrad", "memory", "wrong"),
    ),
}


@pytest.fixture(scope="module")
def broken() -> Path:
    return broken_program("mlp_hopper", [(f"mlp/{fault[0]}", *fault[1:3]) for fault in FAULTS.values()])


@functools.cache
def sound_launches(program, seed):
    """A network, what its forward keeps and its deltas, from the copy without a fault."""
    network = Network(SMALL, seed)
    kept = forward(network, seed=seed)
    return network, kept, dgrad(network, kept, seed=seed)


def run_broken(monkeypatch, program, launch, fault, seed, check):
    """The launches before `launch` sound, that one with the fault; raises where anything is found wrong."""
    monkeypatch.setattr(test_mlp_hopper, "PROGRAM", program)
    network, kept, deltas = (
        sound_launches(program, seed)
        if launch not in ("forward", "composited")
        else (Network(SMALL, seed), None, None)
    )
    monkeypatch.setattr(test_mlp_hopper, "FAULT", fault)
    try:
        if launch == "composited":
            expect("wrong", check_composited, PARTS_OF_RAYS, seed, [check])
        elif launch == "forward":
            expect("wrong numbers", check_forward, network, forward(network, seed=seed, checks=[check]))
        elif launch == "dgrad":
            deltas = dgrad(network, kept, seed=seed, checks=[check])
            expect("wrong numbers", check_dgrad, network, kept, deltas)
        else:
            gradients = wgrad(network, kept, deltas, True, seed, [check])
            expect("wrong numbers", check_wgrad, network, kept, deltas, gradients)
    finally:
        monkeypatch.setattr(test_mlp_hopper, "FAULT", 0)


def expect(sentence, check, *arguments):
    try:
        check(*arguments)
    except EmulationError:  # has a sentence of its own
        raise
    except AssertionError as error:
        raise AssertionError(f"{sentence}: {error}") from error


def test_the_copy_without_a_fault_is_sound(broken, monkeypatch):
    for seed in SEEDS[:3]:
        run_broken(monkeypatch, broken, "wgrad", 0, seed, "memory")
        run_broken(monkeypatch, broken, "forward", 0, seed, "races")
        run_broken(monkeypatch, broken, "composited", 0, seed, "races")


def seeds_of(name):
    """All of them, but for wrong numbers in any order, where one fault stands for the others."""
    wrong = [other for other, (*_, (_, _, sentence)) in FAULTS.items() if sentence == "wrong"]
    return SEEDS[:4] if name in wrong[1:] else SEEDS


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_kernel_is_caught_for_every_seed(broken, monkeypatch, name):
    launch, check, sentence = FAULTS[name][-1]
    for seed in seeds_of(name):
        with pytest.raises(AssertionError, match=sentence):
            run_broken(monkeypatch, broken, launch, list(FAULTS).index(name) + 1, seed, check)
