"""Policy, value model, reference and reward model of PPO on one base model in memory.

The base is frozen; policy, value model and reward model are LoRA adapters on it, and the reference is the base with
the adapters off (or a frozen copy of the adapter that the policy started from). Where all weights are trained nothing
can be shared: policy, value model and reference are then three models.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from stagewise.arguments import LoraArguments, ModelArguments
from stagewise.errors import InputError
from stagewise.losses.logprobs import token_logprobs
from stagewise.modeling.loading import load_causal_lm
from stagewise.modeling.lora import attach_adapter, train_language
from stagewise.modeling.precision import Float32Linear
from stagewise.modeling.quantization import Quantization
from stagewise.modeling.randomness import turn_randomness_off
from stagewise.modeling.sharded import shape_of
from stagewise.modeling.token_loss import (
    decoder_of,
    hidden_states_reproduce_logits,
    last_hidden_state,
    logit_transform,
)

logger = logging.getLogger(__name__)

# Names of the adapters. "default" is the one that peft saves in the folder itself, as any other stage's adapter.
POLICY, VALUE, REFERENCE, REWARD = "default", "value_model", "reference", "reward_model"
VALUE_FILE = "value_model.safetensors"


class AdapterSwitch:
    """Says which adapters the layers of a model add to their base weights.

    All layers hold one and the same list, so that a switch costs nothing, and, unlike peft's set_adapter, leaves
    requires_grad alone: in one step the policy and the value model both collect gradients.
    """

    def __init__(self, model: nn.Module):
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.active: list[str] = []
        for layer in model.modules():
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                layer._active_adapter = self.active

    @contextmanager
    def use(self, *names: str) -> Iterator[None]:
        """Within it these adapters are on; none is the bare base."""
        before = tuple(self.active)
        self.active[:] = names
        try:
            yield
        finally:
            self.active[:] = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: what is computed again in backward, is with the same adapters."""
        return nullcontext(), self.use(*self.active)


@dataclass
class CompletionBatch:
    """Prompts with their completions, as a model reads them.

    input_ids: (B, L), prompt and completion without a gap, padded on the right.
    attention_mask: (B, L), 0 at the padding.
    prompt_length: (B,), where the completion starts.
    mask: (B, T) bool, True at the tokens of the completion; T is at least the longest completion.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "CompletionBatch":
        return CompletionBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @property
    def source(self) -> Tensor:
        """(B, T), the position whose output predicts each token of the completion; of padding, any position."""
        steps = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (self.prompt_length[:, None] - 1 + steps).clamp(max=self.input_ids.shape[1] - 1)

    @property
    def labels(self) -> Tensor:
        """(B, T), the tokens of the completion; at padding, any."""
        return self.input_ids.gather(1, (self.source + 1).clamp(max=self.input_ids.shape[1] - 1))


def completion_batch(prompts: list[list[int]], completions: list[list[int]], pad_token_id: int) -> CompletionBatch:
    """Rows of ids as a batch; each prompt and each completion has a token at least."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    answers = torch.tensor([len(completion) for completion in completions])
    return CompletionBatch(
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long(),
        prompt_length=torch.tensor([len(prompt) for prompt in prompts]),
        mask=torch.arange(int(answers.max()))[None] < answers[:, None],
    )


