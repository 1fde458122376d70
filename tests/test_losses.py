import math

import pytest
import torch

from distill.losses import (
    LOSS_WEIGHTS,
    all_losses,
    angle_rad,
    instance_losses,
    near_creases,
    normals_losses,
    semantic_losses,
    surface_loss,
)
from distill.losses_depth import (
    SILOG_LAMBDA,
    affine_invariant,
    bins_cross_entropy,
    depth_losses,
    gradient_matching,
    mixture_nll,
    near_steps,
    normals_of_depth,
    on_one_surface,
    robust,
    silog,
)
from distill.masked import beside, border_weight, label_weight, reliable

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
    known, sure = torch.ones_like(error, dtype=torch.bool), torch.ones_like(error)
    assert silog(error, known, sure).item() == pytest.approx(want)


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
    spread = torch.tensor([0.0, 0.1, 0.4, NAN]).view(1, 1, 1, 4)
    assert label_weight("depth", spread).flatten().tolist() == pytest.approx([1, 0.5, 0.2, 1])
    target = torch.ones(1, 1, 1, 4)
    answer = depth_answer(target * math.e)
    got = depth_losses(answer, target, spread)["depth_l1"].item()
    assert got == pytest.approx((1 + 0.5 + 0.2 + 1) / 4)


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
        "center": torch.rand(b, 1, *size),
        "offset": torch.randn(b, 2, *size),
    }
    return {k: v.requires_grad_() for k, v in raw.items()}


def unknown_batch(b: int) -> dict[str, torch.Tensor]:
    return {
        "depth": torch.full((b, 1, 8, 8), NAN),
        "normals": torch.full((b, 3, 8, 8), NAN),
        "semantic": torch.full((b, 8, 8), -1),
        "instances": torch.full((b, 3, 8, 8), NAN),
        "camera_known": torch.ones(b, dtype=torch.bool),
        "focal_px": torch.full((b,), 8.0),
        "centre_px": torch.full((b, 2), 3.5),
        **{f"{t}_uncertainty": unsure(b, 1, 8, 8) for t in ("depth", "normals", "semantic")},
    }


def test_a_label_that_knows_nothing_gives_exactly_zero_and_zero_gradients():
    answer = answers_of(2)
    losses = all_losses(answer, unknown_batch(2))
    assert set(losses) == {"total", *LOSS_WEIGHTS} - {"depth_bins", "depth_mixture"}
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
    for name in ("depth_l1", "depth_robust", "depth_silog", "depth_gradient", "sky"):
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


def test_the_robust_error_settles_on_one_of_two_surfaces_where_l1_does_not_mind():
    error = torch.tensor([0.0, 0.1, -0.3, 0.9]).view(1, 1, 1, 4).requires_grad_()
    want = torch.tensor([0, math.log(2), math.log(4), math.log(10)]).view(1, 1, 1, 4)
    assert torch.allclose(robust(error), want)
    robust(error).sum().backward()
    slope = torch.tensor([0, 5, -2.5, 1]).view(1, 1, 1, 4)  # 1 / (0.1 + |e|)
    assert torch.allclose(error.grad, slope)
    # depths at the nearer of two surfaces 1 apart, midway, at the farther: distance to both
    near, midway, far = (torch.tensor([d, d - 1]).view(1, 1, 1, 2) for d in (0.0, 0.5, 1.0))
    assert near.abs().sum() == midway.abs().sum() == far.abs().sum()
    assert robust(near).sum() == robust(far).sum() < 0.7 * robust(midway).sum()


def stepped(left: float, right: float) -> torch.Tensor:
    """One row of 12: six of ``left``, six of ``right``."""
    return torch.tensor([left] * 6 + [right] * 6).view(1, 1, 1, 12)


MIDDLE = [False] * 3 + [True] * 6 + [False] * 3  # within 2 px of the two in the middle


