import math

import pytest
import torch

from distill.losses import (
    LOSS_WEIGHTS,
    SILOG_LAMBDA,
    all_losses,
    angle_rad,
    depth_losses,
    gradient_matching,
    label_weight,
    normals_losses,
    semantic_losses,
    silog,
)

NAN = float("nan")


def unsure(*shape: int) -> torch.Tensor:
    return torch.full(shape, NAN)


def depth_answer(depth: torch.Tensor, b: float = 0.1) -> dict[str, torch.Tensor]:
    return {
        "depth": depth,
        "sky": torch.zeros_like(depth),
        "depth_uncertainty": torch.full_like(depth, b),
    }


def test_depth_terms_of_a_constant_factor_are_its_logarithm():
    target = torch.rand(2, 1, 16, 16) * 5 + 1
    losses = depth_losses(depth_answer(target * math.exp(0.3)), target, unsure(2, 1, 16, 16))
    assert losses["depth_l1"].item() == pytest.approx(0.3, rel=1e-4)
    assert losses["depth_silog"].item() == pytest.approx(0.3 * math.sqrt(1 - SILOG_LAMBDA), 1e-4)
    assert losses["depth_gradient"].item() == pytest.approx(0, abs=1e-5)
    assert losses["sky"].item() == pytest.approx(math.log(2))
    assert losses["depth_nll"].item() == pytest.approx(math.log(0.2) + 3, rel=1e-4)


def test_silog_of_two_values_by_hand():
    error = torch.tensor([0.1, -0.3]).view(1, 1, 1, 2)
    want = math.sqrt((0.01 + 0.09) / 2 - SILOG_LAMBDA * 0.1**2)
    assert silog(error, torch.ones_like(error, dtype=torch.bool)).item() == pytest.approx(want)


def test_gradient_matching_of_a_step_counts_it_once_per_scale():
    error = torch.zeros(1, 1, 16, 16)
    error[..., 8:] = 0.5  # one step of 0.5 between columns 7 and 8
    ones = torch.ones_like(error)
    got = gradient_matching(error, ones > 0, ones).item()
    pairs = [15, 7, 3, 1]  # neighbours per row at 16, 8, 4, 2 columns
    assert got == pytest.approx(sum(0.5 / n for n in pairs) / 4)
    known = ones > 0
    known[..., 7:9] = False  # the hole hides the step at the finest scale, and 8 is gone at all
    assert gradient_matching(error, known, ones).item() == pytest.approx(0)


def test_sky_is_told_by_infinity_and_kept_out_of_depth():
    target = torch.tensor([2.0, math.inf, NAN]).view(1, 1, 1, 3)
    answer = depth_answer(torch.tensor([2.0, 50.0, 60.0]).view(1, 1, 1, 3))
    answer["sky"] = torch.tensor([-2.0, 1.0, 40.0]).view(1, 1, 1, 3)
    losses = depth_losses(answer, target, unsure(1, 1, 1, 3))
    assert losses["depth_l1"].item() == 0
    want = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert losses["sky"].item() == pytest.approx(want)


def test_unsure_labels_count_less_and_unknown_uncertainty_in_full():
    spread = torch.tensor([0.0, 0.1, 0.9, NAN]).view(1, 1, 1, 4)
    assert label_weight("depth", spread).flatten().tolist() == pytest.approx([1, 0.5, 0.1, 1])
    target = torch.ones(1, 1, 1, 4)
    answer = depth_answer(target * math.e)
    got = depth_losses(answer, target, spread)["depth_l1"].item()
    assert got == pytest.approx((1 + 0.5 + 0.1 + 1) / 4)


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 179.0, 180.0])
def test_angles_are_right_from_zero_to_a_half_turn(degrees):
    turn = math.radians(degrees)
    a = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).requires_grad_()
    b = torch.tensor([math.sin(turn), 0.0, math.cos(turn)]).view(1, 3, 1, 1)
    angle = angle_rad(a, b)
    assert angle.item() == pytest.approx(turn, abs=1.1e-4)
    angle.sum().backward()
    assert torch.isfinite(a.grad).all()


def test_normals_loss_is_the_mean_angle_of_known_pixels():
    target = torch.full((1, 3, 1, 2), NAN)
    target[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    said = torch.zeros(1, 3, 1, 2)
    said[:, 2] = 1
    answer = {"normals": said, "normals_uncertainty": torch.full((1, 1, 1, 2), 45.0)}
    losses = normals_losses(answer, target, unsure(1, 1, 1, 2))
    assert losses["normals_angle"].item() == pytest.approx(math.pi / 2)
    assert losses["normals_nll"].item() == pytest.approx(math.log(45) + 2)


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_uncertainty_is_lowest_at_the_expected_error_and_leaves_the_answer_alone(task):
    errors = torch.tensor([0.1, 0.2, 0.9])
    scale = torch.linspace(0.05, 2, 391)
    if task == "depth":
        target = torch.ones(1, 1, 1, 3)
        depth = errors.exp().view(1, 1, 1, 3).requires_grad_()
        losses = [
            depth_losses(depth_answer(depth, float(b)), target, unsure(1, 1, 1, 3))["depth_nll"]
            for b in scale
        ]
        given = depth
        best = errors.mean()
    else:
        target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 3)
        given = torch.stack([errors.sin(), 0 * errors, errors.cos()]).view(1, 3, 1, 3)
        given.requires_grad_()
        losses = [
            normals_losses(
                {"normals": given, "normals_uncertainty": torch.rad2deg(s).expand(1, 1, 1, 3)},
                target,
                unsure(1, 1, 1, 3),
            )["normals_nll"]
            for s in scale
        ]
        best = errors.mean()
    values = torch.stack([value.detach() for value in losses])
    assert scale[values.argmin()].item() == pytest.approx(best.item(), abs=0.006)
    assert not losses[0].requires_grad


