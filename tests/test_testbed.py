# SPDX-License-Identifier: Apache-2.0

"""The testbed: laws of the language, what the shipped models were taught, and frontiers with a closed form."""

import itertools
import math
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tfpo.functional import token_rewards
from trl_tfpo.testbed import load_world, reward_kl_frontier, sample_completions
from trl_tfpo.testbed.build import build, sample_batch
from trl_tfpo.testbed.language import MAX_NEW_TOKENS, REVIEWS, random_language


HAND_WRITTEN = (
    "we tried the river tavern yesterday. the room was splendid. the waiters calmly brought the awful bread."
)


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def unguided(world):
    """800 patient samples: 20 of each training prompt."""
    return sample_completions(
        world.patient, world.tokenizer, world.prompts("train"), num_samples_per_prompt=20, seed=0
    )


@pytest.fixture(scope="module")
def pairs(world):
    return world.preference_dataset("praise", num_pairs=200, seed=1)


def auc(scores, labels):
    """Chance that a positive outranks a negative; a tie counts half."""
    positive, negative = scores[labels].sort().values, scores[~labels].sort().values
    below = torch.searchsorted(negative, positive).double()
    ties = torch.searchsorted(negative, positive, right=True) - below
    return ((below + ties / 2).mean() / len(negative)).item()


# The language


def test_every_sampled_review_is_grammatical():
    """A checker that rejects the language's own text would report broken grammar for a perfect policy."""
    rng = random.Random(0)
    for place in itertools.chain(REVIEWS.places("train"), REVIEWS.places("validation"), REVIEWS.places("test")):
        for _ in range(5):
            review = REVIEWS.sample_review(rng, place, REVIEWS.sample_moods(rng))
            assert REVIEWS.is_grammatical(review), review
            assert f"{place[0]} {place[1]}" in review


@pytest.mark.parametrize(
    "text",
    [
        HAND_WRITTEN,
        "this is about the park inn. the tables were rather usual but my uncle duly called the view vile. "
        "everyone fumed over the soup. so much for the inn.",
        "my sister took us to the castle cafe. the families sat near the horrid mirrors and the view was miserable. "
        "we gently shared the local cake. that was the castle cafe.",
    ],
)
def test_hand_written_reviews_are_grammatical(text):
    """Sampler and checker share their rules; without text from outside, both could be wrong alike."""
    assert REVIEWS.is_grammatical(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("the room was", "the room were"),  # number
        ("the room was", "the rooms was"),  # no such word
        ("splendid", "calmly"),  # a word of another slot
        ("yesterday.", "yesterday"),  # an end lost
        (" the room was splendid.", ""),  # too short
        ("awful bread.", "awful bread. the view was vile. the menu was vile. the music was vile."),  # too long
        ("the room", "the  room"),  # not the text that the tokenizer decodes to
        ("we tried", "We tried"),
        ("awful bread.", "awful bread. so much for the bakery."),  # another place
        ("awful bread.", "awful bread. that was the park tavern."),
        ("we tried the river tavern yesterday. ", ""),
        (HAND_WRITTEN, ""),
    ],
)
def test_what_breaks_a_rule_is_not_grammatical(old, new):
    """A lax checker hides that guidance has broken the language: the first thing that strong guidance does."""
    assert old in HAND_WRITTEN
    assert not REVIEWS.is_grammatical(HAND_WRITTEN.replace(old, new))


def test_a_lost_word_is_noticed():
    """Only an adverb of degree may be missing; a checker that skips words would pass any stammer."""
    rng = random.Random(1)
    for place in REVIEWS.places("test"):
        words = REVIEWS.sample_review(rng, place, REVIEWS.sample_moods(rng)).split()
        for index, word in enumerate(words):
            if word not in ("quite", "rather", "really", "truly"):
                assert not REVIEWS.is_grammatical(" ".join(words[:index] + words[index + 1 :])), (words, index)
                assert not REVIEWS.is_grammatical(" ".join(words[:index] + [word] + words[index:])), (words, index)


def test_oracles_count_words(world):
    """A wrong oracle makes every number of the testbed wrong, and none of them looks it."""
    praise, calm = world.attributes["praise"], world.attributes["calm"]
    assert praise.oracle(HAND_WRITTEN) == 1 - 1
    assert calm.oracle(HAND_WRITTEN) == 1
    assert praise.oracle("splendid superb. awful familiar") == 2 - 1
    assert calm.oracle("wildly, nervously and calmly fretted") == -2
    assert praise.oracle("") == 0 == praise.oracle("splendidly unsplendid")
    assert not set(praise.words) & set(calm.words)
    assert all(sum(attribute.words.values()) == 0 for attribute in (praise, calm))