@pytest.mark.parametrize(
    "left, right, space, near",
    [
        (1.0, 1.2, 0, True),
        (1.2, 1.0, 0, True),
        (1.0, 1.1, 0, False),
        (1.0, math.inf, 0, True),
        (math.inf, 1.0, 0, True),
        (math.inf, math.inf, 0, False),
        (1.0, NAN, 0, False),
        (math.inf, NAN, 0, False),
        (1.0, 9.0, 1, False),
        (1.0, math.inf, 2, False),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_within_two_of_a_step_of_metric_depth_are_near_it(left, right, space, near, turned):
    target = stepped(left, right)
    target = target.transpose(2, 3) if turned else target
    found = near_steps(target, torch.tensor([space])).flatten().tolist()
    assert found == (MIDDLE if near else [False] * 12)
    if space == 0:
        assert near_steps(target).flatten().tolist() == found


@pytest.mark.parametrize("angle_deg, near", [(16, True), (-16, True), (14, False), (NAN, False)])
@pytest.mark.parametrize("turned", [False, True])
def test_pixels_within_two_of_a_crease_are_near_it(angle_deg, near, turned):
    turns = torch.deg2rad(stepped(10, 10 + angle_deg))
    target = torch.cat([turns.sin(), torch.zeros_like(turns), turns.cos()], dim=1)
    target = target.transpose(2, 3) if turned else target
    assert near_creases(target).flatten().tolist() == (MIDDLE if near else [False] * 12)


@pytest.mark.parametrize("size", [(9, 13), (1, 5), (5, 1), (2, 2), (1, 1)])
def test_beside_a_border_is_within_two_pixels_of_its_either_side(size):
    (h, w), some = size, torch.Generator().manual_seed(0)
    for _ in range(5):
        across = torch.rand(2, 1, h, w - 1, generator=some) > 0.96
        down = torch.rand(2, 1, h - 1, w, generator=some) > 0.96
        sides = torch.zeros(2, 1, h, w, dtype=torch.bool)
        for n, _, y, x in across.nonzero().tolist():
            sides[n, 0, y, x : x + 2] = True
        for n, _, y, x in down.nonzero().tolist():
            sides[n, 0, y : y + 2, x] = True
        want = torch.nn.functional.max_pool2d(sides.float(), 5, stride=1, padding=2) > 0
        assert torch.equal(beside(across, down), want)


def test_pixels_near_a_border_count_three_times_however_unsure_their_labels_are():
    near = torch.tensor([[True, True, False, False, False, True]]).view(1, 1, 1, 6)
    known = torch.tensor([[True, True, True, True, True, False]]).view(1, 1, 1, 6)
    weight = torch.tensor([0.1, 0.3, 0.8, 1.0, 0.3, 0.7]).view(1, 1, 1, 6)
    got = border_weight(weight, near, known).flatten()
    assert got[5].item() == pytest.approx(0.7)  # unknown: nothing to average over
    assert got[:5].mean().item() == pytest.approx(0.5)  # as before
    assert got[:2].mean().item() == pytest.approx(3 * got[2:5].mean().item())
    assert (got[1] / got[0]).item() == pytest.approx(3)  # who is surer counts more, as before
    assert (got[3] / got[2]).item() == pytest.approx(1.25)


def test_an_image_that_is_unsure_throughout_counts_little_whatever_borders_it_has():
    """A sure one without a border and an unsure one of which half is near: 6 of 24 pixels."""
    weight = torch.cat([torch.full((1, 1, 1, 12), w) for w in (1.0, 0.1)])
    near = torch.zeros(2, 1, 1, 12, dtype=torch.bool)
    near[1, ..., 3:9] = True
    got = border_weight(weight, near, weight > 0)
    assert got[0].flatten().tolist() == pytest.approx([1 / 1.5] * 12)
    assert got[1].mean().item() == pytest.approx(0.1 * (3 + 1) / 2 / 1.5)


@pytest.mark.parametrize("near", [True, False])
def test_where_all_or_nothing_is_near_a_border_weights_stay_as_they_are(near):
    weight = torch.tensor([0.1, 0.3, 0.8]).view(1, 1, 1, 3)
    everywhere = torch.full((1, 1, 1, 3), near)
    got = border_weight(weight, everywhere, torch.ones_like(everywhere))
    assert got.flatten().tolist() == pytest.approx([0.1, 0.3, 0.8])


def test_border_weights_of_many_half_precision_pixels_and_of_none_are_finite():
    near = torch.zeros(8, 1, 96, 128, dtype=torch.bool)
    near[..., :32] = True
    weight = torch.ones(8, 1, 96, 128, dtype=torch.float16)
    got = border_weight(weight, near, torch.ones_like(near))
    assert got.mean().item() == pytest.approx(1, rel=1e-5)
    assert (got[near].mean() / got[~near].mean()).item() == pytest.approx(3, rel=1e-5)
    nothing = weight[:0]
    assert border_weight(nothing, near[:0], near[:0]).numel() == 0
    assert torch.equal(border_weight(weight, near, torch.zeros_like(near)), weight.float())


def test_borders_of_a_batch_share_one_average():
    target = torch.cat([stepped(1.0, 2.0), stepped(3.0, 3.0)])
    ones = torch.ones_like(target)
    weight = border_weight(ones, near_steps(target), ones > 0)
    assert weight[0, 0, 0, 5].item() == pytest.approx(3 / 1.5)
    assert weight[0, 0, 0, 0].item() == weight[1, 0, 0, 5].item() == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("doubt", [0.0, 0.2])
def test_errors_near_a_border_count_three_times(doubt):
    """A log error of 0.2 and one of 30 degrees, on three pixels at a step or far from it."""
    target = stepped(1.0, 2.0)
    up = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 12)
    turn = math.radians(30)
    tilted = torch.tensor([math.sin(turn), 0.0, math.cos(turn)]).view(1, 3, 1, 1)
    spread = torch.where(near_steps(target), doubt, 0.0)
    own = 0.1 / (0.1 + doubt)  # the weight of the labels near the step
    mean_weight = (own + 1) / 2
    for wrong, share, alone_share in ((slice(5, 8), 1.5, own), (slice(0, 3), 0.5, 1.0)):
        weight = share * mean_weight
        depth, normals = target.clone(), up.clone()
        depth[..., wrong] *= math.exp(0.2)
        normals[..., wrong] = tilted
        batch = {
            "depth": target,
            "depth_uncertainty": spread,
            "normals": up,
            "normals_uncertainty": 200 * spread,
        }
        losses = all_losses(depth_answer(depth) | {"normals": normals}, batch)
        assert losses["depth_l1"].item() == pytest.approx(0.2 * weight * 3 / 12, rel=1e-4)
        assert losses["depth_robust"].item() == pytest.approx(math.log(3) * weight / 4, rel=1e-4)
        centre = depth.log().repeat(1, 2, 1, 1)  # two Laplacians at one place, of scale 1/2
        mixture = torch.cat([centre, centre * 0 + 0.5, centre * 0 - math.log(2)], dim=1)
        other = depth_answer(depth) | {"depth_mixture": mixture}
        nll = depth_losses(other, target, spread, None, near_steps(target))["depth_mixture"].item()
        assert nll == pytest.approx(0.2 / 0.5 * weight * 3 / 12, rel=1e-4)
        square = 0.04 * share / 4
        want = math.sqrt(mean_weight * (square - SILOG_LAMBDA * (0.2 * share / 4) ** 2))
        assert losses["depth_silog"].item() == pytest.approx(want, rel=1e-4)
        assert losses["normals_angle"].item() == pytest.approx(turn * weight / 4, rel=2e-3)
        alone = all_losses({"normals": normals}, {k: v for k, v in batch.items() if "norm" in k})
        assert alone["normals_angle"].item() == pytest.approx(turn * alone_share / 4, rel=2e-3)


def test_errors_near_a_crease_count_three_times_in_normals_alone():
    depth = torch.full((1, 1, 1, 12), 2.0)
    turns = torch.deg2rad(stepped(0, 90))
    creased = torch.cat([turns.sin(), torch.zeros_like(turns), turns.cos()], dim=1)
    sure = torch.zeros_like(depth)
    batch = {
        "depth": depth,
        "depth_uncertainty": sure,
        "normals": creased,
        "normals_uncertainty": sure,
    }
    for wrong, weight in ((slice(5, 8), 1.5), (slice(0, 3), 0.5)):
        tilt = torch.zeros_like(depth)
        tilt[..., wrong] = math.radians(30)
        said = torch.cat(
            [creased[:, :1] * tilt.cos(), tilt.sin(), creased[:, 2:] * tilt.cos()], dim=1
        )
        for tasks in ({"depth", "normals"}, {"normals"}):
            losses = all_losses(
                (depth_answer(depth * tilt.exp()) if "depth" in tasks else {}) | {"normals": said},
                {k: v for k, v in batch.items() if k.split("_")[0] in tasks},
            )
            want = math.radians(30) * weight / 4
            assert losses["normals_angle"].item() == pytest.approx(want, rel=2e-3)
            if "depth" in tasks:
                assert losses["depth_l1"].item() == pytest.approx(math.radians(30) / 4, rel=1e-4)


def test_uncertainties_learn_the_labels_own_doubt_on_top_of_the_error():
    """3, 4, 5; and the error alone where the label does not know its own."""
    depth, target = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), math.exp(0.3))
    doubt = torch.tensor([0.4, NAN]).view(1, 1, 1, 2)
    nll = depth_losses(depth_answer(depth, 0.2), target, doubt)["depth_nll"].item()
    assert nll == pytest.approx(math.log(0.4) + (0.5 + 0.3) / 2 / 0.2, rel=1e-4)
    turn = math.radians(30)
    up = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    aim = torch.tensor([math.sin(turn), 0.0, math.cos(turn)]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    answer = {"normals": up, "normals_uncertainty": torch.full_like(depth, 20.0)}
    nll = normals_losses(answer, aim, 100 * doubt)["normals_nll"].item()
    assert nll == pytest.approx(math.log(20) + (50 + 30) / 2 / 20, rel=1e-3)


def test_bins_cross_entropy_by_hand():
    from student.depth_heads import BINS, bin_centres

    step = float(bin_centres()[1] - bin_centres()[0])
    log_depth = float(bin_centres()[4]) + 0.25 * step  # a quarter of the way from bin 4 to bin 5
    target = torch.full((1, 1, 1, 2), math.exp(log_depth))
    target[..., 1] = 1e9  # beyond the last bin: all of it is the last bin's
    flat = bins_cross_entropy(torch.zeros(1, BINS, 1, 2), target, torch.isfinite(target))
    assert flat.flatten().tolist() == pytest.approx([math.log(BINS)] * 2, rel=1e-5)
    logits = torch.zeros(1, BINS, 1, 2)
    logits[0, 4], logits[0, 5], logits[0, -1] = 3.0, 2.0, 1.0
    total = math.log(math.exp(3) + math.exp(2) + math.exp(1) + BINS - 3)
    got = bins_cross_entropy(logits, target, torch.isfinite(target)).flatten().tolist()
    want = [total - 0.75 * 3 - 0.25 * 2, total - 1]
    assert got == pytest.approx(want, rel=1e-4)


def test_mixture_likelihood_by_hand():
    mixture = torch.tensor([0.0, 1.0, 0.5, 0.25, math.log(0.3), math.log(0.7)]).view(1, 6, 1, 1)
    target = torch.full((1, 1, 1, 1), math.exp(0.2))
    density = 0.3 / (2 * 0.5) * math.exp(-0.2 / 0.5) + 0.7 / (2 * 0.25) * math.exp(-0.8 / 0.25)
    got = mixture_nll(mixture, target, target > 0).item()
    assert got == pytest.approx(-math.log(density), rel=1e-5)


@pytest.mark.parametrize("name", ["depth_bins", "depth_mixture"])
def test_a_distribution_takes_the_place_of_l1_and_its_gradient_is_exact(name):
    torch.manual_seed(0)
    target = torch.rand(1, 1, 3, 3, dtype=torch.float64) * 3 + 1
    target[0, 0, 0, 0] = NAN
    if name == "depth_bins":
        raw = torch.randn(1, 32, 3, 3, dtype=torch.float64)
    else:
        raw = torch.rand(1, 6, 3, 3, dtype=torch.float64) + 0.1
    answer = depth_answer(torch.ones_like(target)) | {name: raw}
    losses = depth_losses(answer, target, unsure(1, 1, 3, 3))
    assert name in losses and "depth_l1" not in losses and "depth_nll" not in losses

    def loss(x):
        return depth_losses(answer | {name: x}, target, unsure(1, 1, 3, 3))[name]

    assert torch.autograd.gradcheck(loss, (raw.requires_grad_(),))


@pytest.mark.parametrize(
    "code, change",
    [
        (1, lambda d: 3 * d + 2),
        (2, lambda d: 1 / (3 / d + 2)),
        (3, lambda d: (3 * d.log() + 2).exp()),
        (4, lambda d: (3 * d.sqrt() + 2) ** 2),
    ],
)
def test_affine_labels_teach_shape_alone_in_their_own_space(code, change):
    target = (torch.rand(2, 1, 6, 6, dtype=torch.float64) + 0.5) * 2
    target[0, 0, 0, :3] = NAN
    space = torch.full((2,), code)
    answer = depth_answer(change(target.nan_to_num(nan=9.0)))
    losses = depth_losses(answer, target, unsure(2, 1, 6, 6), space)
    assert losses["depth_affine"].item() == pytest.approx(0, abs=1e-9)
    for name in ("depth_l1", "depth_robust", "depth_silog", "depth_gradient", "depth_nll"):
        assert losses[name].item() == 0
    other = depth_losses(answer, target, unsure(2, 1, 6, 6), torch.full((2,), code % 4 + 1))
    assert other["depth_affine"].item() > 1e-3


def test_affine_invariant_loss_by_hand_and_its_gradient():
    depth = torch.tensor([1.0, 2.0, 3.0, 10.0, 7.0], dtype=torch.float64).view(1, 1, 1, 5)
    target = torch.tensor([1.0, 2.0, 5.0, 6.0, NAN], dtype=torch.float64).view(1, 1, 1, 5)
    known = ~torch.isnan(target)
    one = torch.ones_like(depth)
    # medians 2 (the lower of the middle two) both; mean distances (1 + 0 + 1 + 8) / 4 and 2
    want = (abs(-1 / 2.5 + 1 / 2) + 0 + abs(1 / 2.5 - 3 / 2) + abs(8 / 2.5 - 4 / 2)) / 4
    space = torch.tensor([1])
    got = affine_invariant(depth, target, known, one, space)
    assert got.item() == pytest.approx(want)
    flat = torch.full_like(target, 4.0)
    assert affine_invariant(depth, flat, known, one, space).item() == 0

    def loss(d):
        return affine_invariant(d, target, known, one, space)

    assert torch.autograd.gradcheck(loss, (depth.requires_grad_(),))


def test_worthless_labels_teach_nothing_but_the_uncertainty():
    spread = torch.tensor([0.1, 0.9]).view(1, 1, 1, 2)
    assert reliable("depth", spread).flatten().tolist() == [True, False]
    target = torch.ones(1, 1, 1, 2)
    said = torch.tensor([1.0, math.e**2]).view(1, 1, 1, 2)
    losses = depth_losses(depth_answer(said), target, spread)
    assert losses["depth_l1"].item() == 0 and losses["depth_gradient"].item() == 0
    # both pixels count for the uncertainty: log 2b + sqrt(e^2 + u^2) / b, b = 0.1, errors 0 and 2,
    # the label's own at most 0.7
    want = math.log(0.2) + (0.1 + math.sqrt(4.49)) / 2 / 0.1
    assert losses["depth_nll"].item() == pytest.approx(want, rel=1e-4)


def plane(normal: tuple[float, float, float], offset_m: float) -> torch.Tensor:
    """z-depth [1,1,12,16] of a plane n . X = -offset; camera f = 14, centre (6, 5)."""
    u, v = torch.arange(16).double(), torch.arange(12).double()
    x, y = (u[None] - 6) / 14, -(v[:, None] - 5) / 14
    return (-offset_m / (normal[0] * x + normal[1] * y - normal[2]))[None, None]


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.6, 0.0, 0.8), (0.1, 0.7, 0.7071)])
def test_normals_of_a_plane_are_the_planes_whatever_its_scale(normal):
    length = math.hypot(*normal)
    unit = tuple(c / length for c in normal)
    got = normals_of_depth(
        3 * plane(unit, 2.0), torch.tensor([14.0]).double(), torch.tensor([[6.0, 5.0]]).double()
    )
    inner = got[0, :, 1:-1, 1:-1]
    assert (inner - torch.tensor(unit).double().view(3, 1, 1)).abs().max() < 1e-7
    assert torch.isnan(got[0, :, 0]).all() and torch.isnan(got[0, :, :, -1]).all()


