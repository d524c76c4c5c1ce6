"""Tuned models as GGUF files: read back by transformers, and by llama.cpp where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from shared.contract.merge_request import CreateExport
from shared.errors import Invalid
from tests.train.test_merging import load, logits, make_adapter, make_merge_spec
from tests.train.tiny import make_model_directory, make_tokenizer, read_events
from worker.train.convert_gguf import convert
from worker.train.gguf_tokens import pre_tokenizer
from worker.train.product import make_product
from worker.train.to_gguf import export

MERGES: Final = [("Ġ", "p"), ("l", "e"), ("Ġp", "le"), ("a", "s"), ("as", "e"), ("Ġple", "ase"), ("u", "s"), ("7", "7")]
SHAPE: Final = {
    "vocab_size": 272,  # some rows more than there are tokens, as published models have
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TEXT: Final = "7 plus 77 please? Ein Spaß — 日本\n\n  x"


def with_merges(folder: Path) -> Path:
    """The tiny tokenizer with a few pairs: llama.cpp opens no file without."""
    plain = make_tokenizer()
    told = json.loads(plain.backend_tokenizer.to_str())
    for left, right in MERGES:
        told["model"]["vocab"][left + right] = len(told["model"]["vocab"])
    told["model"]["merges"] = [list(pair) for pair in MERGES]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = plain.chat_template
    fast.save_pretrained(folder)
    return folder


def make_base(folder: Path, config: Any) -> Path:
    return with_merges(make_model_directory(folder, config))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("gguf") / "base", LlamaConfig(**SHAPE, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("gguf") / "adapter", seed=1)


def make(tmp: Path, *, base: Path, adapter: Path, code: int = 0, **request: Any) -> Path:
    """The product of an export; `code` is what its program must end with."""
    wanted = CreateExport(adapter="ft:tiny", **{"format": "gguf", **request})
    spec = make_merge_spec(tmp, base=base, adapters=[adapter], request=wanted)
    assert make_product(export, spec_file=spec, out=tmp / "out") == code, read_events(tmp / "out")
    return tmp / "out" / "product"


def read_back(file: Path) -> Any:
    options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(file.parent, **options)


def tuned(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter)


def off(answer: torch.Tensor, expected: torch.Tensor) -> float:
    """By how much logits are off, as a part of their spread."""
    return float((answer - expected).std() / expected.std())


# By how much logits of this model may be off: the step of the format beside the spread of a block, over two layers.
@pytest.mark.parametrize(
    ("quantization", "most"),
    [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2), ("q5_0", 0.2), ("q4_0", 0.4), ("q4_k_m", 0.2)],
)
def test_a_model_read_back_from_gguf_answers_as_the_tuned_one_within_the_error_of_the_format(
    base: Path, adapter: Path, tmp_path: Path, quantization: str, most: float
) -> None:
    made = make(tmp_path, base=base, adapter=adapter, quantization=quantization)

    answer = logits(read_back(made / f"model-{quantization}.gguf"))

    expected = logits(tuned(base, adapter))
    assert off(answer, expected) < most
    assert off(logits(load(base)), expected) > 0.4, "the adapter matters more than any format"


WIDE_SHAPE: Final = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}


def test_q4_k_m_has_the_formats_of_llama_cpps_own_mix_and_answers_within_their_error(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**WIDE_SHAPE))
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)

    made = make(tmp_path, base=base, adapter=adapter, quantization="q4_k_m")

    reader = gguf.GGUFReader(made / "model-q4_k_m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    wide = [f"blk.{layer}.{part}.weight" for layer in (0, 3, 6, 7) for part in ("attn_v", "ffn_down")]
    assert {name for name, kind in kinds.items() if kind == "Q6_K"} == {"output.weight", *wide}
    assert {kind for name, kind in kinds.items() if kind not in {"Q6_K", "Q4_K"}} == {"F32"}
    assert all("norm" in name for name, kind in kinds.items() if kind == "F32")
    exact = make(tmp_path / "exact", base=base, adapter=adapter, quantization="f32")
    weights = read_back(exact / "model-f32.gguf").state_dict()
    stored = read_back(made / "model-q4_k_m.gguf").state_dict()
    assert max(off(stored[name], weight) for name, weight in weights.items() if weight.ndim > 1) < 0.1


FAMILIES: Final = {
    "a Llama with untied and biased weights": LlamaConfig(**SHAPE, attention_bias=True),
    "Mistral": MistralConfig(**SHAPE, sliding_window=None),
    "Qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "Qwen3": Qwen3Config(**SHAPE, head_dim=128),  # the reader knows no other width of heads
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_architecture_is_read_back_as_it_was(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", FAMILIES[family])
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)

    made = make(tmp_path, base=base, adapter=adapter, quantization="f32")

    answer = logits(read_back(made / "model-f32.gguf"))
    assert off(answer, logits(tuned(base, adapter))) < 1e-5


def test_the_tokenizer_and_its_template_are_in_the_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    made = make(tmp_path, base=base, adapter=adapter, quantization="f16")

    read = AutoTokenizer.from_pretrained(made, gguf_file="model-f16.gguf")

    ours = AutoTokenizer.from_pretrained(base)
    assert read(TEXT, add_special_tokens=False).input_ids == ours(TEXT, add_special_tokens=False).input_ids
    assert (read.eos_token, read.chat_template) == ("<|im_end|>", ours.chat_template)
    fields = gguf.GGUFReader(made / "model-f16.gguf").fields
    told = {name: field.contents() for name, field in fields.items()}
    assert (told["general.architecture"], told["tokenizer.ggml.pre"]) == ("llama", "gpt-2")
    assert told["tokenizer.ggml.tokens"][-1] == "[PAD271]"
    assert (told["tokenizer.ggml.add_bos_token"], told["general.base_model.0.name"]) == (False, "example/tiny")
    assert (made / "Modelfile").read_text().splitlines()[-1] == "FROM ./model-f16.gguf"


def test_a_slowed_frequency_and_a_window_are_written_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    slowed = make_base(tmp_path / "slowed", LlamaConfig(**SHAPE, rope_parameters=rope))
    model = load(slowed)
    adapter = make_adapter(slowed, tmp_path / "adapter", seed=1)

    made = make(tmp_path, base=slowed, adapter=adapter, quantization="f16")

    factors = next(tensor for tensor in _tensors(made / "model-f16.gguf") if tensor.name == "rope_freqs.weight").data
    plain = 1 / 10_000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


def test_a_file_promises_no_more_tokens_than_the_window_of_its_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", MistralConfig(**SHAPE, sliding_window=128))

    made = make(tmp_path, base=base, adapter=make_adapter(base, tmp_path / "adapter", seed=1), quantization="f16")

    fields = gguf.GGUFReader(made / "model-f16.gguf").fields
    assert fields["llama.context_length"].contents() == 128


def _tensors(file: Path) -> Any:
    return gguf.GGUFReader(file).tensors


@pytest.mark.parametrize(
    "shape",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"k_proj": 2}}],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_as_gguf_adds_what_peft_adds(base: Path, tmp_path: Path, shape: dict[str, Any]) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, **shape)

    made = make(tmp_path, base=base, adapter=adapter, format="gguf_lora", quantization="f32")

    assert (made / "Modelfile").read_text().splitlines()[-2:] == ["FROM ./base.gguf", "ADAPTER ./adapter-f32.gguf"]
    reader = gguf.GGUFReader(made / "adapter-f32.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert (told["general.type"], told["adapter.type"], told["general.architecture"]) == ("adapter", "lora", "llama")
    added = _added(reader, alpha=told["adapter.lora.alpha"])
    expected = make(tmp_path / "whole", base=base, adapter=adapter, quantization="f32") / "model-f32.gguf"
    plain = make(tmp_path / "none", base=base, adapter=_zero(base, tmp_path / "zero"), quantization="f32")
    before = {tensor.name: tensor.data for tensor in _tensors(plain / "model-f32.gguf")}
    changed = {
        t.name: t.data - before[t.name] for t in _tensors(expected) if not np.array_equal(t.data, before[t.name])
    }
    assert set(added) == set(changed)
    for name, update in changed.items():
        np.testing.assert_allclose(added[name], update, atol=1e-6)


def _zero(base: Path, folder: Path) -> Path:
    made = make_adapter(base, folder, seed=1)
    file = made / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 0}))
    return made


def _added(reader: Any, *, alpha: float) -> dict[str, Any]:
    """What llama.cpp adds to each weight: alpha / rank * B @ A, and the rank is that of B."""
    matrices = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {name.removesuffix(".lora_a") for name in matrices if name.endswith(".lora_a")}
    return {
        name: alpha / matrices[f"{name}.lora_b"].shape[1] * matrices[f"{name}.lora_b"] @ matrices[f"{name}.lora_a"]
        for name in names
    }


def test_what_llama_cpp_has_no_place_for_is_refused_by_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(base).backend_tokenizer
    told = json.loads(words.to_str())

    with pytest.raises(Invalid) as refused:
        pre_tokenizer({**told, "pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(Invalid):
        pre_tokenizer({**told, "normalizer": {"type": "Lowercase"}})

    assert refused.value.code == "tokenizer_not_exported"
    assert "BPE, Whitespace" in refused.value.message
    huge = make_base(tmp_path / "huge", LlamaConfig(**SHAPE))
    make_adapter(huge, tmp_path / "weights", seed=1)
    big = load(huge)
    big.lm_head.weight.data[3, 3] = 1e6
    big.save_pretrained(huge)
    make(tmp_path, base=huge, adapter=tmp_path / "weights", quantization="f16", code=3)
    assert read_events(tmp_path / "out")[-1].code == "quantization_too_narrow"


@pytest.mark.parametrize("library", ["xllamacpp", "llama_cpp"])
def test_llama_cpp_gives_the_same_greedy_text(base: Path, tmp_path: Path, library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed; llama-cpp-python builds from source")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1, use_rslora=True)
    whole = make(tmp_path / "whole", base=base, adapter=adapter, quantization="f32") / "model-f32.gguf"
    plain = make(tmp_path / "plain", base=base, adapter=_zero(base, tmp_path / "zero"), quantization="f32")
    lora = make(tmp_path / "lora", base=base, adapter=adapter, format="gguf_lora", quantization="f32")
    words = AutoTokenizer.from_pretrained(base)
    asked = words(TEXT, return_tensors="pt", add_special_tokens=False)
    tokens = tuned(base, adapter).generate(**asked, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    expected = words.decode(tokens[0, asked.input_ids.shape[1] :])

    answer = {"xllamacpp": _xllamacpp, "llama_cpp": _llama_cpp}[library]

    assert answer(whole) == (asked.input_ids.shape[1], expected)
    assert answer(plain / "model-f32.gguf", lora / "adapter-f32.gguf") == (asked.input_ids.shape[1], expected)
    assert answer(plain / "model-f32.gguf")[1] != expected, "the adapter matters"


TOKENS: Final = 16


def _xllamacpp(model: Path, lora: Path | None = None, *, text: str = TEXT) -> tuple[int, str]:
    """How many tokens llama.cpp makes of the text, and what it goes on with."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(model), 256, 1, False
    settings.cpuparams.n_threads = 1
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        settings.lora_adapters = [adapter]
    server = xllamacpp.Server(settings)
    asked = {"prompt": text, "max_tokens": TOKENS, "temperature": 0, "top_k": 1, "ignore_eos": True}
    answer = server.handle_completions(asked)
    return answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]