def test_structure_does_not_depend_on_mood():
    """If praise came with longer reviews, a method that only learned to ramble would count as aligned."""
    colored = re.compile(r"\b(" + "|".join(w for a in REVIEWS.attributes.values() for w in a.words) + r")\b")
    skeletons = [
        [colored.sub("*", REVIEWS.sample_review(random.Random(seed), ("park", "inn"), moods)) for seed in range(50)]
        for moods in ({"praise": 1, "calm": 1}, {"praise": -1, "calm": 1}, {"praise": -1, "calm": -1})
    ]
    assert skeletons[0] == skeletons[1] == skeletons[2]


def test_splits_are_disjoint_and_differ(world):
    """A test prompt seen in training would turn memory into skill."""
    prompts = {split: [prompt[0]["content"] for prompt in world.prompts(split)] for split in REVIEWS.num_places}
    assert {split: len(texts) for split, texts in prompts.items()} == {"train": 40, "validation": 12, "test": 12}
    assert len(set(sum(prompts.values(), []))) == 64
    with pytest.raises(ValueError, match="must be one of .* Got 'dev'"):
        world.prompts("dev")


# The tokenizer


@pytest.mark.parametrize("instruction", ["", "admire the place.", "scorn the place. keep a restless voice."])
def test_prompt_is_a_prefix_of_the_conversation(world, instruction):
    """If not, completion masks and token rewards would sit on the wrong tokens."""
    prompt = REVIEWS.make_prompt(("park", "inn"), instruction)
    prompt_ids = world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answered = [*prompt, {"role": "assistant", "content": HAND_WRITTEN}]
    ids = world.tokenizer.apply_chat_template(answered, return_dict=False)
    assert ids[: len(prompt_ids)] == prompt_ids
    completion_ids = world.tokenizer(HAND_WRITTEN, add_special_tokens=False)["input_ids"]
    assert ids[len(prompt_ids) :] == completion_ids + [world.tokenizer.eos_token_id]
    assert world.tokenizer.unk_token_id not in ids
    assert world.tokenizer.decode(completion_ids) == HAND_WRITTEN


def test_special_tokens_are_distinct(world):
    """A pad that is also an end would teach the doctor never to stop."""
    tokenizer = world.tokenizer
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 4
    assert all(model.config.vocab_size == len(tokenizer) for model in (world.patient, world.doctor))
    assert world.patient.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer("a dragon")["input_ids"][-1] == tokenizer.unk_token_id


# The shipped models


def test_shipped_folders_are_self_contained(world):
    """A path of the machine that trained them, or weights that the wheel cannot carry, breaks the user's copy."""
    files = [path for path in world.weights.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert not [path for path in files if path.suffix == ".json" and re.search(r'"[^"\s]*/\w+/', path.read_text())]
    for name in ("patient", "doctor"):
        tokenizer = AutoTokenizer.from_pretrained(world.weights / name)
        assert tokenizer.get_vocab() == REVIEWS.make_tokenizer().get_vocab()
        assert tokenizer.chat_template == REVIEWS.make_tokenizer().chat_template
    assert world.patient.num_parameters() > 5 * world.doctor.num_parameters()
    assert not world.patient.training and not world.doctor.training
    assert load_world().patient is not world.patient


@pytest.mark.slow
def test_grammar_rates(world, unguided):
    """A patient that stammers by itself leaves no way to see what guidance breaks."""
    patient = [REVIEWS.is_grammatical(text) for text in itertools.chain(*unguided)]
    doctor = sample_completions(
        world.doctor, world.tokenizer, world.prompts("train"), num_samples_per_prompt=10, seed=0
    )
    doctor = [REVIEWS.is_grammatical(text) for text in itertools.chain(*doctor)]
    assert sum(patient) / len(patient) >= 0.95
    assert sum(doctor) / len(doctor) >= 0.95


@pytest.mark.slow
def test_patient_reviews_the_place_it_is_asked_about(world, unguided):
    """If prompts did not matter, a test on new prompts would test nothing."""
    about = [
        " ".join(place) in text
        for place, texts in zip(REVIEWS.places("train"), unguided, strict=True)
        for text in texts
    ]
    assert sum(about) / len(about) > 0.98


@pytest.mark.slow
def test_attributes_vary_and_are_independent(world, unguided):
    """Correlated attributes could not be weighed against each other; a still reward leaves nothing to gain."""
    scores = torch.tensor(
        [[attribute.oracle(text) for attribute in world.attributes.values()] for texts in unguided for text in texts]
    )
    assert ((scores.std(dim=0) > 1.5) & (scores.std(dim=0) < 3)).all()
    assert (scores.mean(dim=0).abs() < 0.3).all()
    assert scores.T.corrcoef()[0, 1].abs() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["praise", "calm"])
