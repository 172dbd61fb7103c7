"""The plan of the stages, and the controller of eta."""

import math

import pytest

from lte.methods.lte.controller import SparsityController
from lte.surgery.stages import StagePlan
from lte.training.learning_rate import stage_factors


def test_split_gives_every_step_to_a_stage():
    assert StagePlan.split(100, 0.25, 0.25) == StagePlan(25, 50, 25)
    assert StagePlan.split(10, 0.0, 0.25) == StagePlan(0, 8, 2)
    assert StagePlan.split(10, 0.25, 0.0) == StagePlan(2, 8, 0)
    assert StagePlan.split(3, 0.25, 0.25).total == 3


def test_a_dense_run_has_one_stage():
    assert StagePlan.split(7, 1.0, 0.0) == StagePlan(7, 0, 0)


@pytest.mark.parametrize(
    ("total", "dense", "hard"), [(10, 0.5, 0.5), (10, 0.9, 0.2), (10, -0.5, 0.2), (10, 0.2, -0.5), (1, 0.0, 1.0)]
)
def test_split_refuses_to_leave_the_soft_stage_none(total, dense, hard):
    with pytest.raises(ValueError, match="leave the soft stage no step"):
        StagePlan.split(total, dense, hard)


def test_at():
    plan = StagePlan(2, 4, 2)
    found = [plan.at(step) for step in range(9)]
    assert [stage for stage, _ in found] == ["dense"] * 2 + ["soft"] * 4 + ["hard"] * 3
    assert [progress for _, progress in found] == [0, 0.5, 0, 0.25, 0.5, 0.75, 0, 0.5, 1.0]
    assert StagePlan(0, 1, 0).at(0) == ("soft", 0.0)
    assert StagePlan(0, 1, 0).at(1)[0] == "hard"  # after the last step


@pytest.mark.parametrize("plan", [StagePlan(10, 20, 10), StagePlan(0, 20, 20), StagePlan(10, 30, 0)])
def test_the_learning_rate_warms_up_and_decays_once_a_stage(plan):
    factor = stage_factors(plan, "linear", lambda steps: round(steps * 0.2), {})
    values = [factor(step) for step in range(plan.total + 1)]
    start = 0
    for steps in filter(None, (plan.dense, plan.soft, plan.hard)):
        stage = values[start : start + steps]
        assert stage[0] == 0
        assert max(stage) == stage[round(steps * 0.2)] == 1
        assert stage[-1] == pytest.approx(1 / (steps - round(steps * 0.2)))
        start += steps
    assert values[plan.total] == 0


def test_the_dense_stage_can_have_a_peak_of_its_own():
    factor = stage_factors(StagePlan(10, 20, 10), "constant", lambda steps: 0, {}, 0.5)
    assert [factor(step) for step in (0, 9, 10, 29, 30, 39)] == [0.5, 0.5, 1, 1, 1, 1]


def test_soft_and_hard_stage_can_share_a_schedule():
    factor = stage_factors(StagePlan(10, 20, 10), "linear", lambda steps: 5, {}, restart_hard=False)
    assert [factor(step) for step in (5, 10, 15, 30, 40)] == pytest.approx([1, 0, 1, 0.4, 0])


def test_schedules_by_name():
    assert stage_factors(StagePlan(0, 4, 4), "constant", lambda steps: 0, {})(6) == 1
    assert stage_factors(StagePlan(0, 4, 4), "cosine", lambda steps: 0, {})(6) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="cannot restart with each stage"):
        stage_factors(StagePlan(0, 4, 4), "reduce_lr_on_plateau", lambda steps: 0, {})


def test_the_target_ramps_fast_and_then_ever_slower():
    controller = SparsityController(0.8, ramp=0.5)
    assert [controller.wanted(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.7, 0.8, 0.8])


def test_eta_grows_with_too_little_sparsity_and_shrinks_with_too_much():
    assert SparsityController(0.5).step(0.5, 1.0) == pytest.approx(0.3)
    assert SparsityController(0.5).step(0.2, 1.0) > 0.3 > SparsityController(0.5).step(0.8, 1.0) > 0


@pytest.mark.parametrize("strength", [0.5, 5.0, 50.0])
def test_a_simulated_model_is_brought_to_the_target(strength):
    """Sparsity lags behind what eta pulls it to, at models that need eta two orders of magnitude apart."""
    controller, sparsity = SparsityController(0.7), 0.0
    for step in range(600):
        eta = controller.step(sparsity, step / 600)
        pulled_to = 1 - math.exp(-strength * eta)
        sparsity += 0.1 * (pulled_to - sparsity)
    assert sparsity == pytest.approx(0.7, abs=0.02)


def test_anti_windup():
    stuck = SparsityController(0.9)
    for _ in range(10_000):
        stuck.step(0.0, 1.0)
    assert stuck.integral == 7.0
    for _ in range(200):  # back within a bounded number of steps
        eta = stuck.step(1.0, 1.0)
    assert eta < 0.3


def test_the_target_is_meant_for_text_that_is_not_trained_on():
    """Measured 0.6 where 0.7 is wanted elsewhere, and elsewhere is 0.1 sparser: nothing to mend."""
    controller = SparsityController(0.7, gap=0.1)
    assert controller.step(0.6, 1.0).item() == pytest.approx(controller.eta_start)
    assert controller.step(0.7, 1.0) < controller.eta_start


def test_integral_and_gap_are_all_its_memory():
    one, other = SparsityController(0.5, gap=0.1), SparsityController(0.5)
    for measured in (0.0, 0.1, 0.7):
        one.step(measured, 0.9)
    other.integral, other.gap = one.integral, one.gap
    assert one.step(0.4, 1.0) == other.step(0.4, 1.0)
    assert one.integral != 0