def test_surface_loss_is_the_angle_inside_one_surface_of_a_known_camera():
    target = plane((0.0, 0.0, 1.0), 2.0).float()
    target[..., 8:] *= 2  # an edge between columns 7 and 8
    target[0, 0, 5, 3] = NAN
    flat = on_one_surface(target)[0, 0]
    assert flat[1:-1, 1:7].sum() == 10 * 6 - 5 and not flat[:, 7:9].any() and not flat[0].any()
    turned = plane((0.6, 0.0, 0.8), 2.0).float()
    batch = {
        "depth": target,
        "normals": torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 12, 16),
        "normals_uncertainty": unsure(1, 1, 12, 16),
        "focal_px": torch.tensor([14.0]),
        "centre_px": torch.tensor([[6.0, 5.0]]),
        "camera_known": torch.tensor([True]),
    }
    got = surface_loss({"depth": turned}, batch)["depth_surface"].item()
    assert got == pytest.approx(math.acos(0.8), abs=1e-4)
    worthless = {"normals_uncertainty": torch.full((1, 1, 12, 16), 80.0)}
    for change in ({"camera_known": torch.tensor([False])}, worthless):
        assert surface_loss({"depth": turned}, batch | change)["depth_surface"].item() == 0


def test_surface_gradient_is_exact():
    torch.manual_seed(1)
    target = plane((0.0, 0.0, 1.0), 2.0)[..., :5, :5]
    batch = {
        "depth": target,
        "normals": torch.tensor([0.0, 0.0, 1.0]).double().view(1, 3, 1, 1).expand(1, 3, 5, 5),
        "normals_uncertainty": unsure(1, 1, 5, 5),
        "focal_px": torch.tensor([14.0]).double(),
        "centre_px": torch.tensor([[2.0, 2.0]]).double(),
        "camera_known": torch.tensor([True]),
    }
    depth = (target + 0.3 * torch.rand_like(target)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda d: surface_loss({"depth": d}, batch)["depth_surface"], (depth,)
    )


