"""RoPE scaling: the factor, the frequencies, what is refused, how the setting travels, and what it is for."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stagewise.arguments import LoraArguments, ModelArguments, parse_arguments
from stagewise.errors import InputError
from stagewise.modeling.actor_critic import load_actor_critic
from stagewise.modeling.generation import Sampling, generate, load_for_inference, score
from stagewise.modeling.loading import (
    load_causal_lm,
    load_config,
    load_reference,
    load_reward_model,
    load_tokenizer,
    prompt_limit,
    row_limit,
)
from stagewise.modeling.rope_scaling import (
    KINDS,
    RopeRequest,
    config_of_adapter,
    hold_frequencies,
    max_positions,
    rope_setting,
    scale_rope,
)
from tests.stages import FULL, LORA, run_pt, run_rm, run_sft

THETA, ORIGINAL, LENGTH, FACTOR = 20_000.0, 128, 512, 4.0
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": ORIGINAL, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WITH_HEAD_DIM = {"qwen3", "glm4", "gemma", "gemma3_text"}  # whose heads are not hidden_size / heads wide unless told
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "phi", "glm4", "gemma", "gemma3_text", "olmo3")


def config_of(name: str, **changes):
    """A tiny configuration of an architecture, for ORIGINAL positions."""
    heads = {"head_dim": 16} if name in WITH_HEAD_DIM else {}
    experts = {"num_local_experts": 2} if name == "mixtral" else {}
    return CONFIG_MAPPING[name](**(SIZES | heads | experts | changes))


def llama(**changes) -> LlamaConfig:
    return config_of("llama", **({"rope_parameters": {"rope_type": "default", "rope_theta": THETA}} | changes))


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def row(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0]


def frequencies(model) -> torch.Tensor:
    return model.get_decoder().rotary_emb.inv_freq


# The factor


@pytest.mark.parametrize(
    ("original", "length", "factor"),
    [(2048, 8192, 4.0), (2048, 5000, 3.0), (2048, 2049, 2.0), (4096, 131_072, 32.0), (2048, 4096, 2.0)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_rounded_up(kind, original, length, factor):
    config = llama(max_position_embeddings=original)
    scaled = scale_rope(config, kind, length)
    positions = original if kind == "dynamic" else int(original * factor)
    assert scaled.rope_parameters["factor"] == factor
    assert scaled.rope_parameters["rope_theta"] == THETA
    assert (scaled.max_position_embeddings, type(scaled.max_position_embeddings)) == (positions, int)
    assert max_positions(scaled) == original * factor
    assert rope_setting(scaled) == {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": original,
        "max_position_embeddings": positions,
    }
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": THETA}  # a copy was scaled
    assert rope_setting(config) is None


# The frequencies, by the formulas


def unscaled(dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def linear(dim: int, length: int) -> list[float]:
    return [f / FACTOR for f in unscaled(dim, THETA)]


def dynamic(dim: int, length: int) -> list[float]:
    stretch = max(1.0, FACTOR * length / ORIGINAL - (FACTOR - 1))
    return unscaled(dim, THETA * stretch ** (dim / (dim - 2)))


def llama3(dim: int, length: int) -> list[float]:
    def scale(f: float) -> float:
        wavelength = 2 * math.pi / f
        if wavelength < ORIGINAL / 4:
            return f
        if wavelength > ORIGINAL / 1:
            return f / FACTOR
        smooth = (ORIGINAL / wavelength - 1) / (4 - 1)
        return (1 - smooth) * f / FACTOR + smooth * f

    return [scale(f) for f in unscaled(dim, THETA)]


def yarn(dim: int, length: int) -> list[float]:
    """arXiv 2309.00071: dimensions that turn more than 32 times within the original length stay, those that turn less
    than once are divided, with a ramp between the two."""

    def where_it_turns(times: float) -> float:
        return dim * math.log(ORIGINAL / (times * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(where_it_turns(32)), 0), min(math.ceil(where_it_turns(1)), dim - 1)
    shares = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return [f * (1 - share) + f / FACTOR * share for f, share in zip(unscaled(dim, THETA), shares, strict=True)]


FORMULAS = {"linear": linear, "dynamic": dynamic, "llama3": llama3, "yarn": yarn}


@pytest.mark.parametrize("length", [100, 300, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
def test_the_frequencies_are_those_of_the_formula(kind, length):
    scaled = scale_rope(llama(), kind, LENGTH)
    model = model_of(scaled)
    logits(model, row(length))
    wanted = torch.tensor(FORMULAS[kind](16, length))
    torch.testing.assert_close(frequencies(model), wanted)
    theirs, attention = ROPE_INIT_FUNCTIONS[kind](scaled, seq_len=length)
    torch.testing.assert_close(theirs, wanted)
    assert attention == pytest.approx(0.1 * math.log(FACTOR) + 1 if kind == "yarn" else 1.0)
    assert model.get_decoder().rotary_emb.attention_scaling == attention
    assert frequencies(model).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_rotated_in_part_keeps_its_share(kind):
    """Phi rotates half of each head of 16: 8 dimensions, 4 frequencies."""
    config = config_of(
        "phi", rope_parameters={"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
    )
    model = model_of(scale_rope(config, kind, LENGTH))
    logits(model, row(LENGTH))
    torch.testing.assert_close(frequencies(model), torch.tensor(FORMULAS[kind](8, LENGTH)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scaled_and_saved(name, kind, tmp_path):
    config = config_of(name)
    scaled = scale_rope(config, kind, LENGTH)
    plain, model = model_of(config), model_of(scaled)
    ids = row(300)
    found = logits(model, ids)
    assert found.isfinite().all()
    assert (found - logits(plain, ids)).abs().max() > 1e-5
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert rope_setting(reloaded.config) == rope_setting(scaled)
    assert reloaded.config.rope_parameters == scaled.rope_parameters
    torch.testing.assert_close(logits(reloaded, ids), found, rtol=0, atol=0)


def test_mixtral_gets_the_head_dim_that_its_configuration_leaves_out():
    assert config_of("mixtral").head_dim is None
    assert scale_rope(config_of("mixtral"), "yarn", LENGTH).head_dim == 16


def test_types_of_layers_are_scaled_each_but_for_short_windows():
    """Gemma 3 has a theta for each type; tokens of a window of 64 are never 128 apart."""
    config = config_of("gemma3_text", sliding_window=64)
    ropes = scale_rope(config, "linear", LENGTH).rope_parameters
    assert ropes == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 4.0},
    }
    ropes = scale_rope(config_of("gemma3_text", sliding_window=256), "yarn", LENGTH).rope_parameters
    assert {name: rope["rope_type"] for name, rope in ropes.items()} == dict.fromkeys(ropes, "yarn")
    assert ropes["sliding_attention"]["rope_theta"] == 10_000.0
    assert ropes["sliding_attention"]["original_max_position_embeddings"] == ORIGINAL


# Scaled already


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_never_stacks(kind):
    once = scale_rope(llama(), kind, LENGTH)
    again = scale_rope(once, kind, LENGTH)
    assert (again.rope_parameters, rope_setting(again)) == (once.rope_parameters, rope_setting(once))
    reloaded = type(once).from_dict(json.loads(once.to_json_string()))
    longer = scale_rope(reloaded, kind, 1000)
    assert rope_setting(longer) == rope_setting(scale_rope(llama(), kind, 1000))
    assert longer.rope_parameters["factor"] == 8.0
    other = next(k for k in KINDS if k != kind)
    with pytest.raises(InputError, match=f"--rope_scaling {other}: the model has RoPE of type {kind} already"):
        scale_rope(once, other, 2 * LENGTH)
    with pytest.raises(InputError, match=r"reaches 512 positions already.*enough for 256.*leave the flag out"):
        scale_rope(once, kind, 256)


def test_llama_3_1_counts_from_its_own_original_length_and_keeps_its_bands():
    """Its factor of 8 on 8192 is good for 131072 positions, by its makers; 262144 / 8192 is 32."""
    bands = {"low_freq_factor": 2.0, "high_freq_factor": 8.0}
    own = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5, **bands}
    config = llama(max_position_embeddings=131_072, rope_parameters=dict(own))
    assert rope_setting(config)["factor"] == 8.0
    longer = scale_rope(config, "llama3", 262_144)
    assert longer.rope_parameters == {**own, "factor": 32.0}
    assert longer.max_position_embeddings == 262_144
    with pytest.raises(InputError, match="reaches 131072 positions already"):
        scale_rope(config, "llama3", 131_072)


def written(folder: Path, **values) -> str:
    """A config.json as transformers 4 wrote them."""
    content = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": THETA} | values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def test_configurations_of_transformers_4(tmp_path):
    arguments = {"rope_scaling": "dynamic", "model_max_length": LENGTH}
    name = written(tmp_path / "dynamic", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert max_positions(load_config(ModelArguments(name))) == 256
    found = load_config(ModelArguments(name, **arguments))
    assert (found.rope_parameters["factor"], found.rope_parameters["rope_theta"]) == (4.0, THETA)

    name = written(tmp_path / "plain", rope_scaling=None)
    assert rope_setting(load_config(ModelArguments(name, **arguments)))["factor"] == 4.0

    name = written(tmp_path / "linear", rope_scaling={"type": "linear", "factor": 2.0})
    assert rope_setting(load_config(ModelArguments(name))) == {
        "rope_type": "linear",
        "factor": 2.0,
        "original_max_position_embeddings": None,
        "max_position_embeddings": 128,
    }
    with pytest.raises(InputError, match=r"does not say from how many positions; add original_max_position_embedd"):
        load_config(ModelArguments(name, rope_scaling="linear", model_max_length=LENGTH))
    name = written(
        tmp_path / "known", rope_scaling={"type": "linear", "factor": 2.0}, original_max_position_embeddings=64
    )
    assert (
        load_config(ModelArguments(name, rope_scaling="linear", model_max_length=LENGTH)).rope_scaling["factor"] == 8
    )


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(), "bloom has no rope_parameters to scale: its positions are not rotary"),
        (GPT2Config(), "gpt2 has no rope_parameters"),
        (OPTConfig(), "opt has no rope_parameters"),
        (GPTJConfig(), "gptj has no rope_parameters.*a way of its own"),
        (FalconConfig(alibi=True), "falcon has no rope_parameters"),
        (Phi3Config(), "phi3 does not take it"),
        (LlamaConfig(max_position_embeddings=8192), "made for 8192 positions, enough for 8192; leave the flag out"),
        (LlamaConfig(max_position_embeddings=16_384), "made for 16384 positions, enough for 8192"),
        (CONFIG_MAPPING["gemma4_text"](), "RoPE of type proportional already"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_scaled(kind, config, message):
    with pytest.raises(InputError, match=f"--rope_scaling {kind}: .*{message}"):
        scale_rope(config, kind, 8192)


def test_other_scalings_are_left_alone():
    own = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    config = CONFIG_MAPPING["phi3"](**SIZES, original_max_position_embeddings=ORIGINAL, rope_parameters=own)
    with pytest.raises(InputError, match="RoPE of type longrope already"):
        scale_rope(config, "linear", LENGTH)
    assert rope_setting(config)["rope_type"] == "longrope"
    assert rope_setting(CONFIG_MAPPING["gemma4_text"]()) is None  # a type, and not a scaling
    assert max_positions(BloomConfig()) is None


def test_code_that_does_not_follow_its_configuration_is_an_error(tmp_path):
    """RecurrentGemma has rope_parameters, and frequencies of its own."""
    config = CONFIG_MAPPING["recurrent_gemma"](**(SIZES | {"head_dim": 16, "lru_width": 32}))
    config.save_pretrained(tmp_path)
    arguments = ModelArguments(config_name=str(tmp_path), rope_scaling="linear", model_max_length=LENGTH)
    with pytest.raises(InputError, match="RecurrentGemmaForCausalLM does not follow the rope_parameters"):
        load_causal_lm(arguments, [None] * 64, True)


def test_the_flag():
    needed = ["--model_name_or_path", "m"]
    for kind in KINDS:
        for spelling in ("--model_max_length", "--max_length"):
            argv = [*needed, "--rope_scaling", kind, spelling, "4096"]
            assert parse_arguments(ModelArguments, argv=argv)[0].rope_scaling == kind
    with pytest.raises(
        InputError, match="--rope_scaling: found 'su', expected one of .*linear.*dynamic.*yarn.*llama3"
    ):
        parse_arguments(ModelArguments, argv=[*needed, "--rope_scaling", "su"])


def test_lengths_of_rows_and_prompts_follow_the_scaled_positions(tmp_path):
    name = written(tmp_path)
    for kind in KINDS:
        arguments = ModelArguments(name, rope_scaling=kind, model_max_length=300)  # a factor of 3: 384 positions
        assert row_limit(arguments, arguments.model_max_length) == 300
        assert prompt_limit(arguments, None, 100) == 200
        assert prompt_limit(arguments, 200, 100) == 200
        with pytest.raises(InputError, match="301: more than --model_max_length 300"):
            row_limit(arguments, 301)
        with pytest.raises(InputError, match="385: the model was made for 384 positions"):
            row_limit(arguments, 385)
        with pytest.raises(InputError, match="--max_prompt_length 201 it is more than the 300 tokens of --model_max"):
            prompt_limit(arguments, 201, 100)
    assert row_limit(ModelArguments(name), None) == 128
    assert prompt_limit(ModelArguments(name, model_max_length=100), None, 30) == 70
    with pytest.raises(InputError, match="129: the model was made for 128 positions.*--rope_scaling"):
        row_limit(ModelArguments(name), 129)
    with pytest.raises(InputError, match="^--rope_scaling linear: needs --model_max_length"):
        load_config(ModelArguments(name, rope_scaling="linear"))


# In use: the frequencies stay what they are


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_row_gives_the_same_whatever_came_before(name):
    """transformers' dynamic scaling alone goes on with the frequencies of the longest row."""
    model = model_of(scale_rope(config_of(name), "dynamic", LENGTH))
    rows = {length: row(length) for length in (64, 128, 200, 300, 500)}
    alone = {}
    for length, ids in rows.items():
        alone[length] = logits(copy.deepcopy(model), ids)
    hold_frequencies(model)
    for length in (500, 200, 128, 300, 64, 500, 128, 200):
        torch.testing.assert_close(logits(model, rows[length]), alone[length], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_cast_of_the_model_leaves_the_frequencies_in_float32(kind, tmp_path):
    model_of(llama()).save_pretrained(tmp_path)
    arguments = ModelArguments(
        str(tmp_path), dtype="bfloat16", rope_scaling=kind, model_max_length=LENGTH if kind else None
    )
    model = load_causal_lm(arguments, [None] * 64, False).eval()
    ids = row(LENGTH if kind else ORIGINAL)
    before = frequencies(model).clone()
    assert before.dtype == torch.float32
    found = logits(model, ids)
    model.to(torch.float16).to(torch.bfloat16)
    assert frequencies(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, ids), found, rtol=0, atol=0)
    assert frequencies(model).dtype == torch.float32


