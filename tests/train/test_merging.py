"""Products made without training: merged models and combined adapters, each equal to what it stands for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

from examples import serving
from shared.contract.events import EXIT_OUT_OF_MEMORY
from shared.contract.merge_request import CreateCombination, CreateMerge, MergeSpec
from shared.contract.spec import AttemptSpec
from tests.patience import patience
from tests.train.tiny import make_model_directory, make_spec, read_events
from worker.train.base_model import keep_training_layout
from worker.train.combine import combine
from worker.train.merge import merge
from worker.train.product import make_product

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)


def tokens() -> torch.Tensor:
    return torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(tokens()).logits.float()


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


def make_adapter(base: Path, folder: Path, *, seed: int, weights_seed: int | None = None, **config: Any) -> Path:
    """An adapter with weights that matter: PEFT starts B at zero, which would make every test pass."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(load(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def make_merge_spec(
    tmp: Path,
    *,
    base: Path,
    adapters: list[Path],
    request: CreateMerge | CreateCombination,
    limit: int | None = None,
) -> Path:
    job = AttemptSpec.model_validate_json(make_spec(tmp / "job", model=base).read_bytes()).job
    spec = MergeSpec(
        name="merge_1",
        request=request,
        job=job,
        base_model_path=str(base),
        adapter_paths=[str(one) for one in adapters],
        memory_limit_bytes=limit,
    )
    file = tmp / "spec.json"
    file.write_text(spec.model_dump_json(), encoding="utf-8")
    return file


def run_merge(tmp: Path, *, base: Path, adapter: Path, onto: Any) -> Path:
    request = CreateMerge(adapter="ft:tiny", onto=onto)
    spec = make_merge_spec(tmp, base=base, adapters=[adapter], request=request)
    assert make_product(merge, spec_file=spec, out=tmp / "out") == 0
    return tmp / "out" / "product"


def combination(kind: Any, weights: tuple[float, ...] = (0.7, -0.4), **options: Any) -> CreateCombination:
    adapters = [{"adapter": f"ft:{number}", "weight": weight} for number, weight in enumerate(weights)]
    return CreateCombination.model_validate({"adapters": adapters, "combination_type": kind, **options})


def run_combination(tmp: Path, *, base: Path, adapters: list[Path], request: CreateCombination) -> Path:
    spec = make_merge_spec(tmp, base=base, adapters=adapters, request=request)
    assert make_product(combine, spec_file=spec, out=tmp / "out") == 0
    return tmp / "out" / "product"


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_model_and_the_adapter_on_its_base_agree(model: Path, tmp_path: Path, use_dora: bool) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1, use_dora=use_dora)

    merged = run_merge(tmp_path, base=model, adapter=adapter, onto="base")

    adapted = logits(PeftModel.from_pretrained(load(model), adapter))
    assert (adapted - logits(load(model))).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(logits(load(merged)), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_merged_onto_the_dequantised_base_agrees_with_the_adapter_on_4_bits(
    model: Path, tmp_path: Path, use_dora: bool
) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1, use_dora=use_dora)

    onto_4_bits = run_merge(tmp_path / "a", base=model, adapter=adapter, onto="dequantized")
    onto_base = run_merge(tmp_path / "b", base=model, adapter=adapter, onto="base")

    four_bit = load(model, quantization_config=NF4, device_map={"": "cpu"})
    keep_training_layout(four_bit)  # the trainer's arithmetic; the inference layout rounds to bfloat16
    seen_in_training = logits(PeftModel.from_pretrained(four_bit, adapter))
    torch.testing.assert_close(logits(load(onto_4_bits)), seen_in_training, atol=5e-3, rtol=5e-3)
    assert (logits(load(onto_base)) - seen_in_training).abs().max() > 0.05, "the choice must matter"


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_served_on_4_bits_answers_as_it_was_trained(model: Path, tmp_path: Path, use_dora: bool) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1, use_dora=use_dora)
    four_bit = load(model, quantization_config=NF4, device_map={"": "cpu"})
    keep_training_layout(four_bit)
    seen_in_training = logits(PeftModel.from_pretrained(four_bit, adapter))

    served = serving.load(model, {"tuned": adapter}, dtype=torch.float32, four_bit=NF4)

    with torch.inference_mode():
        for _ in range(2):  # bitsandbytes may change its layout at the first one
            torch.testing.assert_close(logits(served), seen_in_training, atol=0.05, rtol=0.05)


def test_a_merged_model_is_a_plain_directory_that_says_where_it_comes_from(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1)

    merged = run_merge(tmp_path, base=model, adapter=adapter, onto="dequantized")

    config = json.loads((merged / "config.json").read_text())
    manifest = json.loads((merged / "merge_manifest.json").read_text())
    assert "quantization_config" not in config
    assert {path.suffix for path in merged.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
    assert AutoTokenizer.from_pretrained(merged).chat_template
    assert manifest["request"]["onto"] == "dequantized"
    assert manifest["base_model"]["public_name"] == "example/tiny"
    assert "nf4" in (merged / "README.md").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in merged.glob("*.[jm][sd]*"))