def test_instance_terms_by_hand():
    target = torch.zeros(1, 3, 1, 4)
    target[0, 0, 0] = torch.tensor([1.0, 0.5, 0.0, NAN])
    target[0, 1, 0] = torch.tensor([0.0, -1.0, 0.0, NAN])
    target[0, 2, 0] = torch.tensor([0.0, 0.0, 0.0, NAN])
    score = torch.tensor([0.8, 0.4, 0.3, 0.9]).view(1, 1, 1, 4)
    offset = torch.zeros(1, 2, 1, 4)
    offset[0, 0, 0, 1], offset[0, 0, 0, 2] = 1.0, 4.0
    losses = instance_losses({"center": score, "offset": offset}, target)
    focal = -(0.2**2) * math.log(0.8) - 0.5**4 * 0.4**2 * math.log(0.6) - 0.3**2 * math.log(0.7)
    assert losses["instances_center"].item() == pytest.approx(focal / 10, rel=1e-4)
    # |1 - -1| / 2 of the thing's pixel in full, 4 / 2 of the background's by a tenth; 3 known
    want = (1 + 0.1 * 2) / math.sqrt(17) / 3
    assert losses["instances_offset"].item() == pytest.approx(want, rel=1e-4)
    score = score.double().requires_grad_()
    offset = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, o: sum(instance_losses({"center": s, "offset": o}, target).values()),
        (score, offset),
    )


