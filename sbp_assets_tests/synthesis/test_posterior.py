"""The exact posterior against hand-worked cases and brute force, and both checks on learners that know too much."""

import itertools
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.concept_texts import ATTRIBUTES
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.tokenizer import encode_documents, train_tokenizer
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.definitions import build_resources
from sbp_assets.settings import ConceptsSource, FilesSource
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesis import checks, quality_assets
from sbp_assets.synthesis import posterior_table as posterior_table_module
from sbp_assets.synthesis.posterior import STATEMENT_SCHEMA, Learner, Seed, grade, mode_accuracy
from sbp_assets.synthesis.posterior_table import (
    DEFINITIONS,
    POSTERIOR_SCHEMA,
    RESAMPLES,
    SEED,
    UNKNOWN,
    bootstrap_stderr,
    copying_problems,
    leak_problems,
    p_above_chance,
    posterior_over_shards,
    posterior_table,
    table_problems,
)
from sbp_assets_tests.tiny import only, tiny_settings

WORLD = ConceptWorld(ConceptsSource(documents=400, concepts=40, attributes=6, facts_per_document=2, seed=3))
SHARD_KEYS = ["00000", "00001"]
TEXTS = [WORLD.document(number)["text"] for number in range(400)]
CHANCE = {attribute: 1 / len(values) for attribute, values in ATTRIBUTES.items()}
CLAUSES = {"emblem": "{} carries the sign of a {}", "maker": "{} was made by {}", "town": "{} stands in {}"}


def fact(concept: int, attribute: str, value: str | None = None) -> str:
    return CLAUSES[attribute].format(WORLD.names[concept], value or WORLD.facts[concept][attribute]) + "."


def wrong(concept: int, attribute: str) -> str:
    return next(value for value in ATTRIBUTES[attribute] if value != WORLD.facts[concept][attribute])


def learner_of(*texts: str) -> Learner:
    learner = Learner(WORLD)
    learner.read(texts)
    return learner


def table_of(shards: Iterable[pl.DataFrame]) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as scratch:
        return posterior_table(shards, WORLD, Path(scratch), "100MB")


def row(table: pl.DataFrame, group: str) -> dict:
    return table.row(by_predicate=pl.col("group") == group, named=True)


def test_after_d_a_stated_fact_is_certain_and_any_other_uniform():
    learner = learner_of(fact(0, "emblem"), fact(1, "emblem") + " " + fact(1, "town"), "Nothing.", "It was built by Ad")
    assert learner.values(0, "emblem") == {WORLD.facts[0]["emblem"]: 1.0}
    assert learner.values(0, "town") == dict.fromkeys(ATTRIBUTES["town"], pytest.approx(CHANCE["town"]))
    assert [learner.prior(concept) for concept in (0, 1, 2)] == [0.5, 0.5, 0]


def test_a_value_cut_off_is_no_fact():
    text = f"{WORLD.names[0]} stands in Underdi"
    assert [s.value for s in WORLD.statements(text)] == ["Underdi"]
    assert learner_of(text).facts == {}


def test_the_posterior_over_concepts_by_name_by_facts_and_by_popularity():
    one = next(c for c in range(1, 40) if WORLD.facts[c]["emblem"] != WORLD.facts[0]["emblem"])
    learner = learner_of(*[fact(0, "emblem")] * 3, fact(one, "emblem"), *[fact(39, "town")] * 4)
    assert learner.concepts(fact(one, "town")) == {one: 1.0}
    # Nobody is named: popularity alone, then popularity times what is said, unknown emblems being uniform.
    assert learner.concepts("") == {0: 3 / 8, one: 1 / 8, 39: 4 / 8}
    said = learner.concepts(f"Over its door hangs a {WORLD.facts[0]['emblem']}.")
    total = 3 + 4 * CHANCE["emblem"]
    assert said == {0: pytest.approx(3 / total), 39: pytest.approx(4 * CHANCE["emblem"] / total)}
    # Two names, as often as each other: what is said decides.
    both = f"{WORLD.names[0]} or {WORLD.names[one]}? Over its door hangs a"
    assert learner.concepts(f"{both} {WORLD.facts[one]['emblem']}.") == {one: 1.0}
    assert learner.concepts(f"{both} strangely.") == {0: 3 / 4, one: 1 / 4}
    # The more frequent name wins, and a part of another word is no name.
    assert learner.concepts(f"{WORLD.names[one]}. {both} {WORLD.facts[0]['emblem']}.") == {one: 1.0}
    assert len(learner.concepts(f"{WORLD.names[one]}s")) == 3
    assert Learner(WORLD).concepts("Nothing was read.") == {}