def test_semantic_terms_by_hand():
    target = torch.tensor([[[0, 1, -1]]])
    flat = {"semantic": torch.zeros(1, 4, 1, 3)}
    losses = semantic_losses(flat, target, unsure(1, 1, 1, 3))
    assert losses["semantic_ce"].item() == pytest.approx(math.log(4))
    # per class present: overlap 1/4, predicted 2/4, true 1 -> 1 - 2/4 / (3/2)
    assert losses["semantic_dice"].item() == pytest.approx(1 - 0.5 / 1.5)
    sure = torch.full((1, 4, 1, 3), -30.0)
    sure[0, 0, 0, 0] = sure[0, 1, 0, 1] = 30.0
    losses = semantic_losses({"semantic": sure}, target, unsure(1, 1, 1, 3))
    assert max(v.item() for v in losses.values()) == pytest.approx(0, abs=1e-6)


def answers_of(b: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    size = (8, 8)
    raw = {
        "depth": torch.rand(b, 1, *size) + 1,
        "sky": torch.randn(b, 1, *size),
        "depth_uncertainty": torch.rand(b, 1, *size) + 0.1,
        "normals": torch.nn.functional.normalize(torch.randn(b, 3, *size), dim=1),
        "normals_uncertainty": torch.rand(b, 1, *size) * 50 + 1,
        "semantic": torch.randn(b, 3, *size),
    }
    return {k: v.requires_grad_() for k, v in raw.items()}


def unknown_batch(b: int) -> dict[str, torch.Tensor]:
    return {
        "depth": torch.full((b, 1, 8, 8), NAN),
        "normals": torch.full((b, 3, 8, 8), NAN),
        "semantic": torch.full((b, 8, 8), -1),
        **{f"{t}_uncertainty": unsure(b, 1, 8, 8) for t in ("depth", "normals", "semantic")},
    }


def test_a_label_that_knows_nothing_gives_exactly_zero_and_zero_gradients():
    answer = answers_of(2)
    losses = all_losses(answer, unknown_batch(2))
    assert set(losses) == {"total", *LOSS_WEIGHTS}
    assert all(value.item() == 0 for value in losses.values())
    losses["total"].backward()
    for tensor in answer.values():
        assert tensor.grad is None or bool((tensor.grad == 0).all())


def test_a_sample_without_a_task_leaves_the_others_alone():
    known = {k: v[:1] for k, v in unknown_batch(1).items()}
    known["depth"] = torch.rand(1, 1, 8, 8) + 1
    alone = all_losses({k: v[:1] for k, v in answers_of(2).items()}, known)
    both = {k: torch.cat([known[k], unknown_batch(1)[k]]) for k in known}
    together = all_losses(answers_of(2), both)
    for name in alone:
        assert together[name].item() == pytest.approx(alone[name].item(), rel=1e-6)


def test_gradients_match_finite_differences():
    torch.manual_seed(0)
    target = (torch.rand(2, 1, 4, 4, dtype=torch.float64) + 1).requires_grad_(False)
    target[0, 0, 0, 0], target[1, 0, 2, 2] = NAN, math.inf
    spread = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    depth = (torch.rand(2, 1, 4, 4, dtype=torch.float64) + 1).requires_grad_()
    sky = torch.randn(2, 1, 4, 4, dtype=torch.float64).requires_grad_()
    b = (torch.rand(2, 1, 4, 4, dtype=torch.float64) + 0.2).requires_grad_()
    for name in ("depth_l1", "depth_silog", "depth_gradient", "sky"):
        assert torch.autograd.gradcheck(
            lambda d, s, name=name: depth_losses({"depth": d, "sky": s}, target, spread)[name],
            (depth, sky),
        )
    assert torch.autograd.gradcheck(
        lambda b: depth_losses(
            {"depth": depth.detach(), "sky": sky.detach(), "depth_uncertainty": b}, target, spread
        )["depth_nll"],
        (b,),
    )
    aim = torch.nn.functional.normalize(torch.randn(2, 3, 4, 4, dtype=torch.float64), dim=1)
    said = torch.nn.functional.normalize(torch.randn(2, 3, 4, 4, dtype=torch.float64), dim=1)
    assert torch.autograd.gradcheck(
        lambda n: normals_losses({"normals": n}, aim, spread)["normals_angle"],
        (said.requires_grad_(),),
    )