def test_semantic_terms_weighted_and_masked_by_hand():
    """Four pixels of two classes: half sure, sure, worthless, without a class."""
    logits = torch.tensor([[0.0, math.log(3), -5.0, 9.0], [0.0] * 4]).view(1, 2, 1, 4)
    target = torch.tensor([[[0, 0, 0, -1]]])
    spread = torch.tensor([0.5, NAN, 0.95, 0.0]).view(1, 1, 1, 4)
    losses = semantic_losses({"semantic": logits}, target, spread)
    # p = 1/2 and 3/4; weights 0.5 / (0.5 + 0.5) and 1
    want = (0.5 * math.log(2) + math.log(4 / 3)) / 2
    assert losses["semantic_ce"].item() == pytest.approx(want, rel=1e-5)
    # only class 0 is there: overlap 1/2 + 3/4, said 5/4, true 2
    assert losses["semantic_dice"].item() == pytest.approx(1 - 2 * 1.25 / 3.25, rel=1e-5)


def test_semantic_gradients_match_finite_differences_and_end_at_the_mask():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    target = torch.tensor([[[0, 1, -1], [2, 2, 0]], [[-1, 1, 1], [0, 1, 1]]])
    spread = torch.rand(2, 1, 2, 3) * 0.8
    spread[0, 0, 1, 2] = 0.95
    for name in ("semantic_ce", "semantic_dice"):  # float32 inside: wide steps, loose bounds

        def loss(x, name=name):
            return semantic_losses({"semantic": x}, target, spread)[name].double()

        assert torch.autograd.gradcheck(loss, (logits,), eps=1e-2, atol=1e-4, rtol=1e-3)
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        silent = (target < 0) | (spread[:, 0] > 0.9)
        assert (gradient.movedim(1, -1)[silent] == 0).all()
        assert (gradient.movedim(1, -1)[~silent] != 0).all()