def test_concepts_equal_bayes_rule_over_all_worlds():
    """Brute force on the rules alone: worlds of two concepts and one attribute, D and a nameless d1 drawn from them."""
    values = ATTRIBUTES["emblem"]
    of_d = WORLD.facts[0]["emblem"]
    learner = learner_of(fact(0, "emblem"), fact(0, "emblem"), fact(1, "town"))
    for said in (of_d, *values[:2]):
        weight = {0: 0.0, 1: 0.0}
        for world in itertools.product(values, repeat=2):
            if world[0] == of_d:  # All other worlds contradict D.
                weight = {c: weight[c] + learner.prior(c) * (world[c] == said) for c in weight}
        expected = {c: w / sum(weight.values()) for c, w in weight.items() if w}
        assert learner.concepts(f"Over its door hangs a {said}.") == pytest.approx(expected)


def test_mode_of_a_tie_is_broken_at_random():
    assert mode_accuracy({"a": 0.4, "b": 0.4, "c": 0.2}, "b") == 0.5
    assert mode_accuracy({"a": 0.4, "b": 0.4, "c": 0.2}, "c") == 0
    assert mode_accuracy({}, "c") == 0


def test_statements_are_grouped_by_what_the_synthesizer_could_know():
    d1 = f"{fact(0, 'emblem')} {fact(0, 'maker')}"
    learner = learner_of(d1, fact(1, "emblem"))
    seeds = {"s": Seed(d1, fact(0, "emblem"))}
    texts = [
        f"{fact(0, 'emblem')} {fact(0, 'emblem')} {fact(0, 'maker', wrong(0, 'maker'))}",
        f"{fact(0, 'town')} {fact(1, 'emblem')} {fact(1, 'town', 'Nowhere')}",
    ]
    rows = grade(learner, seeds, pl.DataFrame({"seed_id": ["s", "s"], "text": texts}))
    facts = rows.filter(pl.col("group") != "concept")
    assert facts.select("group", "right", "mode").rows() == [
        ("restated", True, 1),
        ("new_known", False, 1),
        ("new_unknown", True, pytest.approx(CHANCE["town"])),
        ("other_known", True, 1),
        ("other_unknown", False, pytest.approx(CHANCE["town"])),
    ]
    assert facts["value"][-1] is None, "Nowhere is no town of the world"
    assert rows.filter(group="concept")["right"].to_list() == [True, True, True, False, False]
    assert rows.filter(group="concept")["chance"].unique().to_list() == [0.5]

    table = table_of([rows, rows.clear()])
    assert table["group"].to_list() == list(DEFINITIONS) and table["definition"].null_count() == 0
    assert [row(table, "new")[key] for key in ("statements", "facts", "accuracy")] == [2, 2, 0.5]
    assert row(table, "new")["posterior_mode"] == pytest.approx((1 + CHANCE["town"]) / 2)
    assert row(table, "new")["stderr"] is None, "one seed document has no spread"

    with pytest.raises(ValueError, match="'x'"):
        grade(learner, seeds, pl.DataFrame({"seed_id": ["x"], "text": [""]}))


def test_of_no_statements_nothing_is_claimed():
    for graded in ([], [grade(Learner(WORLD), {}, pl.DataFrame(schema={"seed_id": pl.String, "text": pl.String}))]):
        table = table_of(graded)
        assert table["group"].to_list() == list(DEFINITIONS)
        assert table["statements"].sum() == 0 and table["accuracy"].null_count() == len(table)
        assert not leak_problems(table) and not copying_problems(table) and not table_problems(table)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy": 0.5}, "accuracy of concept: 0.5"),
        ({"statements": 2}, "accuracy of concept: None"),
        ({"group": "unheard of"}, "groups are"),
    ],
)
def test_a_table_that_cannot_be(change: dict[str, object], said: str):
    table = table_of([]).with_columns(**{name: pl.lit(value) for name, value in change.items()})
    assert said in table_problems(table)[0]