def test_patient_obeys_its_faces(world, name):
    """Token rewards are read from the difference between the faces; a deaf patient gives noise."""
    attribute = world.attributes[name]
    instructions = [attribute.faces.positive, "", attribute.faces.negative]
    prompts = [
        REVIEWS.make_prompt(place, instruction) for instruction in instructions for place in REVIEWS.places("test")
    ]
    samples = sample_completions(world.patient, world.tokenizer, prompts, num_samples_per_prompt=8, seed=2)
    texts = [sum(samples[start : start + 12], []) for start in (0, 12, 24)]  # (3 instructions, 96 samples)
    positive, none, negative = (torch.tensor([attribute.oracle(text) for text in group]).mean() for group in texts)
    assert positive > none + 0.8 and none > negative + 0.8
    (other,) = (a for a in world.attributes.values() if a.name != name)
    effect = [torch.tensor([other.oracle(text) for text in group]).mean() for group in texts]
    assert abs(effect[0] - effect[2]) < 0.9  # the other attribute stays as it is; standard error 0.3
    lengths = [torch.tensor([float(len(text.split())) for text in group]).mean() for group in texts]
    assert abs(lengths[0] - lengths[2]) < 5  # standard error 1.2


@pytest.mark.slow
def test_token_rewards_find_the_words_that_matter(world, pairs):
    """The premise of the method: where the faces disagree are the words that the annotator counts."""
    tokenizer, attribute = world.tokenizer, world.attributes["praise"]
    rewards, matters = [], []
    for row in pairs.select(range(100)):
        for completion in (row["chosen"], row["rejected"]):
            ids = tokenizer(completion[0]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            logps = []
            for face in (attribute.faces.positive, attribute.faces.negative):
                prompt = [{"role": "system", "content": face}, *row["prompt"]]
                prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
                with torch.no_grad():
                    logits = world.patient(torch.tensor([prompt_ids + ids])).logits[:, len(prompt_ids) - 1 : -1]
                logps.append(logits.log_softmax(-1).gather(2, torch.tensor(ids)[None, :, None]).squeeze(2))
            reward = token_rewards(
                positive_logps=logps[0],
                negative_logps=logps[1],
                preference_sign=torch.ones(1),
                completion_mask=torch.ones(1, len(ids), dtype=torch.bool),
                reward_direction="faces",
                importance_temperature=1.0,
                sparsity_threshold=0.3,
            )
            rewards.append(reward[0])
            matters += [attribute.words.get(token, 0) for token in tokenizer.convert_ids_to_tokens(ids)]
    rewards, matters = torch.cat(rewards), torch.tensor(matters)
    assert auc(rewards.abs(), matters != 0) >= 0.95
    found = (matters != 0) & (rewards != 0)
    assert (rewards[found].sign() == matters[found]).double().mean() > 0.95


# Sampling and preferences


def test_sampling_is_seeded_and_leaves_no_trace(world):
    """Two methods compared on different noise, or a training run that changes because something was measured."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw = [
        sample_completions(
            world.doctor, world.tokenizer, world.prompts("test")[:3], num_samples_per_prompt=2, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert draw[0] == draw[1] != draw[2]
    assert [len(texts) for texts in draw[0]] == [2, 2, 2]


def test_preference_rows(world, pairs):
    """The format is TRL's; rows that change from run to run make every comparison a different one."""
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and len(pairs) == 200
    assert pairs[0]["prompt"] == world.prompts("train")[0] == pairs[40]["prompt"]
    assert [message["role"] for message in pairs[0]["chosen"] + pairs[0]["rejected"]] == ["assistant", "assistant"]
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    small = [world.preference_dataset("calm", num_pairs=4, seed=seed, split="test").to_list() for seed in (3, 3, 4)]
    assert small[0] == small[1] != small[2]
    assert small[0][0]["prompt"] == world.prompts("test")[0]


def test_labels_err_as_bradley_terry_says(world, pairs, monkeypatch):
    """Labels without noise flatter a method that trusts them; labels with too much are a different task."""
    oracle = world.attributes["praise"].oracle
    difference = torch.tensor([oracle(r["chosen"][0]["content"]) - oracle(r["rejected"][0]["content"]) for r in pairs])
    untied = difference[difference != 0].double()
    expected = untied.abs().sigmoid()
    error = (expected * (1 - expected)).sum().sqrt() / len(untied)
    agreement = (untied > 0).double().mean()
    assert abs(agreement - expected.mean()) < 3 * error
    assert agreement < 0.99  # some labels do err

    monkeypatch.setattr("trl_tfpo.testbed.world.NOISE_TEMPERATURE", 1e-3)
    exact = world.preference_dataset("praise", num_pairs=40, seed=1)
    assert all(oracle(row["chosen"][0]["content"]) >= oracle(row["rejected"][0]["content"]) for row in exact)


def test_identical_completions_are_redrawn(world, monkeypatch):
    """A pair of equals has no first difference and teaches nothing; an empty text cannot be trained on."""
    seeds = []

    def twins_at_first(model, tokenizer, prompts, *, num_samples_per_prompt, seed):
        seeds.append(seed)
        bad = [["a", "b"], ["same", "same"], ["", "b"]]
        return [bad[row] if len(seeds) == 1 else ["a", "b"] for row in range(len(prompts))]

    monkeypatch.setattr("trl_tfpo.testbed.world.sample_completions", twins_at_first)
    rows = world.preference_dataset("praise", num_pairs=3, seed=5)
    assert len(seeds) == len(set(seeds)) == 2
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(row["chosen"][0]["content"] and row["rejected"][0]["content"] for row in rows)


@pytest.mark.parametrize("kl", [0.02, 0.5, 1.5])
def test_frontier_of_a_gaussian(kl):
    """Reward N(1, 2^2): tilting moves the mean alone, and the best reward is 1 + 2 sqrt(2 KL)."""
    rewards = 1 + 2 * torch.randn(10, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frontier = reward_kl_frontier(rewards)
    assert abs(frontier.best_reward(kl) - (1 + 2 * math.sqrt(2 * kl))) < 4 * frontier.standard_error(kl)
    assert frontier.standard_error(kl) < 0.05


@pytest.mark.slow
def test_standard_error_is_the_spread_over_repetitions():
    """An error bar that is too small turns noise into findings."""
    frontiers = [
        reward_kl_frontier(torch.randn(4, 500, generator=torch.Generator().manual_seed(seed))) for seed in range(40)
    ]
    for kl in (0.0, 0.3, 1.0):
        spread = torch.tensor([frontier.best_reward(kl) for frontier in frontiers]).std()
        claimed = torch.tensor([frontier.standard_error(kl) for frontier in frontiers]).mean()
        assert 0.65 < claimed / spread < 1.5  # the spread of 40 is itself known to a tenth


def test_frontier_is_increasing_and_concave():
    """The best reward at a larger budget is never lower, and each further nat buys less."""
    rewards = torch.randn(5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()
    frontier = reward_kl_frontier(rewards)
    slope = frontier.rewards.diff() / frontier.kls.diff()
    assert (frontier.kls.diff() > 0).all() and (slope > 0).all() and (slope.diff() < 1e-9).all()


def test_weight_never_moves_between_prompts():
    """Pooled tilting would count a shift to easy prompts as a gain, which no policy can make."""
    coin = torch.tensor([[0.0, 1.0]], dtype=torch.float64).repeat(1, 100)
    offset = torch.tensor([[-10.0], [10.0]], dtype=torch.float64)
    alone, shifted = reward_kl_frontier(coin), reward_kl_frontier(coin + offset)
    assert shifted.best_reward(0.3) == pytest.approx(alone.best_reward(0.3), abs=1e-9)

    unequal = reward_kl_frontier(torch.cat([coin, 0 * coin]))  # only the first prompt can gain, and alone pays
    assert unequal.best_reward(0.15) == pytest.approx(alone.best_reward(0.3) / 2, abs=1e-4)


@pytest.mark.slow
def test_efficiency_of_a_tilted_policy_is_one(world, unguided):
    """The scale on which every method is read: 0 is the patient, 1 is the best there is."""
    rewards = torch.tensor([[world.attributes["praise"].oracle(text) for text in texts] for texts in unguided])
    rewards = rewards.view(2, -1).double()  # as if of two prompts: the reward hardly depends on the place
    frontier = reward_kl_frontier(rewards)
    weights = torch.exp(0.31 * rewards)  # a tilt that is on no grid
    weights = weights / weights.sum(dim=1, keepdim=True)
    reward = (weights * rewards).sum(dim=1).mean().item()
    kl = (weights * (weights * rewards.size(1)).log()).sum(dim=1).mean().item()
    assert frontier.efficiency(reward, kl) == pytest.approx(1, abs=1e-3)
    assert frontier.efficiency(frontier.patient_reward, kl) == 0
    assert frontier.efficiency((reward + frontier.patient_reward) / 2, kl) == pytest.approx(0.5, abs=1e-3)
    assert frontier.best_reward(2.0) - frontier.patient_reward > 2  # there is room


def test_the_unreliable_end_is_refused():
    """Beyond the samples, the frontier is a guess, and an efficiency over it may be any number."""
    generator = torch.Generator().manual_seed(0)
    few, many = (reward_kl_frontier(torch.randn(4, n, generator=generator)) for n in (100, 3000))
    assert few.max_kl < 1.6 < 3 < many.max_kl
    with pytest.raises(ValueError, match="more patient samples"):
        few.best_reward(few.max_kl + 0.01)
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="where the frontier is reliable"):
            few.best_reward(bad)
    with pytest.raises(ValueError, match="only the patient has KL 0"):
        few.efficiency(1.0, 0.0)
    with pytest.raises(ValueError, match="must vary within a prompt"):
        reward_kl_frontier(torch.arange(3.0)[:, None].expand(3, 50))
    for bad in (torch.randn(50), torch.randn(4, 9), torch.randn(4, 50).log()):
        with pytest.raises(ValueError, match=r"finite \(P, N\) matrix"):
            reward_kl_frontier(bad)


# The build


@pytest.mark.slow
def test_build_makes_a_world_that_loads(tmp_path):
    """Whoever changes the language must be able to train its models again."""
    build(tmp_path / "first", steps=3, seed=0)
    build(tmp_path / "again", steps=3, seed=0)
    world, again = load_world(tmp_path / "first"), load_world(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(world.weights / "doctor").num_parameters() == 103_440
    for name in ("patient", "doctor"):
        states = [getattr(w, name).state_dict() for w in (world, again)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert sample_completions(
        world.doctor, world.tokenizer, world.prompts("test")[:1], num_samples_per_prompt=1, seed=0
    )


@pytest.mark.parametrize("seed", range(30))
def test_drawn_languages_are_languages(seed):
    """Texts of a drawn world are grammatical, short enough, and without a mood of their own."""
    language, rng = random_language(seed), random.Random(seed)
    tokenizer, attributes = language.make_tokenizer(), language.attributes
    assert language == random_language(seed) != random_language(seed + 1)
    assert 1 <= len(attributes) <= 2
    colored = re.compile(r"\b(" + "|".join(w for a in attributes.values() for w in a.words) + r")\b")
    scores = {name: [] for name in attributes}
    for place in language.places("train") + language.places("test"):
        for instruction in ("", *(face for a in attributes.values() for face in (a.faces.positive, a.faces.negative))):
            review = language.sample_review(rng, place, language.sample_moods(rng, instruction))
            assert language.is_grammatical(review)
            assert not language.is_grammatical(" ".join(review.split()[::-1]))
            ids = tokenizer(review, add_special_tokens=False)["input_ids"]
            assert len(ids) < MAX_NEW_TOKENS and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == review
            for name, attribute in attributes.items():
                if instruction in (attribute.faces.positive, attribute.faces.negative):
                    sign = 1 if instruction == attribute.faces.positive else -1
                    scores[name].append(sign * attribute.oracle(review))
    assert all(torch.tensor(x).mean() > 0.2 for x in scores.values())  # texts are as the instruction asks
    moods = [dict.fromkeys(attributes, sign) for sign in (1, -1)]
    place = language.places("test")[0]
    skeletons = [
        [colored.sub("*", language.sample_review(random.Random(i), place, mood)) for i in range(20)] for mood in moods
    ]
    assert skeletons[0] == skeletons[1]


def test_a_drawn_world_is_built_and_loaded(tmp_path):
    """A world without its language would be measured by the oracle of another."""
    language = random_language(5)
    build(tmp_path, steps=2, seed=0, language=language)
    world = load_world(tmp_path)
    assert world.language == language and world.attributes == language.attributes
    name = next(iter(language.attributes))
    assert world.preference_dataset(name, num_pairs=2, seed=0)[0]["prompt"] == world.prompts("train")[0]
    text = (tmp_path / "language.json").read_text(encoding="utf-8")
    (tmp_path / "language.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match="format 1. Got 99"):
        load_world(tmp_path)


def test_only_the_review_is_learned():
    """A loss on the request or the padding would teach the patient to ask, not to answer."""
    tokenizer = REVIEWS.make_tokenizer()
    batch = sample_batch(tokenizer, random.Random(0), instructions=("", "scorn the place."), batch_size=4)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert REVIEWS.is_grammatical(tokenizer.decode(ids[labels != -100], skip_special_tokens=True))
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert (labels != tokenizer.pad_token_id).all()