def test_normals_terms_weighted_by_hand_and_the_gradient_of_their_uncertainty():
    """Angles 90, 60, 30 and unknown; the label sure to 20 degrees, 0, worthless, 0."""
    degrees = torch.tensor([90.0, 60.0, 30.0, 0.0], dtype=torch.float64)
    turn = torch.deg2rad(degrees)
    said = torch.stack([turn.sin(), 0 * turn, turn.cos()]).view(1, 3, 1, 4)
    target = torch.tensor([0.0, 0.0, 1.0]).double().view(1, 3, 1, 1).repeat(1, 1, 1, 4)
    target[..., 3] = NAN
    spread = torch.tensor([20.0, 0.0, 61.0, 0.0]).view(1, 1, 1, 4)
    mu = torch.tensor([90.0, 20.0, 60.0, 5.0]).double().view(1, 1, 1, 4).requires_grad_()
    losses = normals_losses({"normals": said, "normals_uncertainty": mu}, target, spread)
    want = (0.5 * math.pi / 2 + math.pi / 3) / 2
    assert losses["normals_angle"].item() == pytest.approx(want, rel=1e-6)
    first, third = math.hypot(90, 20), math.hypot(30, 60)  # the label's own at most 60 degrees
    want = (math.log(90) + first / 90 + math.log(20) + 3 + math.log(60) + third / 60) / 3
    assert losses["normals_nll"].item() == pytest.approx(want, rel=1e-6)
    losses["normals_nll"].backward()
    slope = [(1 / m - e / m**2) / 3 for m, e in ((90, first), (20, 60), (60, third))] + [0]
    assert mu.grad.flatten().tolist() == pytest.approx(slope, abs=1e-7)
    assert torch.autograd.gradcheck(
        lambda m: normals_losses({"normals": said, "normals_uncertainty": m}, target, spread)[
            "normals_nll"
        ],
        (mu,),
    )