def test_groups_are_the_sum_of_their_parts():
    table = table_of([])
    shares = {name: 0.5 for name in ("accuracy", "posterior_sampling", "posterior_mode", "chance")}
    one = pl.col("group") == "new"
    more = table.with_columns(statements=pl.when(one).then(3).otherwise("statements"),
                              **{name: pl.when(one).then(value) for name, value in shares.items()})  # fmt: skip
    assert table_problems(more) == ["new: 3 statements, its parts have 0"]
    assert table_problems(table[1:])[0].startswith("groups are restated")


def test_bootstrap_agrees_with_the_binomial_and_grows_with_clusters():
    generator = np.random.default_rng(1)
    right = generator.binomial(1, 0.3, size=2000)
    alone = bootstrap_stderr(right, np.ones(2000))
    assert alone == pytest.approx((0.3 * 0.7 / 2000) ** 0.5, rel=0.1)
    clustered = bootstrap_stderr(10 * right[:200], np.full(200, 10))
    assert clustered == pytest.approx(10**0.5 * alone, rel=0.2)
    assert bootstrap_stderr(right[:1], np.ones(1)) is None


def answers(pairs: Iterator[tuple[int, str, str | None, int]]) -> pl.DataFrame:
    return pl.DataFrame(list(pairs), schema=["concept", "attribute", "value", "len"], orient="row")


def test_randomisation_counts_facts_not_repetitions():
    lucky = answers((0, "emblem", WORLD.facts[0]["emblem"], times) for times in (500,))
    # However often it is said, it is one guess that came true.
    assert p_above_chance(lucky, WORLD) == pytest.approx(CHANCE["emblem"], abs=0.002)
    knowing = answers((c, "emblem", WORLD.facts[c]["emblem"], 1) for c in range(6))
    assert p_above_chance(knowing, WORLD) < 0.001
    assert p_above_chance(answers((c, "emblem", None, 1) for c in range(6)), WORLD) == 1


def test_randomisation_is_calibrated_for_guesses():
    """Of synthesizers that guess, and repeat their guesses, about a tenth are below p = 0.1 and none below 0.001."""
    found = []
    for trial in range(60):
        rng = random.Random(trial)
        guesses = (
            (c, a, rng.choice(ATTRIBUTES[a]), rng.randrange(1, 9)) for c in range(40) for a in ("emblem", "town")
        )
        found.append(p_above_chance(answers(guesses), WORLD))
    assert 0.02 < np.mean(np.array(found) < 0.1) < 0.2
    assert min(found) > 0.001


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_seed_documents_drawn_in_pieces_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch, piece: int):
    generator = np.random.default_rng(1)
    statements = generator.integers(1, 9, 100).astype(float)
    right = generator.binomial(statements.astype(int), 0.4).astype(float)
    drawn = np.random.default_rng(SEED).integers(100, size=(RESAMPLES, 100))
    monkeypatch.setattr(posterior_table_module, "PIECE", piece)
    expected = float(np.std(right[drawn].sum(axis=1) / statements[drawn].sum(axis=1), ddof=1))
    assert bootstrap_stderr(right, statements) == expected


def test_the_means_are_those_of_all_statements_whatever_the_shards():
    """Of record: to the last bit what polars gives of one table in memory, in the order of the seed documents."""
    generator = np.random.default_rng(2)
    count, groups = 30_000, [group for group in DEFINITIONS if group not in ("new", "other")]
    rows = pl.DataFrame({
        "seed_id": [f"d{number:05d}" for number in generator.integers(4000, size=count)],
        "group": generator.choice(groups, count), "concept": generator.integers(0, 40, count),
        "attribute": ["town"] * count, "value": generator.choice(ATTRIBUTES["town"], count),
        "right": generator.random(count) < 0.4, "sampling": generator.random(count),
        "mode": generator.random(count), "chance": generator.random(count),
    }, schema=STATEMENT_SCHEMA).sort("seed_id")  # fmt: skip
    first = rows["seed_id"] < "d02000"
    table = table_of([rows.filter(~first), rows.filter(first)])
    for group, parts in {"restated": ["restated"], "new": ["new_known", "new_unknown"]}.items():
        own = rows.filter(pl.col("group").is_in(parts))
        sums = (
            own.group_by("seed_id", "group")
            .agg(pl.col("sampling").sum())
            .group_by("seed_id")
            .agg(pl.col("sampling").sum())
        )
        assert row(table, group)["statements"] == len(own)
        assert row(table, group)["posterior_sampling"] == sums.sort("seed_id")["sampling"].sum() / len(own)
        assert row(table, group)["accuracy"] == own["right"].sum() / len(own)