# Runs


@pytest.fixture(scope="module")
def short_model_dir(tiny_model_dir, tmp_path_factory) -> str:
    """The tiny model, made for 64 positions; rows of the stages in tests/stages.py have up to 128 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_model_dir, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 64}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 64}))
    return str(folder)


def scaled_by(kind: str) -> dict:
    """The setting of a run on the short model with rows of 128."""
    positions = 64 if kind == "dynamic" else 128
    return {
        "rope_type": kind,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": positions,
    }


def stage_of(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def merged(base: str, adapter: Path, folder: Path) -> Path:
    import merge_peft_adapter

    merge_peft_adapter.main(["--base_model", base, "--lora_model", str(adapter), "--output_dir", str(folder)])
    return folder


ONE_STEP = (*LORA, "--max_steps", "1", "--do_train", "True")


@pytest.fixture(scope="module")
def adapters(short_model_dir, sft_file, tmp_path_factory):
    """SFT adapters on the short model by kind (None: not scaled), made when first asked for."""
    made: dict[str | None, Path] = {}

    def run(kind: str | None) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("adapters") / str(kind)
            flags = ("--rope_scaling", kind) if kind else ("--model_max_length", "64")
            run_sft(short_model_dir, sft_file, made[kind], *LORA, *flags, "--max_steps", "3", "--save_steps", "2")
        return made[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_the_setting_travels_from_training_to_merge_and_inference(kind, short_model_dir, adapters, tmp_path):
    adapter = adapters(kind)
    assert stage_of(adapter)["rope"] == stage_of(adapter / "checkpoint-2")["rope"] == scaled_by(kind)
    folder = merged(short_model_dir, adapter, tmp_path / "merged")
    assert stage_of(folder)["rope"] == scaled_by(kind)
    config = AutoConfig.from_pretrained(folder)
    assert rope_setting(config) == scaled_by(kind)

    ids = row(128)
    together, tokenizer = load_for_inference(short_model_dir, str(adapter))
    assert tokenizer.model_max_length == 128
    found = logits(together, ids)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder).eval(), ids), found, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(logits(load_for_inference(str(folder))[0], ids), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load_for_inference(str(adapter))[0], ids), found, rtol=0, atol=0)
    forced, _ = load_for_inference(short_model_dir, str(adapter), rope=RopeRequest(forced=True))
    assert (logits(forced, ids) - found).abs().max() > 1e-3

    # the next stage starts from the merged model: without a flag, or with the same one
    for flags in ({}, {"rope_scaling": kind, "model_max_length": 100}):
        assert rope_setting(load_config(ModelArguments(str(folder), **flags))) == scaled_by(kind)


def test_a_checkpoint_merges_as_the_run_does(short_model_dir, adapters, tmp_path):
    folder = merged(short_model_dir, adapters("linear") / "checkpoint-2", tmp_path / "merged")
    assert rope_setting(AutoConfig.from_pretrained(folder)) == scaled_by("linear")


def test_without_scaling_the_stage_says_so(short_model_dir, adapters):
    assert stage_of(adapters(None))["rope"] is None


def test_an_adapter_meets_a_base_that_it_was_not_trained_on(short_model_dir, adapters, tmp_path):
    scaled = scale_rope(AutoConfig.from_pretrained(short_model_dir), "linear", 128)
    assert config_of_adapter(scaled, adapters("linear")) is scaled
    with pytest.raises(
        InputError, match="trained with no RoPE scaling, and its base has RoPE scaling linear, factor 2"
    ):
        config_of_adapter(scaled, adapters(None))
    with pytest.raises(InputError, match="trained with RoPE scaling yarn.*its base has RoPE scaling linear"):
        config_of_adapter(scaled, adapters("yarn"))
    with pytest.raises(InputError, match="made for 100 positions; give the base model"):
        config_of_adapter(llama(max_position_embeddings=100), adapters("linear"))
    with pytest.raises(InputError, match="trained with RoPE scaling linear.*bloom has no rope_parameters"):
        config_of_adapter(BloomConfig(), adapters("linear"))
    assert config_of_adapter(scaled, tmp_path) is scaled  # no stage.json: of somebody else's


def test_inference_takes_the_setting_of_training(short_model_dir, adapters, capsys):
    import inference

    command = ["--model_name_or_path", short_model_dir, "--lora_model", str(adapters("linear")), "--prompt", "a " * 50]
    command += ["--max_new_tokens", "4"]
    wanted = inference.main(command)
    same = [*command, "--rope_scaling", "linear", "--model_max_length", "128"]
    assert inference.main(same) == wanted
    for other in (["dynamic", "128"], ["linear", "256"]):
        flags = ["--rope_scaling", other[0], "--model_max_length", other[1]]
        with pytest.raises(
            InputError, match=f"--rope_scaling {other[0]}: .*RoPE scaling linear.*--force_rope_scaling"
        ):
            inference.main([*command, *flags])
        assert "answer" in inference.main([*command, *flags, "--force_rope_scaling"])
    with pytest.raises(InputError, match="64 positions"):  # those of the base, which are too few for the prompt
        inference.main([*command, "--force_rope_scaling"])
    with pytest.raises(SystemExit):
        inference.main([*command, "--rope_scaling", "linear"])
    assert "--rope_scaling and --model_max_length go together" in capsys.readouterr().err


def test_inference_on_a_whole_model_is_refused_another_setting(short_model_dir):
    asked = RopeRequest("dynamic", 128)
    with pytest.raises(InputError, match="trained with, no RoPE scaling; leave the flag out, or pass --force_rope"):
        load_for_inference(short_model_dir, rope=asked)
    model, tokenizer = load_for_inference(short_model_dir, rope=RopeRequest("dynamic", 128, forced=True))
    assert rope_setting(model.config) == scaled_by("dynamic")
    assert generate(model, tokenizer, ["a " * 50], [2], Sampling(max_new_tokens=4))
    with pytest.raises(InputError, match="128 positions"):
        generate(model, tokenizer, ["a b " * 70], [2], Sampling(max_new_tokens=4))


def test_a_resumed_run_keeps_the_setting(short_model_dir, sft_file, adapters, tmp_path):
    shutil.copytree(adapters("linear") / "checkpoint-2", tmp_path / "checkpoint-2")
    flags = (*LORA, "--max_steps", "3", "--save_steps", "2", "--resume_from_checkpoint", "True")
    for other in (("--rope_scaling", "dynamic"), ("--model_max_length", "64")):
        with pytest.raises(
            InputError, match="was trained with RoPE scaling linear, factor 2.0, from 64 positions, and"
        ):
            run_sft(short_model_dir, sft_file, tmp_path, *flags, *other)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    run_sft(short_model_dir, sft_file, tmp_path, *flags, "--rope_scaling", "linear")
    assert stage_of(tmp_path)["rope"] == scaled_by("linear")


def test_an_old_adapter_is_trained_on_with_no_less(short_model_dir, adapters):
    from stagewise.modeling.lora import attach_adapter

    def load(path: Path, **flags):
        arguments = ModelArguments(short_model_dir, **flags)
        model = load_causal_lm(arguments, load_tokenizer(arguments), False)
        return attach_adapter(model, LoraArguments(peft_path=str(path)))

    load(adapters(None), rope_scaling="linear", model_max_length=128)
    load(adapters("linear"), rope_scaling="linear", model_max_length=128)
    load(adapters("linear"), rope_scaling="linear", model_max_length=256)
    for flags in ({}, {"rope_scaling": "yarn", "model_max_length": 128}):
        with pytest.raises(InputError, match="--peft_path .*: was trained with RoPE scaling linear, factor 2.0"):
            load(adapters("linear"), **flags)


def test_all_weights_carry_the_setting_in_their_configuration(short_model_dir, text_file, tmp_path):
    run_pt(
        short_model_dir,
        text_file,
        tmp_path / "pt",
        *FULL,
        "--block_size",
        "128",
        "--rope_scaling",
        "linear",
        "--max_steps",
        "1",
    )
    assert rope_setting(AutoConfig.from_pretrained(tmp_path / "pt")) == scaled_by("linear")
    assert stage_of(tmp_path / "pt")["rope"] == scaled_by("linear")
    assert load_tokenizer(ModelArguments(str(tmp_path / "pt"))).model_max_length == 128
    # on with the model's own scaling
    run_pt(str(tmp_path / "pt"), text_file, tmp_path / "on", *ONE_STEP, "--block_size", "128")
    assert stage_of(tmp_path / "on")["rope"] == scaled_by("linear")


def test_pretraining_has_a_row_and_a_target(short_model_dir, text_file, tmp_path):
    flags = (*ONE_STEP, "--rope_scaling", "linear")
    run_pt(short_model_dir, text_file, tmp_path / "pt", *flags, "--model_max_length", "256")  # rows of 64
    assert stage_of(tmp_path / "pt")["rope"]["factor"] == 4.0
    with pytest.raises(InputError, match="--block_size 128: more than --model_max_length 100"):
        run_pt(short_model_dir, text_file, tmp_path / "o", *flags, "--model_max_length", "100", "--block_size", "128")
    import pretraining

    with pytest.raises(InputError, match="^--rope_scaling linear: needs --model_max_length"):
        pretraining.main(
            ["--model_name_or_path", short_model_dir, "--train_file_dir", text_file, "--rope_scaling", "linear",
             "--output_dir", str(tmp_path / "o")]
        )  # fmt: skip
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def reward_adapters(short_model_dir, preference_file, tmp_path_factory):
    made: dict[str | None, Path] = {}
    for kind in ("linear", None):
        made[kind] = tmp_path_factory.mktemp("rewards") / str(kind)
        flags = ("--rope_scaling", kind) if kind else ("--max_length", "64")
        run_rm(short_model_dir, preference_file, made[kind], *ONE_STEP, *flags)
    return made


def test_a_reward_model_is_scaled_merged_and_scores(short_model_dir, reward_adapters, tmp_path):
    adapter = reward_adapters["linear"]
    assert stage_of(adapter)["rope"] == scaled_by("linear")
    folder = merged(short_model_dir, adapter, tmp_path / "merged")
    texts = ["a b " * 25, "c " * 50]
    together, tokenizer = load_for_inference(short_model_dir, str(adapter), scores=True)
    whole, _ = load_for_inference(str(folder), scores=True)
    assert rope_setting(whole.config) == scaled_by("linear")
    assert score(together, tokenizer, texts) == pytest.approx(score(whole, tokenizer, texts), abs=1e-4)
    with pytest.raises(InputError, match="128 positions"):
        score(together, tokenizer, ["a b " * 70])


def ppo(model_dir: str, sft_file: str, output_dir: Path, *flags: str) -> None:
    import ppo_training

    ppo_training.main(
        ["--model_name_or_path", model_dir, "--train_file_dir", sft_file, "--output_dir", str(output_dir),
         "--template_name", "chatml", "--max_new_tokens", "8", "--per_device_train_batch_size", "2",
         "--num_ppo_epochs", "1", "--max_steps", "1", "--completions_steps", "0", "--do_train", "True", *LORA, *flags]
    )  # fmt: skip


def test_ppo_has_one_setting_for_all_on_one_base(short_model_dir, reward_adapters, sft_file, tmp_path):
    scaled = ("--rope_scaling", "linear", "--max_prompt_length", "120")  # and 8 new tokens
    for reward, flags in ((None, scaled), ("linear", ("--max_prompt_length", "56"))):
        with pytest.raises(InputError, match="--reward_model_path .*: was trained with .*, on whose base it is, has"):
            ppo(short_model_dir, sft_file, tmp_path / "o", "--reward_model_path", str(reward_adapters[reward]), *flags)
    assert not (tmp_path / "o").exists()
    ppo(short_model_dir, sft_file, tmp_path / "o", "--reward_model_path", str(reward_adapters["linear"]), *scaled)
    assert stage_of(tmp_path / "o")["rope"] == scaled_by("linear")


def test_a_reward_model_of_its_own_must_hold_the_rows(short_model_dir, reward_adapters, sft_file, tmp_path):
    own = merged(short_model_dir, reward_adapters[None], tmp_path / "rm")
    flags = ("--reward_model_path", str(own), "--rope_scaling", "linear", "--max_prompt_length", "120")
    long = tmp_path / "long.jsonl"
    turn = [{"from": "human", "value": "why not? " * 12}, {"from": "gpt", "value": "?"}]
    long.write_text((json.dumps({"conversations": turn}) + "\n") * 8)
    with pytest.raises(InputError, match="was made for 64 positions, and a prompt with its answer may have 128"):
        ppo(short_model_dir, str(long), tmp_path / "o", *flags)


def test_references_and_value_models_are_scaled_as_the_policy(short_model_dir, tiny_model_dir):
    arguments = ModelArguments(short_model_dir, rope_scaling="yarn", model_max_length=128)
    tokenizer = load_tokenizer(arguments)
    reference = load_reference(arguments, tokenizer, None, True)
    other = load_reference(arguments, tokenizer, short_model_dir, False)
    reward = load_reward_model(arguments, tokenizer, False)
    actor = load_actor_critic(arguments, LoraArguments(use_peft=False), tokenizer, 1.0)
    for model in (reference, other, reward, actor.base, actor.reference, actor.value_model):
        assert rope_setting(model.config) == scaled_by("yarn")
    whole = ModelArguments(tiny_model_dir, model_max_length=1000)
    with pytest.raises(
        InputError, match="--ref_model_name_or_path .*: was made for 64 positions, and rows have up to 1"
    ):
        load_reference(whole, tokenizer, short_model_dir, False)


def test_dpo_runs_scaled(short_model_dir, preference_file, tmp_path):
    import dpo_training

    for mode in (LORA, FULL):
        output = tmp_path / str(len(mode))
        dpo_training.main(
            ["--model_name_or_path", short_model_dir, "--train_file_dir", preference_file, "--output_dir", str(output),
             "--template_name", "chatml", "--max_length", "128", "--rope_scaling", "dynamic", "--max_steps", "1",
             "--per_device_train_batch_size", "4", "--do_train", "True", *mode]
        )  # fmt: skip
        assert stage_of(output)["rope"] == scaled_by("dynamic")


# What it is for


WORDS = ["user", "assistant", "x", *(f"key{i}" for i in range(8)), *(f"door{i}" for i in range(8))]


@pytest.fixture(scope="module")
def needle(tmp_path_factory) -> Path:
    """A llama of one layer for 256 positions, with random weights, its tokenizer, and conversations of 250 tokens:
    a key, many x, and the door that the key opens as the answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("needle")
    special = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        extra_special_tokens=special[3:],
    )  # fmt: skip
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": len(tokenizer), "intermediate_size": 64}
    LlamaConfig(**(SIZES | sizes | {"max_position_embeddings": 256})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"conversations": [{"from": "human", "value": question(i % 8, 250)}, {"from": "gpt", "value": f"door{i % 8}"}]}
        for i in range(64)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def question(key: int, length: int) -> str:
    """A key, and x up to a conversation of `length` tokens (the template and the answer are 7 of them)."""
    return " ".join([f"key{key}"] + ["x"] * (length - 8))


