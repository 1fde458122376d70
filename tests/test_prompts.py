"""Prompts: palettes in every notation read back as the colours written, wordings kept apart."""

import numpy as np
import pytest

from teacher import prompts, wordings
from teacher.errors import UsageError
from teacher.generators.mini_text import MAX_COLOURS, parse_colour, tokenize, words

PALETTE = {"wall": (255, 0, 0), "floor lamp": (0, 128, 3), "ball": (17, 34, 51)}


@pytest.mark.parametrize("notation", prompts.NOTATIONS)
def test_a_palette_in_any_notation_carries_its_colours_in_order(notation):
    text = prompts.semantic(PALETTE, notation=notation)
    found = [parse_colour(w) for w in words(text)]
    assert [c for c in found if c is not None] == list(PALETTE.values())
    for name in PALETTE:
        assert name in text


@pytest.mark.parametrize(
    ("text", "rgb"),
    [
        ("#f80", (255, 136, 0)),
        ("#ff8000", (255, 128, 0)),
        ("<255, 128, 0>", (255, 128, 0)),
        ("(1,2,3)", (1, 2, 3)),
        ("rebeccapurple", (102, 51, 153)),
        ("pure yellow", (255, 255, 0)),
        ("light blue", (173, 216, 230)),  # CSS lightblue, not the mean of blue and white
        ("dark purple", (64, 0, 64)),  # no CSS colour: half way to black
        ("wall", None),
    ],
)
def test_colours_by_hand(text, rgb):
    assert parse_colour(text) == rgb


def test_colour_tokens_carry_rgb_and_point_to_their_place():
    tokens = tokenize("the wall is #ff0000, the floor (0, 255, 0)", max_tokens=16)
    assert tokens.mask.sum() == 7
    assert tokens.colour_at[tokens.colour_mask].tolist() == [3, 6]
    assert tokens.rgb[3].tolist() == [1, -1, -1, 1]
    assert tokens.rgb[6].tolist() == [-1, 1, -1, 1]
    assert (tokens.ngrams[[3, 6]] == 0).all()
    assert (tokens.rgb[[0, 1, 2, 4, 5]] == 0).all()


def test_words_spelled_alike_share_ngrams_and_others_do_not():
    def bag(word):
        return set(tokenize(word, max_tokens=4).ngrams[0].tolist()) - {0}

    assert len(bag("normals") & bag("normal")) >= 5
    assert len(bag("normals") & bag("depth")) <= 1


def test_a_prompt_of_twenty_two_classes_keeps_all_its_colours():
    palette = {f"class{chr(97 + i)}": (i, 2 * i, 3 * i) for i in range(22)}
    tokens = tokenize(prompts.semantic(palette, notation="sentence"), max_tokens=120)
    assert tokens.colour_mask.sum() == 22 <= MAX_COLOURS


def test_held_out_wordings_and_requests_are_in_no_training_list():
    for held_out in wordings.HELD_OUT:
        for kind, texts in held_out.items():
            assert not set(texts) & {*wordings.TEMPLATES[kind], *wordings.SENTENCES[kind]}


def test_every_wording_has_the_slots_that_its_kind_needs():
    needs = {"depth": ["{map}"], "semantic": ["{palette}"], "instances": ["{name}"]}
    for kind in ("depth", "normals", "semantic", "instances", "generate", "other"):
        for text in [*wordings.TEMPLATES[kind], *wordings.SENTENCES.get(kind, [])]:
            for slot in needs.get(kind, []):
                assert slot in text, text
            filled = prompts.fill(text, map="", palette="", name="", background="", caption="")
            assert "{" not in filled


def test_wordings_are_complete_sentences_after_filling():
    rng = np.random.default_rng(0)
    for _ in range(200):
        texts = [
            prompts.depth(colour_map="plasma", rng=rng),
            prompts.normals(rng=rng),
            prompts.semantic(PALETTE, rng=rng, notation="rgb"),
            prompts.instances("ball", background="white", rng=rng),
            prompts.generate("a room", rng=rng),
            prompts.unknown(rng=rng),
        ]
        assert "plasma" in texts[0]
        assert "ball" in texts[3] and "white" in texts[3]
        assert not any("{" in t for t in texts if '": "' not in t)


def test_distinct_colours_keep_their_distance():
    rng = np.random.default_rng(1)
    colours = np.array(
        prompts.distinct_colours(12, rng=rng, distance=80.0, avoid=[(0, 0, 0)]), float
    )
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(12)
    assert gaps.min() >= 80
    assert np.linalg.norm(colours, axis=1).min() >= 80


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match=r"must be one of .*plasma.*got 'jet'"):
        prompts.depth(colour_map="jet")
    with pytest.raises(UsageError, match="notation must be one of"):
        prompts.palette_text(PALETTE, notation="latex")  # type: ignore[arg-type]