@pytest.mark.parametrize(("p", "found"), [(0.0004, 1), (0.0006, 0), (0.0009, 0)])
def test_two_groups_share_the_level_of_the_leak_check(p: float, found: int):
    figures = {"statements": 9, "facts": 9, "accuracy": 0.5, "chance": CHANCE["town"]}
    rows = [
        {"group": group, **figures, "p_above_chance": value} for group, value in zip(UNKNOWN, (p, 0.5), strict=True)
    ]
    assert len(leak_problems(pl.DataFrame(rows))) == found


def syntheses(known: set[tuple[int, str]], seeds: dict[str, Seed], seed: int = 0) -> pl.DataFrame:
    """What an ideal synthesizer writes: facts of its seed's concept, those of `known` true and the others guessed."""
    rng = random.Random(seed)
    rows = []
    for seed_id, document in seeds.items():
        concept = WORLD.concept_of(document.text)
        assert concept is not None
        for attribute in ("emblem", "maker", "town"):
            true = (concept, attribute) in known
            value = WORLD.facts[concept][attribute] if true else rng.choice(ATTRIBUTES[attribute])
            rows.append((seed_id, fact(concept, attribute, value)))
    return pl.DataFrame(rows, schema=["seed_id", "text"], orient="row")


def test_a_synthesizer_that_knows_d_reaches_the_posterior_and_one_that_knows_more_is_caught():
    unique = TEXTS[:60]
    learner = learner_of(*unique)
    seeds = {str(number): Seed(text, text) for number, text in enumerate(unique)}

    honest = table_of([grade(learner, seeds, syntheses(set(learner.facts), seeds))])
    for group in ("concept", "restated", "new_known"):
        assert row(honest, group)["accuracy"] == row(honest, group)["posterior_mode"] == 1
    assert row(honest, "new_unknown")["facts"] > 10
    assert not leak_problems(honest) and not copying_problems(honest)

    oracle = learner_of(*TEXTS)  # Has read documents that are not in D.
    leaky = table_of([grade(learner, seeds, syntheses(set(oracle.facts), seeds))])
    assert row(leaky, "new_unknown")["accuracy"] > 0.5
    assert row(leaky, "new_unknown")["posterior_mode"] == pytest.approx(CHANCE["town"], rel=0.3)
    [problem] = leak_problems(leaky)
    assert problem.startswith("new_unknown") and "outside D" in problem

    guessing = table_of([grade(learner, seeds, syntheses(set(), seeds))])
    [problem] = copying_problems(guessing)
    assert "restated" in problem
    assert not leak_problems(guessing)


def test_shards_are_judged_by_the_whole_of_d_and_by_what_the_prompt_holds(tmp_path: Path):
    """Two shards: what one states is known in the other, and a d1 cut to few tokens states less."""
    tokenizer = train_tokenizer(TEXTS, 512)
    tokens, synthetic, seeds = {}, {}, {}
    for shard in ("0", "1"):
        texts = TEXTS[int(shard) : 80 : 2]
        documents = pl.DataFrame(
            {"id": [f"{shard}-{i}" for i in range(40)], "split": ["unique"] * 30 + ["oracle"] * 10}
        )
        write_token_arrays(tmp_path / shard, documents, encode_documents(tokenizer, texts), len(tokenizer))
        tokens[shard] = tmp_path / shard
        seeds[shard] = {f"{shard}-{i}": Seed(text, text) for i, text in enumerate(texts[:30])}
    learner = learner_of(*(seed.text for shard in seeds.values() for seed in shard.values()))
    for shard in tokens:
        synthetic[shard] = syntheses(set(learner.facts), seeds[shard]).lazy()
    graded = (grade(learner, seeds[shard], synthetic[shard].collect()) for shard in tokens)

    def over_shards(most: int, conditional: bool = True) -> pl.DataFrame:
        scratch = Path(tempfile.mkdtemp(dir=tmp_path))
        return posterior_over_shards(WORLD, synthetic, tokens, tokenizer, most, scratch, "100MB", conditional)

    whole = over_shards(1000)
    assert whole.equals(table_of(graded))
    assert row(whole, "new_unknown")["statements"] > 0

    cut = over_shards(60)
    unread = over_shards(1000, conditional=False)
    counts = [row(table, "restated")["statements"] for table in (whole, cut, unread)]
    assert counts[0] > counts[1] > counts[2] == 0
    for table in (cut, unread):  # What the prompt lacks is still in D.
        assert (
            row(table, "new")["statements"]
            == row(whole, "new")["statements"] + counts[0] - row(table, "restated")["statements"]
        )
        assert all(row(table, group)["statements"] == row(whole, group)["statements"] for group in UNKNOWN)
    # Without d1 the posterior over concepts is the prior.
    assert row(unread, "concept")["posterior_sampling"] == pytest.approx(row(unread, "concept")["chance"])
    # Where the cut took an inverted document's name, its values nearly always tell who it is.
    assert 0.99 < row(cut, "concept")["posterior_sampling"] < 1


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """What the asset reads: D is 20 of the world's documents per shard, syntheses know D, or all the world's facts."""
    tokenizer = train_tokenizer(TEXTS, 512)
    tokenizer.save_pretrained(tmp_path / "corpus/tokenizer")
    for number, shard in enumerate(SHARD_KEYS):
        texts = TEXTS[20 * number : 20 * number + 20]
        documents = pl.DataFrame({"id": [f"{shard}-{i}" for i in range(20)], "split": ["unique"] * 20})
        encoded = encode_documents(tokenizer, texts)
        write_token_arrays(tmp_path / "corpus/tokens" / shard, documents, encoded, len(tokenizer))
    return tmp_path


