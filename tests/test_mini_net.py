"""The mini generator's network and pipeline: sizes, conditioning, pointing, saving."""

import json

import numpy as np
import pytest
import torch
from mini_rooms import TINY

from teacher.errors import UsageError
from teacher.generators import mini_generator
from teacher.generators.mini_generator import MiniGenerator, draw, key_seed, noise_for, text_batch
from teacher.generators.mini_net import Features, MiniNet

CARD = {"network": TINY, "size": [24, 32], "focal_px": 25.0, "classes": {}, "things": []}


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = MiniNet(**TINY).eval()
    for p in net.parameters():  # zero-initialised parts would hide a missing condition
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


def run(net, noisy, s, texts, features):
    text = text_batch(texts, max_tokens=net.max_tokens, device=torch.device("cpu"))
    return net(noisy, s, net.text(text), features)


@pytest.mark.parametrize("size", [(24, 32), (8, 8), (40, 16)])
def test_any_multiple_of_eight_goes_through(net, size):
    image, noisy = torch.rand(2, 3, *size), torch.randn(2, 3, *size)
    out = run(net, noisy, torch.ones(2), ["depth map", "normals"], net.encode_image(image))
    assert out.shape == (2, 3, *size) and out.dtype == torch.float32


@pytest.mark.parametrize("what", ["noise", "time", "prompt", "image", "colour"])
def test_every_condition_reaches_the_picture(net, what):
    image, noisy = torch.rand(1, 3, 16, 24), torch.randn(1, 3, 16, 24)
    args = {"noisy": noisy, "s": torch.tensor([0.7]), "texts": ["a ball in #ff0000"]}
    features = net.encode_image(image)
    before = run(net, features=features, **args)
    if what == "noise":
        args["noisy"] = noisy + torch.randn_like(noisy)
    elif what == "time":
        args["s"] = torch.tensor([0.3])
    elif what == "prompt":
        args["texts"] = ["a lamp in #ff0000"]
    elif what == "colour":
        args["texts"] = ["a ball in #0000ff"]
    else:
        features = net.encode_image(1 - image)
    assert (run(net, features=features, **args) - before).abs().max() > 1e-4


def test_a_prompt_does_not_depend_on_its_neighbours_in_the_batch(net):
    """Padding is masked: alone or beside a longer prompt, the picture is the same."""
    noisy = torch.randn(1, 3, 16, 24)
    features = net.encode_image(torch.rand(1, 3, 16, 24))
    alone = run(net, noisy, torch.ones(1), ["depth map"], features)
    long = "semantic segmentation of the image: wall: #ff0000, floor: #00ff00, ball: #0000ff."
    both = run(
        net,
        noisy.expand(2, -1, -1, -1),
        torch.ones(2),
        ["depth map", long],
        features.select(torch.tensor([0, 0])),
    )
    assert torch.allclose(both[0], alone[0], atol=1e-4)


def test_pointing_paints_exactly_the_prompts_colours(net):
    """Gate open, one key favoured: the picture is that colour, whatever is drawn beneath."""
    text = text_batch(["wall #ff8000 floor #0000ff"], max_tokens=120, device=torch.device("cpu"))
    prompt = net.text(text)
    tokens = prompt.tokens
    at = text.colour_at[0, 1]
    key = net.colour_key(tokens[0, at])
    x = torch.randn(1, 20, 8, 8)
    x[:, 3] = 50.0
    x[:, 4:] = 1e4 * (key - net.colour_key(tokens[0, text.colour_at[0, 0]]))[None, :, None, None]
    painted = net.paint(x, prompt)
    expected = torch.tensor([-1.0, -1.0, 1.0])[None, :, None, None].expand_as(painted)
    assert torch.allclose(painted, expected, atol=1e-5)


def test_without_colours_nothing_is_pointed_at(net):
    text = text_batch(["depth map"], max_tokens=120, device=torch.device("cpu"))
    x = torch.randn(1, 20, 8, 8)
    assert torch.equal(net.paint(x, net.text(text)), x[:, :3])


def test_the_flow_ends_where_the_last_estimate_points(net, monkeypatch):
    """With an oracle for the clean picture the path is straight, whatever the steps."""
    clean = torch.rand(2, 3, 8, 8) * 2 - 1
    times = []

    def oracle(noisy, s, prompt, features):
        times.append(float(s[0]))
        assert torch.allclose(noisy, (1 - times[-1]) * clean + times[-1] * noise, atol=1e-5)
        return clean

    monkeypatch.setattr(net, "forward", oracle)
    nothing = net.no_image((8, 8), 2)
    for steps in (1, 2, 4):
        noise = torch.randn(2, 3, 8, 8)
        assert torch.allclose(draw(net, ["a", "b"], nothing, noise, steps=steps), clean, atol=1e-6)
    assert times == [1.0, 1.0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_seeds_are_pinned_by_key_and_noise_by_seed():
    assert key_seed("abc", 0) == key_seed("abc", 0) != key_seed("abc", 1)
    one = noise_for([5], (8, 16))
    assert torch.equal(noise_for([9, 5], (8, 16))[1:], one)


def test_saved_weights_come_back_and_the_card_is_checked(net, tmp_path):
    path = MiniGenerator.save(tmp_path / "g.safetensors", net.state_dict(), CARD)
    generator = MiniGenerator.from_pretrained(path)
    for name, value in net.state_dict().items():
        assert torch.equal(generator.net.state_dict()[name], value.half().float()), name
    assert generator.working_size(480, 640) == (24, 32)
    assert generator.working_size(100, 400) == (16, 56)
    card = json.loads((tmp_path / "g.json").read_text())
    (tmp_path / "g.json").write_text(json.dumps({**card, "version": 99}))
    with pytest.raises(UsageError, match="version 99, expected mini-generator version <= 1"):
        MiniGenerator.from_pretrained(path)
    (tmp_path / "g.json").write_text(json.dumps({**card, "network": {**TINY, "width": 64}}))
    with pytest.raises(UsageError, match="does not fit the card"):
        MiniGenerator.from_pretrained(path)
    with pytest.raises(UsageError, match=r"not found; the shipped ones are .*mini\.safetensors"):
        MiniGenerator.from_pretrained(tmp_path / "none.safetensors")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_the_generator_computes_in_what_the_device_has(net, monkeypatch, native, expected):
    monkeypatch.setattr(mini_generator, "has_bfloat16", lambda device: native)
    generator = MiniGenerator(net, CARD)
    assert str(generator.dtype) == f"torch.{expected}"
    image = np.zeros((24, 32, 3), np.uint8)
    assert generator.encode([image], (24, 32)).half.dtype is generator.dtype


def test_an_answer_does_not_depend_on_the_batch(net, tmp_path):
    path = MiniGenerator.save(tmp_path / "g.safetensors", net.state_dict(), CARD)
    generator = MiniGenerator.from_pretrained(path)
    generator.dtype = torch.float32
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (30, 40, 3)).astype(np.uint8) for _ in range(3)]
    features = generator.encode(images, (24, 32))
    together = generator.pictures(features, ["depth map"] * 3, [1, 2, 3], steps=2)
    alone = generator.pictures(Features(*(f[1:2] for f in features)), ["depth map"], [2], steps=2)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