def _llama_cpp(model: Path, lora: Path | None = None) -> tuple[int, str]:
    import llama_cpp

    made = llama_cpp.Llama(str(model), lora_path=None if lora is None else str(lora), n_ctx=256, verbose=False)
    prompt = made.tokenize(TEXT.encode(), add_bos=False, special=False)
    tokens = [token for token, _ in zip(made.generate(prompt, temp=0.0), range(TOKENS), strict=False)]
    return len(prompt), made.detokenize(tokens).decode(errors="replace")


def test_a_conversion_takes_its_file_apart_once_and_gives_what_upstream_reads(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path, base=base, adapter=adapter, quantization="q8_0") / "model-q8_0.gguf"
    expected, plain_tokenizer = read_back(file), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    reader, opened = gguf.GGUFReader, list[Any]()
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: opened.append(path) or reader(path))
    counting = gguf.GGUFReader

    convert(file, out=tmp_path / "plain")

    assert len(opened) == 1
    assert gguf.GGUFReader is counting, "upstream is left as it was"
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    assert converted.keys() == expected.state_dict().keys()
    assert all(torch.equal(converted[name], weight.bfloat16()) for name, weight in expected.state_dict().items())
    words = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert words(TEXT)["input_ids"] == plain_tokenizer(TEXT)["input_ids"]