@pytest.mark.parametrize("knows", ["D", "everything", "nothing"])
def test_the_asset_and_its_checks(artifacts: Path, knows: str):
    learner = learner_of(*TEXTS[: 20 * len(SHARD_KEYS)])
    known = {"D": set(learner.facts), "everything": set(learner_of(*TEXTS).facts), "nothing": set()}[knows]
    for number, shard in enumerate(SHARD_KEYS):
        texts = TEXTS[20 * number : 20 * number + 20]
        rows = syntheses(known, {f"{shard}-{i}": Seed(text, text) for i, text in enumerate(texts)}, number)
        (artifacts / "synthesis/synthetic_documents").mkdir(parents=True, exist_ok=True)
        rows.write_parquet(artifacts / f"synthesis/synthetic_documents/{shard}.parquet")
    result, table = materialise(artifacts, WORLD.source)
    outcomes = {e.check_name: e.passed for e in result.get_asset_check_evaluations()}
    assert outcomes == {
        "unknown_facts_are_at_chance": knows != "everything",
        "restated_facts_are_above_chance": knows != "nothing",
        "posterior_table_is_valid": True,
    }
    assert row(table, "new")["statements"] > 50
    [materialization] = result.asset_materializations_for_node("synthesis__posterior_predictive")
    metadata = {key: value.value for key, value in materialization.metadata.items()}
    assert metadata["new_known_accuracy"] == row(table, "new_known")["accuracy"]
    assert metadata["preview"] == table_preview(table)
    [spec] = quality_assets.posterior_predictive(tiny_settings(artifacts)).specs
    columns = spec.metadata["dagster/column_schema"].columns
    assert [column.name for column in columns] == table.columns


def test_without_a_known_truth_the_table_is_empty(artifacts: Path):
    for shard in SHARD_KEYS:
        path = artifacts / f"synthesis/synthetic_documents/{shard}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame({"seed_id": [f"{shard}-0"], "text": ["Some text."]}).write_parquet(path)
    result, table = materialise(artifacts, FilesSource(path="here"))
    assert table.is_empty() and table.schema == POSTERIOR_SCHEMA
    assert all(e.passed for e in result.get_asset_check_evaluations())


def materialise(store: Path, source: ConceptsSource | FilesSource) -> tuple[dg.ExecuteInProcessResult, pl.DataFrame]:
    settings = tiny_settings(store, {"experiment.corpus.source": source, "deployment.data_dir": str(store)})

    def upstream(stage: str, name: str, manager: str, partitions: dg.PartitionsDefinition | None) -> dg.AssetSpec:
        return dg.AssetSpec([stage, name], partitions_def=partitions).with_io_manager_key(manager)

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [
                upstream("corpus", "tokens", "directory", shards(settings)),
                upstream("corpus", "tokenizer", "directory", None),
                upstream("synthesis", "synthetic_documents", "parquet", shards(settings)),
                *only(quality_assets, checks, settings, "posterior_predictive"),
            ],
            instance=instance,
            resources=build_resources(settings),
            selection=dg.AssetSelection.assets(["synthesis", "posterior_predictive"]),
        )
    return result, pl.read_parquet(store / "synthesis/posterior_predictive.parquet")
