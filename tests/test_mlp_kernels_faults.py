"""Faults built into the mma.sync kernels of the fused network are found by the emulation, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from cuda_emulation import harness
from cuda_emulation.faults import broken_program
from cuda_emulation.harness import EmulationError
from test_mlp_kernels import Case, Network, check_backward, check_forward, composite_case, make_case, run_case

SEEDS = range(20)

# Name; file of csrc/mlp, what stands there, what stands there when broken; the check and the sentence that find it.
Fault = tuple[str, str, str, str, str, str]
KERNEL_FAULTS: list[Fault] = [
    (
        "no barrier before a tile is overwritten",
        "mlp_kernels.cuh",
        "block_sync();  // every warp has read the tile\n            const auto masks",
        "if (!fault) block_sync();\n            const auto masks",
        "races",
        "race: .* of shared memory|has not written",
    ),
    (
        "a stage refilled while it is read",
        "mlp_tile.cuh",
        "        block_sync();  // the stage is there for every warp, and the one used last is free\n        issue(",
        "        if (fault) issue(reading_ == 0 ? G::kStages - 1 : reading_ - 1);\n"
        "        block_sync();  // the stage is there\n        if (!fault) issue(",
        "races",
        "may still be writing|race: .* of shared memory",
    ),
    (
        "no barrier after the weights have landed",
        "mlp_tile.cuh",
        "block_sync();  // the stage is there",
        "if (!fault) block_sync();  // the stage is there",
        "races",
        "may still be writing|race: .* of shared memory|has not written",
    ),
    (
        "a wait for one group too few",
        "mlp_tile.cuh",
        "async_wait<G::kStages - 2>();",
        "if (fault) async_wait<G::kStages - 1>(); else async_wait<G::kStages - 2>();",
        "races",
        "may still be writing",
    ),
    (
        "features read before they have landed",
        "mlp_kernels.cuh",
        "    async_commit();\n    async_wait<0>();",
        "    async_commit();\n    if (!fault) async_wait<0>();",
        "races",
        "may still be writing",
    ),
    (
        "the last row but one",
        "mlp_tile.cuh",
        "while (row < rows) {",
        "while (row < rows + fault) {",
        "memory",
        "AddressSanitizer",
    ),
    (
        "wgrad waits for one group too few",
        "mlp_backward_kernels.cuh",
        "async_wait<kWgradStages - 2>();",
        "if (fault) async_wait<kWgradStages - 1>(); else async_wait<kWgradStages - 2>();",
        "races",
        "may still be writing|race: .* of shared memory",
    ),
    # Wrong numbers, without a word from the checks.
    (
        "neighbours' masks",
        "mlp_backward_kernels.cuh",
        "masks.value[r] >> (4 * product + k) & 1",
        "masks.value[r] >> (4 * product + (k ^ fault)) & 1",
        "values",
        "deltas of hidden layer",
    ),
    (
        "a stale stage",
        "mlp_tile.cuh",
        "stages() + reading_ * kStageBytes",
        "stages() + (fault ? 1 - reading_ : reading_) * kStageBytes",
        "values",
        "layer|head",
    ),
    (
        "a sample left out",
        "mlp_backward_kernels.cuh",
        "const bool valid = row < rows && first + column < columns;\n            async",
        "const bool valid = row < rows - fault && first + column < columns;\n            async",
        "values",
        "gradient of weight",
    ),
    (
        "the bias of the next ray",
        "mlp_kernels.cuh",
        "static_cast<int>(sample / in.samples_per_ray)",
        "static_cast<int>((sample + fault) / in.samples_per_ray)",
        "memory",
        "AddressSanitizer",
    ),
]


# The same in what comes behind the network.
COMPOSITING_FAULTS: list[Fault] = [
    (
        "composited before every row is there",
        "mlp_kernels.cuh",
        "block_sync();  // colours and densities of all rows are there",
        "if (!fault) block_sync();",
        "races",
        "race: |has not written",
    ),
    (
        "the progress of a long ray forgotten",
        "mlp_kernels.cuh",
        "if (before > 0) progress = kept_progress(kept, 1);",
        "if (before > 0 && !fault) progress = kept_progress(kept, 1);",
        "values",
        "pixels|distance|acc|weights",
    ),
    (
        "the colour of the next sample",
        "mlp_kernels.cuh",
        "load_pack_shared<4>(colour_at<W>(tile, row + i))",
        "load_pack_shared<4>(colour_at<W>(tile, row + i + (fault && i == 0)))",
        "values",
        "pixels",
    ),
    (
        "the depth in front of 32 samples left out",
        "mlp_composite.cuh",
        "progress.depth += warp_shuffle(inclusive, kWarpSize - 1);",
        "if (!fault) progress.depth += warp_shuffle(inclusive, kWarpSize - 1);",
        "values",
        "pixels|distance|acc|weights",
    ),
]
FAULTS = KERNEL_FAULTS + COMPOSITING_FAULTS


def seeds_of(fault: Fault) -> range:
    """All of them where it is about order.

    Wrong numbers and addresses follow from the arithmetic alone, whatever the order that a seed draws: of these, one
    fault of each kind stands for the others.
    """
    first_of_kind = next(other for other in FAULTS if other[4] == fault[4])
    return SEEDS if fault[4] == "races" or fault is first_of_kind else SEEDS[:4]


@pytest.fixture(scope="module")
def broken() -> Path:
    return broken_program("mlp", [(f"mlp/{file}", sound, faulty) for _, file, sound, faulty, _, _ in FAULTS])


def run_broken(program: Path, fault: int, seed: int, checks: Sequence[str]) -> Case:
    case = make_case(Network(16, 64, 2, 4, 16, 1), 11, 3, seed)
    return run_case(case, seed, program=program, fault=fault, checks=checks)


def check_both(case: Case) -> None:
    check_forward(case)
    check_backward(case, case.samples // 16 + 3)


def sound_checks(seed: int) -> Sequence[str]:
    """Races for every order; addresses, which do not depend on it, for some."""
    return harness.CHECKS if seed in SEEDS[:4] else ["races"]


def test_the_copy_without_a_fault_is_sound(broken: Path) -> None:
    for seed in SEEDS:
        check_both(run_broken(broken, 0, seed, sound_checks(seed)))


def composite_broken(program: Path, fault: int, seed: int, checks: Sequence[str]) -> None:
    """Tiles that hold a part of a ray."""
    net = Network(12, 64, 2, 4, 16, 1)
    composite_case(net, 2, 150, seed, program=program, fault=fault, checks=checks)


def test_compositing_without_a_fault_is_sound(broken: Path) -> None:
    for seed in SEEDS:
        composite_broken(broken, 0, seed, sound_checks(seed))


@pytest.mark.parametrize("fault", COMPOSITING_FAULTS, ids=[fault[0] for fault in COMPOSITING_FAULTS])
def test_broken_compositing_is_caught_for_every_seed(broken: Path, fault: Fault) -> None:
    *_, check, sentence = fault
    number = FAULTS.index(fault) + 1
    for seed in seeds_of(fault):
        error = AssertionError if check == "values" else EmulationError
        with pytest.raises(error, match=sentence):
            composite_broken(broken, number, seed, ["memory"] if check == "values" else [check])


@pytest.mark.parametrize("fault", KERNEL_FAULTS, ids=[fault[0] for fault in KERNEL_FAULTS])
def test_a_broken_kernel_is_caught_for_every_seed(broken: Path, fault: Fault) -> None:
    *_, check, sentence = fault
    number = FAULTS.index(fault) + 1
    for seed in seeds_of(fault):
        if check == "values":
            case = run_broken(broken, number, seed, ["memory"])
            with pytest.raises(AssertionError, match=sentence):
                check_both(case)
        else:
            with pytest.raises(EmulationError, match=sentence):
                run_broken(broken, number, seed, [check])