class ActorCritic(nn.Module):
    """Policy and value model in one module, so that one forward and one backward train both.

    Args:
        policy: a PeftModel whose only adapter is the policy's, or a model of which every weight is trained.
        value_model: None to put a value adapter on the policy's base; otherwise the decoder of a causal LM, which is
            trained whole.
        reference: None where the policy's base (or its adapter as it is now) is the reference; otherwise a model of
            its own, which is frozen.
        keeps_adapter: a frozen copy of the policy's adapter is the reference, and not the bare base.
        temperature: of sampling; log-probabilities are those of the distribution that is sampled from.

    Raises:
        InputError: a policy that is trained whole without models of their own for value and reference.
    """

    def __init__(
        self,
        policy: nn.Module,
        value_model: PreTrainedModel | None = None,
        reference: PreTrainedModel | None = None,
        keeps_adapter: bool = False,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.shares_base = hasattr(policy, "peft_config")
        if not self.shares_base and (value_model is None or reference is None):
            raise InputError("a policy that is trained whole needs a value model and a reference of their own")
        self.policy = policy
        self.base: PreTrainedModel = policy.get_base_model() if self.shares_base else policy
        self.value_model = value_model
        self.reference = reference
        self.temperature = temperature
        self.config = self.base.config
        if self.shares_base:
            _add_value_adapter(policy)
            if keeps_adapter:
                _add_reference_adapter(policy)
        self._reference_adapters = (REFERENCE,) if keeps_adapter else ()
        self._transform = logit_transform(self.config)
        self._chunked = hidden_states_reproduce_logits(self.base)
        # V = 0 at the start: the first advantages are those of the rewards alone, not of a random head
        self.value_head = Float32Linear(self._state_width(), 1, device=self.base.get_input_embeddings().weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.share_adapters()

    def get_input_embeddings(self) -> nn.Module:
        """Where text comes in, under the name that models of transformers have for it."""
        return self.base.get_input_embeddings()

    def _state_width(self) -> int:
        """Of the decoder's last hidden states: what the head reads, which in OPT-350m is not hidden_size."""
        if self._chunked:
            return shape_of(self.base.get_output_embeddings().weight)[-1]
        return self.config.get_text_config().hidden_size

    def share_adapters(self) -> None:
        """To be called after adapters were added: all layers follow one switch; policy and value model are trained."""
        self.adapters = AdapterSwitch(self.policy)
        if not self.shares_base:
            return
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(any(f".{adapter}" in name for adapter in (POLICY, VALUE)))
        # the value model has no use for a head over the vocabulary, so what is on it would never get a gradient
        for name, parameter in self.base.get_output_embeddings().named_parameters():
            if f".{VALUE}" in name:
                parameter.requires_grad_(False)

    def start_value_at_reward(self, score_head: nn.Module) -> None:
        """The value model begins as the reward model, the adapter REWARD with this head (as in InstructGPT, arXiv
        2203.02155): values of a half-written answer are then what it would score if it ended there.
        """
        from peft.utils.other import ModulesToSaveWrapper

        config = copy.deepcopy(self.policy.peft_config[REWARD])
        config.modules_to_save, config.inference_mode = None, False
        config.lora_dropout = self.policy.peft_config[POLICY].lora_dropout
        self.policy.set_adapter(POLICY)  # peft deletes none where none is on
        self.policy.delete_adapter(VALUE)
        self.policy.add_adapter(VALUE, config)
        for module in self.policy.modules():
            if isinstance(module, ModulesToSaveWrapper) and REWARD in module.modules_to_save:
                # an embedding that the reward model has of its own: shared by the two, and frozen
                module.modules_to_save[VALUE] = module.modules_to_save[REWARD]
                module.update(VALUE)
        parameters = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if f".{VALUE}" in name:
                    parameter.copy_(parameters[name.replace(f".{VALUE}", f".{REWARD}")])
            self.value_head.weight.copy_(score_head.weight)
        self.share_adapters()

    def _with(self, adapter: str) -> AbstractContextManager:
        return self.adapters.use(adapter) if self.shares_base else nullcontext()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs, values, entropies), (B, T) each, fp32, 0 outside the mask; see CompletionBatch.

        values[:, t] is the value before token t: that of the position which predicts it.
        """
        batch = CompletionBatch(input_ids, attention_mask, prompt_length, mask)
        with self._with(POLICY):
            logprobs, entropies = self._logprobs(self.base, batch, POLICY)
        with self._with(VALUE):
            decoder = decoder_of(self.base) if self.value_model is None else self.value_model
            hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        values = _scatter(self.value_head(_gather_states(hidden, batch)[mask]).squeeze(-1), mask)
        return logprobs, values, entropies

    def policy_logprobs(self, batch: CompletionBatch) -> Tensor:
        """(B, T), fp32, 0 outside the mask: what forward gives, without the value model."""
        with self._with(POLICY):
            return self._logprobs(self.base, batch, POLICY)[0]

    def reference_logprobs(self, batch: CompletionBatch) -> Tensor:
        """(B, T), fp32, 0 outside the mask."""
        if self.reference is not None:
            return self._logprobs(self.reference, batch, None)[0]
        with self.adapters.use(*self._reference_adapters):
            return self._logprobs(self.base, batch, *self._reference_adapters)[0]

    def _logprobs(self, model: PreTrainedModel, batch: CompletionBatch, *adapters: str | None):
        """Log-probabilities and entropies of the completions, with the adapters that are on."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._chunked:
            states = _gather_states(last_hidden_state(model, **inputs), batch)
            output_layer, transform = model.get_output_embeddings(), self._transform

            def head(hidden: Tensor) -> Tensor:
                # also when a chunk is computed again in backward, when other adapters may be on
                with self.adapters.use(*(name for name in adapters if name)):
                    logits = output_layer(hidden)
                return logits if transform is None else transform(logits)

            logprobs, entropies = token_logprobs(
                states[batch.mask],
                head,
                batch.labels[batch.mask],
                self.config.get_text_config().vocab_size,
                self.temperature,
            )
        else:
            logits = _gather_states(model(**inputs, use_cache=False).logits, batch)[batch.mask]
            logprobs, entropies = token_logprobs(
                logits, nn.Identity(), batch.labels[batch.mask], logits.shape[-1], self.temperature
            )
        return _scatter(logprobs, batch.mask), _scatter(entropies, batch.mask)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig) -> Tensor:
        """Sample from the policy, with the cache; returns what follows the prompts, (B, up to max_new_tokens).

        Prompts are padded on the left. `config` alone decides: what the model's own generation_config.json asks for
        (a repetition penalty, top-k) would make samples of another distribution than the log-probabilities are of.
        """
        own = self.base.generation_config
        self.base.generation_config = config
        try:
            with self._with(POLICY):
                output = self.base.generate(
                    input_ids=input_ids, attention_mask=attention_mask, generation_config=config
                )
        finally:
            self.base.generation_config = own
        return output[:, input_ids.shape[1] :]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options: object
    ) -> None:
        """The Trainer calls it. Layers that are computed again in backward see the adapters of their forward."""
        given = dict(activation_checkpointing_kwargs or {})
        if given.pop("use_reentrant", False):
            raise InputError(
                "--gradient_checkpointing_kwargs: use_reentrant would compute layers again with the wrong adapter; "
                "leave it out"
            )
        settings = given | {"use_reentrant": False, "context_fn": lambda: self.adapters.checkpoint_contexts()}
        for model in (self.base, self.value_model):
            if model is not None:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable(settings, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, **options: object
    ) -> None:
        """Its name before transformers 5.20."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def save_policy(self, folder: str) -> None:
        """The policy as every other stage writes its result: an adapter, or a whole model."""
        if self.shares_base:
            self.policy.save_pretrained(folder, selected_adapters=[POLICY])
        else:
            self.policy.save_pretrained(folder)

    def load_policy(self, folder: str) -> None:
        """The policy's weights from a folder that save_policy wrote."""
        if not self.shares_base:
            saved = type(self.base).from_pretrained(folder, dtype=self.base.dtype)
            self.base.load_state_dict(saved.state_dict())
            return
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(folder, device=str(self.value_head.weight.device))
        set_peft_model_state_dict(self.policy, weights, adapter_name=POLICY)

    def save_value_model(self, folder: str) -> None:
        """Everything of the value model that is trained, as VALUE_FILE."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._value_parameters().items()}
        save_file(tensors, Path(folder) / VALUE_FILE)

    def load_value_model(self, folder: str) -> None:
        """Raises InputError where the file is missing or of another value model."""
        path = Path(folder) / VALUE_FILE
        if not path.is_file():
            raise InputError(f"{folder}: {VALUE_FILE} is missing, so training cannot go on from there")
        tensors, parameters = load_file(path), self._value_parameters()
        if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
            raise InputError(f"{path}: is of another value model; check --use_peft, --lora_rank and --target_modules")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _value_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and (f".{VALUE}" in name or name.startswith(("value_model.", "value_head.")))
        }

    def weights_gib(self) -> dict[str, float]:
        """Memory of the weights by what they are for: base, policy, value_model, reference, reward_model."""
        sizes = dict.fromkeys(("base", "policy", "value_model", "reference", "reward_model"), 0)
        for name, parameter in self.named_parameters():
            size = parameter.numel() * parameter.element_size()
            sizes[self._owner(name)] += size
        return {owner: size / 2**30 for owner, size in sizes.items()}

    def _owner(self, name: str) -> str:
        for owner, prefix in (("value_model", "value_"), ("reference", "reference.")):
            if name.startswith(prefix):
                return owner
        for owner, adapter in (("value_model", VALUE), ("reference", REFERENCE), ("reward_model", REWARD)):
            if f".{adapter}" in name:
                return owner
        return "policy" if f".{POLICY}" in name else "base"


def _add_value_adapter(policy) -> None:
    """An adapter of the policy's shape that starts at nothing; what the policy trains whole it does not copy."""
    config = copy.deepcopy(policy.peft_config[POLICY])
    config.inference_mode = False
    # modules_to_tie: peft's own note of what belongs to modules_to_save
    for name in ("modules_to_save", "modules_to_tie", "trainable_token_indices"):
        setattr(config, name, None)
    policy.add_adapter(VALUE, config)


