"""Answers of a resident model: what upstream's `generate` says, and what the merged model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.contract.generation import Ended, PlaygroundSpec, Question, Sampling
from shared.errors import Invalid
from tests.train.test_merging import load, make_adapter, run_merge
from tests.train.tiny import make_tokenizer
from worker.train.answer_text import Detokenizer, Sampler, StopStrings
from worker.train.answering import ModelRunner
from worker.train.resident import AdapterUnusable, ResidentModel, load_resident
from worker.train.tokenizer import load_tokenizer_of

ASKED = [{"role": "user", "content": "What is 2 plus 2?"}]
GREEDY = {"temperature": 0.0}


def speaker_of(model: Any, folder: Path, **limits: int) -> ModelRunner:
    sizes = {"answer_tokens": 24, "context_tokens": 512} | limits
    return ModelRunner(model, load_tokenizer_of(str(folder)), **sizes)


def question(number: int = 1, *, text: str | None = None, template: str | None = None, **sampling: Any) -> Question:
    return Question(
        number=number,
        messages=None if text is not None else ASKED,
        text=text,
        chat_template=template,
        sampling=Sampling(**(GREEDY | sampling)),
    )


def said_by(speaker: ModelRunner, asked: Question) -> tuple[str, Ended]:
    """An answer to its end: text and last word."""
    answer, _ = speaker.begin(asked)
    parts: list[Any] = []
    while answer.reason is None:
        parts += answer.step(speaker.forward)
    *pieces, ended = parts
    return "".join(piece.text for piece in pieces), ended


def resident(folder: Path, **values: Any) -> Any:
    return load_resident(PlaygroundSpec(base_model_path=str(folder), dtype="float32", channel=0, **values))


def test_a_greedy_answer_is_what_upstreams_generate_says(model: Path) -> None:
    base = resident(model, quantization=None)
    tokenizer = load_tokenizer_of(str(model))
    prompt = tokenizer.apply_chat_template(ASKED, return_tensors="pt", add_generation_prompt=True)["input_ids"]
    upstream = base.generate(prompt, max_new_tokens=24, do_sample=False, use_cache=True)[0, prompt.shape[1] :]

    text, ended = said_by(speaker_of(base, model), question())

    assert text == tokenizer.decode(upstream, skip_special_tokens=True)
    assert ended.completion_tokens == len(upstream)


def test_a_playground_with_an_adapter_says_what_the_merged_model_says(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1)
    merged = run_merge(tmp_path, base=model, adapter=adapter, onto="base")
    base = resident(model, quantization=None)
    alone, _ = said_by(speaker_of(base, model), question())
    kept, speaker = ResidentModel(base, kept=2), speaker_of(base, model)

    kept.need("adapter_1", adapter)
    with kept.speaking("adapter_1", 1.0) as tuned:
        speaker.use(tuned)
        text, _ = said_by(speaker, question())
    with kept.speaking(None, 1.0) as plain:
        speaker.use(plain)
        disabled, _ = said_by(speaker, question())

    assert text == said_by(speaker_of(load(merged).eval(), merged), question())[0]
    assert text != alone, "the adapter must matter"
    assert disabled == alone


def test_a_4_bit_base_is_the_one_that_training_multiplied_with(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1)
    merged = run_merge(tmp_path, base=model, adapter=adapter, onto="dequantized")
    base = resident(model, quantization={"bnb_4bit_compute_dtype": "float32"})
    kept, speaker = ResidentModel(base, kept=2), speaker_of(base, model)
    kept.need("adapter_1", adapter)

    with kept.speaking("adapter_1", 1.0) as tuned:
        speaker.use(tuned)
        text, _ = said_by(speaker, question())

    assert text == said_by(speaker_of(load(merged).eval(), merged), question())[0]


def test_adapters_that_take_turns_give_what_each_gives_alone(model: Path, tmp_path: Path) -> None:
    folders = {f"adapter_{n}": make_adapter(model, tmp_path / str(n), seed=n, use_dora=n == 2) for n in (1, 2, 3)}

    def alone(key: str, scale: float) -> str:
        base = resident(model, quantization=None)
        kept, speaker = ResidentModel(base, kept=1), speaker_of(base, model)
        kept.need(key, folders[key])
        with kept.speaking(key, scale) as tuned:
            speaker.use(tuned)
            return said_by(speaker, question())[0]

    base = resident(model, quantization=None)
    kept, speaker = ResidentModel(base, kept=2), speaker_of(base, model)  # three adapters: one is always let go
    running = {}
    for number, (key, scale) in enumerate([("adapter_1", 1.0), ("adapter_2", 1.0), ("adapter_3", 0.5)]):
        running[key, scale] = (speaker.begin(question(number))[0], [])
    while any(answer.reason is None for answer, _ in running.values()):
        for (key, scale), (answer, parts) in running.items():
            kept.need(key, folders[key])
            with kept.speaking(key, scale) as tuned:
                speaker.use(tuned)
                parts.extend(answer.step(speaker.forward) if answer.reason is None else [])

    told = {voice: "".join(part.text for part in parts[:-1]) for voice, (_, parts) in running.items()}
    assert told == {voice: alone(*voice) for voice in running}
    assert len(set(told.values())) == 3
    assert len(kept.held) == 2


def test_an_adapter_without_safetensors_is_refused_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    kept = ResidentModel(resident(model, quantization=None), kept=2)
    kept.need("adapter_1", make_adapter(model, tmp_path / "good", seed=1))
    (tmp_path / "bad").mkdir()

    with pytest.raises(AdapterUnusable, match="safetensors"):
        kept.need("adapter_2", tmp_path / "bad")

    assert kept.held == ["adapter_1"]


def test_an_answer_ends_at_its_length_at_the_end_of_turn_and_at_a_stop_string(model: Path) -> None:
    base = resident(model, quantization=None)
    speaker = speaker_of(base, model)
    text, ended = said_by(speaker, question(max_tokens=12))
    assert (ended.finish_reason, ended.completion_tokens) == ("length", 12)

    stop = text[3:5]
    cut, ended = said_by(speaker, question(max_tokens=12, stop=[stop]))
    assert cut == text[: text.index(stop)]
    assert ended.finish_reason == "stop"

    first = int(speaker.forward(speaker._prompts.tokens(question()), None)[0].argmax())
    with torch.no_grad():
        base.generation_config.eos_token_id = [first]
    nothing, ended = said_by(speaker_of(base, model), question())
    assert (nothing, ended.finish_reason, ended.completion_tokens) == ("", "stop", 1)


def test_a_templates_end_of_turn_ends_an_answer_too(model: Path) -> None:
    speaker = speaker_of(resident(model, quantization=None), model)
    control = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    plain = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '@@' }}{% endfor %}"

    tokens, texts = speaker._prompts.ends(question(template=control))
    assert make_tokenizer().convert_tokens_to_ids("<|end|>") in tokens
    assert texts == []
    assert speaker._prompts.ends(question(template=plain))[1] == ["@@"]
    assert speaker._prompts.ends(question(text="x"))[1] == []


def test_what_does_not_fit_into_the_context_is_refused_with_both_figures(model: Path) -> None:
    speaker = speaker_of(resident(model, quantization=None), model, context_tokens=60)

    with pytest.raises(Invalid, match=r"has 60 tokens here; the prompt has \d+ and 50 are") as caught:
        speaker.begin(question(max_tokens=50))

    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_the_same_seed_draws_the_same_tokens_and_another_one_others() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))

    def drawn(seed: int, **values: Any) -> list[int]:
        sampler = Sampler(Sampling(seed=seed, **values))
        return [sampler.pick(logits) for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1, top_p=0.01))) == 1
    assert drawn(1, temperature=0.0) == [int(logits.argmax())] * 20
    assert len(set(drawn(1, temperature=0.0, frequency_penalty=2.0))) > 1


def test_text_comes_in_whole_characters_and_none_is_lost() -> None:
    tokenizer = make_tokenizer()
    text = "Grüße, 世界 🙂!"
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert "".join(pieces) + detokenizer.flush() == text
    assert "\ufffd" not in "".join(pieces)
    half = Detokenizer(tokenizer)
    assert [half.push(token) for token in tokenizer("é", add_special_tokens=False)["input_ids"][:1]] == [""]
    assert half.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "met"),
    [
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", "ough"], "one ENough", False),
        (["\n\n", "User:"], ["a\n", "b", "\n", "\nUser:"], "a\nb", True),
        (["aab"], ["aa", "ab"], "a", True),
        ([], ["as it is"], "as it is", False),
    ],
)
def test_a_stop_string_is_cut_out_wherever_the_pieces_break(
    stops: list[str], pieces: list[str], shown: str, met: bool
) -> None:
    strings = StopStrings(stops)

    text = "".join(map(strings.push, pieces)) + strings.flush()

    assert (text, strings.is_met()) == (shown, met)
