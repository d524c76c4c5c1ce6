"""The catalogue: an entry that cannot be used disables itself alone, and says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.memory_by_method import GPT_OSS_20B, QWEN3_30B
from shared.errors import Invalid, NotFound, NotYet
from shared.settings import Settings
from shared.settle.catalogue import SMOLLM2, Catalogue, load_catalogue
from shared.settle.model_facts import facts_of
from shared.settle.wanted_models import HubAnswer

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
# As published: the language model's numbers lie one level down.
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
# Three plain layers before those with experts, of which one is shared.
DEEPSEEK_LIKE: dict[str, Any] = {
    **GOOD,
    "num_hidden_layers": 5,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
}


def catalogue(folder: Path, text: str, config: Any = GOOD) -> Catalogue:
    (folder / "good").mkdir(exist_ok=True)
    (folder / "good" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    file = folder / "models.toml"
    file.write_text(f'[models.good]\nsource = "path"\npath = "{folder / "good"}"\n{text}')
    return load_catalogue(Settings(models_file=file))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "source must be"),
        ('source = "cloud"', "not 'cloud'"),
        ('source = "path"\npath = "/nowhere"', "does not exist"),
        ('source = "hub"\nrepository = "a/b"\nrevision = "main"\nconfig = {}', "a branch can move"),
        ('source = "hub"', "'owner/name'"),
        ('source = "hub"\nrepository = "../../b"', "'owner/name'"),
        ('source = "hub"\nrepository = "a/b"\nrevision = "-x"', "a branch, a tag or a commit"),
        (f'source = "hub"\nrepository = "a/b"\nrevision = "{"0" * 40}"\nconfig = 3', "config.json"),
        (f'source = "hub"\nrepository = "a/b"\nrevision = "{"0" * 40}"\nconfig = {{architectures = ["X"]}}', "hidden"),
    ],
)
def test_a_bad_entry_disables_itself_alone_and_says_why(tmp_path: Path, entry: str, says: str) -> None:
    found = catalogue(tmp_path, f"[models.bad]\n{entry}\n")

    assert found.names() == ["good", SMOLLM2.ref.name]
    assert says in found.complaints()["bad"]
    with pytest.raises(Invalid, match="cannot be used") as refused:
        found.entry("bad")
    assert says in refused.value.message
    assert (refused.value.param, refused.value.code) == ("model", "base_model_misconfigured")


@pytest.mark.parametrize("config", ["", "[]", "{", "null", '{"architectures": 3}', "[" * 100_000, '{"a": 1e999}'])
def test_a_config_of_any_content_disables_its_own_entry_alone(tmp_path: Path, config: str) -> None:
    found = catalogue(tmp_path, "", config)

    assert found.names() == [SMOLLM2.ref.name]
    assert set(found.complaints()) == {"good"}


@pytest.mark.parametrize("value", [-1, 0, "many", [], {}, 10**30, 1e308])
@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_none_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(Invalid, match=rf"config\.json lacks or misstates '{key}'"):
        facts_of({**GOOD, key: value}, name="bad")


@pytest.mark.parametrize("value", ["many", [1, 2], {"a": 1}, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "key",
    [
        *("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "num_parameters"),
        *("num_experts", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace", "decoder_sparse_step"),
        *("architectures", "hidden_size"),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_key_and_never_in_pythons_words(key: str, value: Any) -> None:
    with pytest.raises(Invalid) as refused:
        facts_of({**GOOD, "num_experts": 4, key: value}, name="bad")
    assert refused.value.message.startswith(f"Model 'bad': its config.json lacks or misstates '{key}', which is ")


@pytest.mark.parametrize("key", ["intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_a_size_below_nothing_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(Invalid, match=f"misstates '{key}', which is -1"):
        facts_of({**GOOD, key: -1}, name="bad")


@pytest.mark.parametrize("config", [[], None, 3, "x"])
def test_a_config_that_is_no_object_is_refused_as_that(config: Any) -> None:
    with pytest.raises(Invalid, match="it is no object"):
        facts_of(config, name="bad")


@pytest.mark.parametrize("text", ["models = 3", "aliases = []", "not toml", "[models", "x = '\x00'"])
def test_a_file_that_is_not_understood_leaves_the_built_in_model(tmp_path: Path, text: str) -> None:
    file = tmp_path / "models.toml"
    file.write_text(text)

    found = load_catalogue(Settings(models_file=file))

    assert found.names() == [SMOLLM2.ref.name]
    assert "is not understood" in found.complaints()["models.toml"]
    with pytest.raises(NotFound, match="is not understood"):
        found.entry("house-model")


def test_a_file_that_is_named_and_is_not_there_is_told(tmp_path: Path) -> None:
    found = load_catalogue(Settings(models_file=tmp_path / "none.toml"))

    assert found.names() == [SMOLLM2.ref.name]
    assert "does not exist" in found.complaints()["models.toml"]


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    assert "cannot be read" in load_catalogue(Settings(models_file=tmp_path)).complaints()["models.toml"]


def test_an_empty_name_of_the_file_is_like_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEPOOL_MODELS_FILE", "")
    monkeypatch.setenv("TUNEPOOL_HOME", str(tmp_path))

    assert Settings().models_file is None
    assert load_catalogue(Settings()).complaints() == {}


def test_a_bad_alias_disables_itself_alone(tmp_path: Path) -> None:
    found = catalogue(tmp_path, '[aliases]\nlost = "nowhere"\nodd = 3\nfine = "good"\n')

    assert found.find("fine").name == "good"
    assert set(found.complaints()) == {"lost", "odd"}
    with pytest.raises(Invalid, match="no model of this catalogue"):
        found.entry("lost")


def test_an_alias_of_a_bad_entry_tells_the_entrys_reason(tmp_path: Path) -> None:
    found = catalogue(tmp_path, '[models.bad]\nsource = "path"\npath = "/nowhere"\n[aliases]\nnice = "bad"\n')

    assert "nice" not in found.names()
    with pytest.raises(Invalid, match="does not exist"):
        found.entry("nice")


def test_an_entry_whose_folder_arrives_later_is_used_without_touching_the_file(tmp_path: Path) -> None:
    found = catalogue(tmp_path, "", "{")
    assert "good" in found.problems

    (tmp_path / "good" / "config.json").write_text(json.dumps(GOOD))

    assert load_catalogue(Settings(models_file=tmp_path / "models.toml")).find("good").facts.hidden_size == 64


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    catalogue(tmp_path, "")
    (tmp_path / "models.toml").chmod(0)
    os.utime(tmp_path / "models.toml", ns=(1, 1))

    assert (
        "cannot be read" in load_catalogue(Settings(models_file=tmp_path / "models.toml")).complaints()["models.toml"]
    )


def test_numbers_of_a_nested_language_model_are_found() -> None:
    facts = facts_of(GEMMA, name="gemma")

    assert (facts.hidden_size, facts.num_hidden_layers, facts.head_dim) == (2560, 34, 256)
    assert facts.architecture == "Gemma3ForConditionalGeneration"
    assert facts.tie_word_embeddings
    assert facts.parameters == pytest.approx(3.88e9, rel=0.01)  # 4.3e9 with the vision tower


@pytest.mark.parametrize(
    ("config", "parameters"),
    [pytest.param(QWEN3_30B, 30.53e9, id="qwen3-30b-a3b"), pytest.param(GPT_OSS_20B, 20.91e9, id="gpt-oss-20b")],
)
def test_experts_are_counted(config: dict[str, Any], parameters: float) -> None:
    assert facts_of(config, name="x").parameters == pytest.approx(parameters, rel=0.005)


def test_plain_layers_and_shared_experts_are_counted_as_they_are() -> None:
    attention = 5 * 4 * 64 * 64
    plain = 3 * 3 * 64 * 256
    experts = 2 * (3 * 64 * 32 * (8 + 1) + 64 * 8)

    assert facts_of(DEEPSEEK_LIKE, name="x").parameters == attention + plain + experts + 2 * 100 * 64


PENDING = '[models.far]\nsource = "hub"\nrepository = "a/b"\n[aliases]\n"gpt" = "far"\n'


def far(folder: Path) -> Catalogue:
    return catalogue(folder, PENDING)


@pytest.mark.parametrize("name", ["far", "gpt", "a/b", "A/B"])
def test_a_hubs_entry_without_facts_is_not_ready_yet_and_disturbs_no_other(tmp_path: Path, name: str) -> None:
    found = far(tmp_path)

    assert found.names() == ["good", SMOLLM2.ref.name]
    assert found.complaints() == {}
    with pytest.raises(NotYet, match="a/b at revision main") as refused:
        found.find(name)
    assert refused.value.code == "base_model_resolving"


def test_a_model_is_known_by_what_it_is_made_of_as_long_as_no_other_is_made_of_the_same(tmp_path: Path) -> None:
    one = catalogue(tmp_path, "")

    assert one.find("huggingfacetb/smollm2-135M-instruct") == one.find("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert one.find("HuggingFaceTB/SmolLM2-135M-Instruct") == SMOLLM2.ref
    assert one.name_of(one.entry("good").locator) == "good", "a folder"
    several = catalogue(tmp_path, PENDING + '[models.near]\nsource = "hub"\nrepository = "a/b"\nrevision = "old"\n')
    with pytest.raises(NotFound, match=r"'a/b' is not in .* Known base models: far, near\."):
        several.find("a/b")


def test_an_alias_goes_before_a_repository_of_the_same_name(tmp_path: Path) -> None:
    assert catalogue(tmp_path, PENDING + '"a/b" = "good"\n').find("a/b").name == "good"


def test_of_many_models_a_refusal_names_those_that_are_most_like_what_was_asked_for(tmp_path: Path) -> None:
    aliases = "".join(f'"gpt-{size}b-instruct" = "good"\n' for size in range(1, 41))
    many = catalogue(tmp_path, f'[aliases]\n"llama-3.1-8b" = "good"\n{aliases}')

    with pytest.raises(NotFound, match=r"Of 43 known base models the nearest: llama-3\.1-8b, ") as refused:
        many.find("Llama-3.1-8b")
    assert len(refused.value.message) < 500


def test_what_was_found_at_the_hub_makes_the_entry_one_of_the_commit(tmp_path: Path) -> None:
    found = far(tmp_path)
    answer = HubAnswer(commit="1" * 40, config=json.dumps(GOOD))

    base = found.with_answers({found.pending["far"].key: answer}).find("gpt")

    assert (base.name, base.public_name, base.source, base.revision) == ("far", "a/b", "hub", "1" * 40)
    assert base.facts == facts_of(GOOD, name="far")
    assert "far" in found.pending, "the file's own catalogue is shared, and stays as it is"


@pytest.mark.parametrize(
    "answer",
    [
        HubAnswer(refused="It is gated."),
        *(HubAnswer(commit="1" * 40, config=text) for text in ("", "[]", "{}", "[" * 9999)),
    ],
)
def test_an_answer_that_is_no_model_disables_its_entry_alone(tmp_path: Path, answer: HubAnswer) -> None:
    found = far(tmp_path)
    completed = found.with_answers({found.pending["far"].key: answer})

    assert completed.names() == ["good", SMOLLM2.ref.name]
    assert set(completed.complaints()) == {"far"}
    with pytest.raises(Invalid, match="cannot be used"):
        completed.find("gpt")