def test_depth_terms_weighted_by_hand():
    """Log errors 0.2 and -0.6 (weights 1 and 1/2), 5 worthless, one hole; a second image empty."""
    target = torch.ones(2, 1, 2, 2)
    target[0, 0, 1, 1], target[1] = NAN, NAN
    error = torch.tensor([[0.2, -0.6], [5.0, 3.0]])
    spread = torch.tensor([[0.0, 0.1], [0.71, 0.0]]).expand(2, 1, 2, 2)
    losses = depth_losses(depth_answer(error.exp().expand(2, 1, 2, 2)), target, spread)
    assert losses["depth_l1"].item() == pytest.approx((0.2 + 0.5 * 0.6) / 2, rel=1e-5)
    mean = (0.2 - 0.5 * 0.6) / 1.5
    want = math.sqrt(0.75 * ((0.04 + 0.5 * 0.36) / 1.5 - SILOG_LAMBDA * mean**2))
    assert losses["depth_silog"].item() == pytest.approx(want, rel=1e-5)
    # the one pair of neighbours that teaches: |0.2 + 0.6| by the smaller weight
    assert losses["depth_gradient"].item() == pytest.approx(0.8 * 0.5, rel=1e-5)
    for name, maps, each in (
        ("depth_bins", torch.zeros(2, 32, 2, 2), math.log(32)),
        ("depth_mixture", torch.tensor([0.0, 0, 0.25, 0.25, *[math.log(0.5)] * 2]), -math.log(2)),
    ):  # equal bins; one Laplacian of scale 1/4 at the true log depth: -log 1 / (2 b)
        maps = maps.view(1, -1, 1, 1).expand(2, -1, 2, 2) if maps.ndim == 1 else maps
        answer = depth_answer(target.nan_to_num(nan=1.0)) | {name: maps}
        got = depth_losses(answer, target, spread)[name].item()
        assert got == pytest.approx((each + 0.5 * each) / 2, rel=1e-5)


def test_an_error_of_scale_alone_is_discounted_alike_under_any_weights():
    """Log error 0.5 everywhere, weights of mean 0.5: 0.5 sqrt((1 - lambda) / 2), however spread."""
    error = torch.full((1, 1, 2, 2), 0.5)
    known = torch.ones_like(error, dtype=torch.bool)
    for weights in ([0.5] * 4, [1.0, 0.9, 0.1, 0.0]):
        weight = torch.tensor(weights).view_as(error)
        want = 0.5 * math.sqrt((1 - SILOG_LAMBDA) * 0.5)
        assert silog(error, known, weight).item() == pytest.approx(want, rel=1e-5)


def test_the_surface_of_a_depth_known_only_up_to_an_affine_map_is_not_judged():
    """Its ratios, by which one surface is told from two, mean nothing."""
    normals = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1).repeat(2, 1, 4, 4)
    batch = {
        "depth": torch.full((2, 1, 4, 4), 2.0),
        "depth_space": torch.tensor([0, 1]),
        "camera_known": torch.tensor([True, True]),
        "normals": normals,
        "normals_uncertainty": torch.zeros(2, 1, 4, 4),
        "focal_px": torch.full((2,), 4.0),
        "centre_px": torch.full((2, 2), 1.5),
    }
    depth = torch.full((2, 1, 4, 4), 2.0).requires_grad_()
    surface_loss({"depth": depth}, batch)["depth_surface"].backward()
    assert depth.grad[0].abs().sum() > 0 and depth.grad[1].abs().sum() == 0


def test_gradient_matching_by_hand_counts_the_less_sure_of_two_neighbours():
    error = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).view(1, 1, 2, 2)
    weight = torch.tensor([[1.0, 0.5], [1.0, 0.25]]).view(1, 1, 2, 2)
    known = torch.ones_like(error, dtype=torch.bool)
    right, down = (1 * 0.5 + 3 * 0.25) / 2, (0 + 2 * 0.25) / 2
    assert gradient_matching(error, known, weight).item() == pytest.approx(right + down)
    known[..., 1, 1] = False
    assert gradient_matching(error, known, weight).item() == pytest.approx(0.5 + 0)


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_affine_gradients_are_exact_in_every_space(code):
    torch.manual_seed(code)
    depth = (torch.rand(2, 1, 3, 3, dtype=torch.float64) + 0.5).requires_grad_()
    target = torch.rand(2, 1, 3, 3, dtype=torch.float64) * 3 + 0.5
    target[0, 0, 1, 1], target[1, 0, 0] = NAN, math.inf
    spread = torch.rand(2, 1, 3, 3, dtype=torch.float64) * 0.6
    spread[1, 0, 2, 2] = 0.8

    def loss(d):
        return depth_losses(depth_answer(d), target, spread, torch.full((2,), code))["depth_affine"]

    assert torch.autograd.gradcheck(loss, (depth,))
    (gradient,) = torch.autograd.grad(loss(depth), depth)
    silent = ~torch.isfinite(target) | (spread > 0.7)
    assert (gradient[silent] == 0).all() and (gradient[~silent] != 0).any()