def _add_reference_adapter(policy) -> None:
    """A frozen copy of the policy's adapter. peft's load_adapter would leave a tied head without its new embedding."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(policy.peft_config[POLICY])
    config.inference_mode = True
    policy.add_adapter(REFERENCE, config)
    weights = get_peft_model_state_dict(policy, adapter_name=POLICY, save_embedding_layers=False)
    set_peft_model_state_dict(policy, weights, adapter_name=REFERENCE)


def _gather_states(hidden: Tensor, batch: CompletionBatch) -> Tensor:
    """(B, L, D) -> (B, T, D): the states that predict the completion's tokens."""
    index = batch.source[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the mask's tokens -> (B, T), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def load_actor_critic(
    args: ModelArguments,
    lora_args: LoraArguments,
    tokenizer,
    temperature: float,
    quantization: Quantization | None = None,
) -> ActorCritic:
    """Policy, value model and reference: adapters on one base, or, with --use_peft False, three models.

    Raises:
        InputError: as load_causal_lm and attach_adapter.
    """
    policy = load_causal_lm(args, tokenizer, not lora_args.use_peft, token_loss=False, quantization=quantization)
    turn_randomness_off(policy)  # answers are sampled without it, and what the updates see are ratios to those
    if lora_args.use_peft:
        policy = attach_adapter(policy, lora_args)
        return ActorCritic(policy, keeps_adapter=bool(lora_args.peft_path), temperature=temperature)
    logger.info("--use_peft False: policy, value model and reference are three models in memory")
    attach_adapter(policy, lora_args)
    start = load_causal_lm(args, tokenizer, True, token_loss=False)
    train_language(start)
    value_model = decoder_of(start)
    turn_randomness_off(value_model)
    reference = load_causal_lm(args, tokenizer, True, token_loss=False).requires_grad_(False).eval()
    return ActorCritic(policy, value_model, reference, temperature=temperature)


def log_memory(actor: ActorCritic, scorer: object) -> None:
    """Say what the weights take, beside what four models of the policy's size would."""
    sizes = actor.weights_gib()
    sizes["reward_model"] += getattr(scorer, "weights_gib", 0.0)
    parts = ", ".join(f"{owner} {size:.3f}" for owner, size in sizes.items() if size)
    logger.info(
        "weights in memory, GiB: %s; in all %.3f, where four models would take %.3f",
        parts,
        sum(sizes.values()),
        4 * sizes["base"],
    )