def test_a_merge_that_ends_in_no_number_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    base = load(model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.nn.init.constant_(adapted.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight, torch.nan)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    request = CreateMerge(adapter="ft:tiny", onto="base")
    spec = make_merge_spec(tmp_path, base=model, adapters=[tmp_path / "adapter"], request=request)

    code = make_product(merge, spec_file=spec, out=tmp_path / "out")

    assert (code, read_events(tmp_path / "out")[-1].code) == (3, "merge_impossible")
    assert not (tmp_path / "out" / "product").exists()


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 8})])
def test_an_exact_combination_is_the_weighted_sum_of_the_updates(
    model: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    one = make_adapter(model, tmp_path / "one", seed=1)
    two = make_adapter(model, tmp_path / "two", seed=2)

    made = run_combination(tmp_path, base=model, adapters=[one, two], request=combination(kind, **options))

    wanted = {name: 0.7 * update + -0.4 * updates(model, two)[name] for name, update in updates(model, one).items()}
    found = updates(model, made)
    for name, update in wanted.items():
        torch.testing.assert_close(found[name], update, atol=1e-5, rtol=1e-4)


def updates(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Module → what the adapter adds to its weight."""
    adapted = PeftModel.from_pretrained(load(base), adapter)
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("ties_svd", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("dare_ties_svd", {"density": 0.5}),
        ("dare_linear_svd", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.5}),
        ("magnitude_prune_svd", {"density": 0.5}),
    ],
)
def test_every_combination_makes_a_plain_adapter_and_the_same_one_again(
    model: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    adapters = [make_adapter(model, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]

    first, again = (
        run_combination(tmp_path / run, base=model, adapters=adapters, request=combination(kind, **options))
        for run in ("a", "b")
    )

    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("example/tiny", "0" * 40)
    answer = logits(PeftModel.from_pretrained(load(model), first))
    assert (answer - logits(load(model))).abs().max() > 1e-3
    assert torch.equal(answer, logits(PeftModel.from_pretrained(load(model), again)))


def test_one_adapter_of_weight_one_and_another_of_weight_zero_is_the_first_even_with_rank_stabilised_scale(
    model: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter(model, tmp_path / f"{seed}", seed=seed, use_rslora=True) for seed in (1, 2)]

    made = run_combination(tmp_path, base=model, adapters=adapters, request=combination("linear", (1.0, 0.0)))

    alone = logits(PeftModel.from_pretrained(load(model), adapters[0]))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(model), made)), alone, atol=1e-4, rtol=1e-4)


def test_adapters_of_different_ranks_are_refused_where_upstream_cannot(model: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(model, tmp_path / f"{rank}", seed=rank, r=rank) for rank in (2, 4)]
    spec = make_merge_spec(tmp_path, base=model, adapters=adapters, request=combination("linear"))

    assert make_product(combine, spec_file=spec, out=tmp_path / "out") == 3

    failure = read_events(tmp_path / "out")[-1]
    assert failure.code == "combination_impossible"
    assert "same r" in failure.message


def test_the_programs_run_by_argv_alone(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", seed=1)
    request = CreateMerge(adapter="ft:tiny", onto="base")
    spec = make_merge_spec(tmp_path, base=model, adapters=[adapter], request=request, limit=1_500_000_000)
    (tmp_path / "out").mkdir()

    argv = [sys.executable, "-m", "worker.train.merge", str(spec), str(tmp_path / "out")]
    subprocess.run(argv, check=True, capture_output=True, timeout=patience(120))

    assert (tmp_path / "out" / "product" / "model.safetensors").is_file()


def test_a_merge_that_its_limit_does_not_allow_ends_as_out_of_memory_and_says_what_it_held(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=260, hidden_size=1024, intermediate_size=12_288, num_hidden_layers=2)
    base = make_model_directory(tmp_path / "base", config)  # 340 MB
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    request = CreateMerge(adapter="ft:tiny", onto="base")
    spec = make_merge_spec(tmp_path, base=base, adapters=[adapter], request=request, limit=550_000_000)

    argv = [sys.executable, "-m", "worker.train.merge", str(spec), str(tmp_path / "out")]
    ended = subprocess.run(argv, check=False, capture_output=True, timeout=patience(120))

    assert ended.returncode == EXIT_OUT_OF_MEMORY, ended.stderr
    failure = read_events(tmp_path / "out")[-1]
    assert failure.code == "host_oom"
    assert failure.peak_memory_bytes > 200_000_000
    assert not (tmp_path / "out" / "product").exists()


def test_adapters_on_one_base_are_switched_scaled_and_disabled(model: Path, tmp_path: Path) -> None:
    places = {f"{seed}": make_adapter(model, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)}
    alone = {name: logits(PeftModel.from_pretrained(load(model), place)) for name, place in places.items()}

    served = serving.load(model, places, dtype=torch.float32)

    for name, expected in alone.items():
        with torch.inference_mode(), serving.using(served, name):
            torch.testing.assert_close(logits(served), expected)
    with serving.using(served, None):
        torch.testing.assert_close(logits(served), logits(load(model)))
    with serving.using(served, "2", scale=0.0):
        torch.testing.assert_close(logits(served), logits(load(model)))
    torch.testing.assert_close(logits(served), alone["1"])