def test_affine_labels_weigh_by_their_uncertainty_by_hand():
    depth = torch.tensor([1.0, 2.0, 3.0, 10.0]).view(1, 1, 1, 4)
    target = torch.tensor([1.0, 2.0, 5.0, 6.0]).view(1, 1, 1, 4)
    spread = torch.tensor([0.1, NAN, 0.4, 0.0]).view(1, 1, 1, 4)
    # as in the test above, with weights 1/2, 1, 1/5, 1
    want = (0.5 * abs(-1 / 2.5 + 1 / 2) + 0.2 * abs(1 / 2.5 - 3 / 2) + abs(8 / 2.5 - 4 / 2)) / 4
    got = depth_losses(depth_answer(depth), target, spread, torch.tensor([1]))["depth_affine"]
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_surface_loss_weighs_by_the_normals_uncertainty():
    target = plane((0.0, 0.0, 1.0), 2.0).float()
    batch = {
        "depth": target,
        "normals": torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 12, 16),
        "normals_uncertainty": torch.full((1, 1, 12, 16), 20.0),  # counts half
        "focal_px": torch.tensor([14.0]),
        "centre_px": torch.tensor([[6.0, 5.0]]),
        "camera_known": torch.tensor([True]),
    }
    answer = {"depth": plane((0.6, 0.0, 0.8), 2.0).float()}
    got = surface_loss(answer, batch)["depth_surface"].item()
    assert got == pytest.approx(0.5 * math.acos(0.8), abs=1e-4)


def test_worthless_pixels_have_no_gradient_but_that_of_the_uncertainty():
    torch.manual_seed(0)
    depth = (torch.rand(1, 1, 4, 4, dtype=torch.float64) + 1).requires_grad_()
    b = torch.full_like(depth, 0.3).detach().requires_grad_()
    target, spread = torch.rand(1, 1, 4, 4) + 1, torch.full((1, 1, 4, 4), 0.2)
    spread[0, 0, 1:3, 2] = 0.75
    answer = {"depth": depth, "sky": torch.zeros_like(depth), "depth_uncertainty": b}
    sum(depth_losses(answer, target, spread).values()).backward()
    worthless = spread > 0.7
    assert (depth.grad[worthless] == 0).all() and (depth.grad[~worthless] != 0).all()
    assert (b.grad != 0).all()


def test_the_total_is_the_weighted_sum_and_its_gradient_is_exact():
    torch.manual_seed(2)
    answer = {k: v.detach().double() for k, v in answers_of(2).items() if k != "semantic"}
    batch = {k: v.double() if v.is_floating_point() else v for k, v in unknown_batch(2).items()}
    batch["depth"] = (torch.rand(2, 1, 8, 8) * 0.02 + 1).double()  # one surface
    batch["normals"] = torch.nn.functional.normalize(torch.randn(2, 3, 8, 8).double(), dim=1)
    batch["instances"] = torch.rand(2, 3, 8, 8).double()
    batch["instances"][:, 0, 3, 4] = 1
    batch["depth"][0, 0, 0, 0] = batch["normals"][0, :, 5, 5] = NAN
    batch["depth_space"] = torch.tensor([0, 3])
    losses = all_losses(answer, batch)
    absent = {"depth_bins", "depth_mixture", "semantic_ce", "semantic_dice"}
    assert set(losses) == {"total", *LOSS_WEIGHTS} - absent
    assert all(value.item() != 0 for value in losses.values())
    want = sum(LOSS_WEIGHTS[name] * v.item() for name, v in losses.items() if name != "total")
    assert losses["total"].item() == pytest.approx(want, rel=1e-9)
    # without the uncertainties, which see the errors detached (tested for each of the two)
    names = ("depth", "sky", "normals", "center", "offset")

    def total(*values):
        return all_losses(dict(zip(names, values, strict=True)), batch)["total"]

    leaves = tuple(answer[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)