@torch.no_grad()
def door_loss(folder: Path, length: int) -> float:
    """Cross-entropy of the right door behind conversations of `length` tokens, over all keys."""
    model, tokenizer = load_for_inference(str(folder))
    texts = [f"<|im_start|>user\n{question(i, length)}<|im_end|>\n<|im_start|>assistant\n" for i in range(8)]
    ids = torch.tensor(tokenizer([text.replace("<|im", " <|im").replace("|>", "|> ") for text in texts])["input_ids"])
    assert ids.shape[1] == length - 2
    doors = torch.tensor(tokenizer.convert_tokens_to_ids([f"door{i}" for i in range(8)]))
    return torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[:, -1], doors).item()


@pytest.fixture(scope="module")
def short_sighted(needle) -> Path:
    """Trained from random weights on rows of 250 tokens, within its 256 positions."""
    trained = needle.with_name(f"{needle.name}-trained")
    learn(needle, trained, "--config_name", str(needle), "--max_steps", "300", "--learning_rate", "5e-3")
    assert door_loss(trained, 250) < 0.3
    return trained


def learn(needle: Path, output_dir: Path, *flags: str) -> Path:
    import supervised_finetuning

    supervised_finetuning.main(
        ["--train_file_dir", str(needle / "rows.jsonl"), "--tokenizer_name_or_path", str(needle), "--template_name",
         "chatml", "--output_dir", str(output_dir), "--use_peft", "False", "--per_device_train_batch_size", "8",
         "--lr_scheduler_type", "cosine", "--do_train", "True", "--save_strategy", "no", "--report_to", "none",
         "--audit_rows", "0", *flags]
    )  # fmt: skip
    return output_dir


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_model_that_learnt_256_positions_reads_1024(seed, needle, short_sighted, tmp_path):
    """15 steps more on the same short rows, with linear scaling and without; then rows four times as long."""
    flags = (
        "--model_name_or_path",
        str(short_sighted),
        "--max_steps",
        "15",
        "--learning_rate",
        "2e-3",
        "--seed",
        seed,
    )
    with pytest.raises(InputError, match="1024: the model was made for 256 positions"):
        learn(needle, tmp_path / "o", *flags, "--model_max_length", "1024")
    plain = learn(needle, tmp_path / "plain", *flags, "--model_max_length", "256")
    scaled = learn(needle, tmp_path / "scaled", *flags, "--rope_scaling", "linear", "--model_max_length", "1024")
    assert rope_setting(AutoConfig.from_pretrained(scaled))["factor"] == 4.0
    assert door_loss(plain, 250) < 0.3
    assert door_loss(scaled, 250) < 0.3
    assert door_loss(scaled, 1020) < 0.3
    assert door_loss(plain, 1020) > 1.0  # ln 8 = 2.08 is a guess
