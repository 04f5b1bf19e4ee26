"""PPO (arXiv 1707.06347) on the Trainer. One step of the Trainer is one iteration: rollouts, then the updates on them.

An iteration takes num_ppo_epochs * num_mini_batches optimizer steps; all but the last happen before the Trainer's own,
so that checkpoints, schedules, logs and evaluations count iterations. What an iteration does is a function of the
weights, the seed and its number, which makes a resumed run the same as one that was never interrupted.
"""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, speed_metrics

from stagewise.data.collators import LOCATION, encode_locations
from stagewise.errors import InputError, TrainingDiverged
from stagewise.losses import policy_gradient as pg
from stagewise.modeling.actor_critic import ActorCritic
from stagewise.modeling.reward import RewardModel, Scorer
from stagewise.trainers.rollouts import Rollouts, RolloutTimes, collect, gather
from stagewise.trainers.stage import StageTrainerMixin

STATE_FILE = "ppo_state.json"
# What the random numbers of an iteration are for; part of their seed.
SAMPLING, EVALUATION, ORDER = 0, 1, 2
UPDATE_FIGURES = (
    "policy/loss", "value/loss", "policy/approx_kl", "policy/clipfrac", "policy/ratio", "policy/entropy",
    "value/clipfrac",
)  # fmt: skip


@dataclass(frozen=True)
class PPOSettings:
    """The algorithm's numbers; for the names see stagewise.losses.policy_gradient.

    target_kl, kl_horizon: kl_coef is adapted so that the KL nears the target; None keeps it.
    max_approx_kl: the updates of an iteration end after the first one whose approx_kl is above it, and one more.
    max_kl: the run ends where the mean KL of an iteration's completions is above it.
    missing_eos_penalty: taken off the score of a completion without a stop token.
    reward_baseline, score_clip: a score counts as clip(score - baseline, -clip, clip).
    """

    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    target_kl: float | None = None
    kl_horizon: float = 10_000.0
    max_approx_kl: float | None = None
    max_kl: float | None = None
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    score_clip: float | None = None
    reward_baseline: float = 0.0
    missing_eos_penalty: float | None = None

    @classmethod
    def from_arguments(cls, arguments: object) -> "PPOSettings":
        """The fields of the same names; a max_kl of 0 is no limit."""
        settings = cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})
        return settings if settings.max_kl else replace(settings, max_kl=None)


@dataclass
class Experience:
    """Rollouts with what the updates need of them, (N, T) each."""

    rollouts: Rollouts
    advantages: Tensor
    returns: Tensor


class PPOTrainer(StageTrainerMixin, Trainer):
    """Trains an ActorCritic on completions of its own.

    Each iteration takes per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches prompts for each
    process. The processes share out the rollouts, and each then holds all of them: advantages are whitened over the
    whole iteration, and a mini-batch has the same rows however many processes there are.

    Args:
        scorer: gives a score for each completion.
        sampling: how completions are sampled (see stagewise.modeling.generation.sampling_config).
        rollout_batch_size: completions that are generated and evaluated at once by a process.
        total_episodes: completions of the whole run, in place of the Trainer's max_steps.
        train_dataset, eval_dataset: rows with input_ids and text (stagewise.data.prompts).
    """

    def __init__(
        self, *args, settings: PPOSettings, scorer: Scorer, sampling: GenerationConfig, rollout_batch_size: int,
        total_episodes: int | None = None, **kwargs,
    ):  # fmt: skip
        if kwargs["args"].ddp_find_unused_parameters is None:
            kwargs["args"].ddp_find_unused_parameters = False  # every step uses all that is trained
        if total_episodes is not None:
            kwargs["args"].max_steps = math.ceil(total_episodes / _episodes_per_step(kwargs["args"], settings))
        super().__init__(*args, **kwargs)
        self.settings, self.scorer, self.sampling = settings, scorer, sampling
        self.rollout_batch_size = rollout_batch_size
        if isinstance(scorer, RewardModel):
            scorer.to(self.args.device)
        self.kl_coef = settings.kl_coef
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the tokens of the whole mini-batch
        self.rollouts: Rollouts | None = None
        self._locations: list[str] = []  # of the rollouts' prompts
        self._own_step: list[dict] = []  # the micro-batches of the Trainer's own optimizer step
        self._figures: dict[str, list[float]] = {}  # of the iterations since the last log
        self._updates = torch.zeros(len(UPDATE_FIGURES), device=self.args.device)
        self._num_updates = 0
        self._approx_kl_sum = self._last_approx_kl = 0.0
        self._times, self._tokens, self._updates_started = RolloutTimes(0.0, 0.0), (0, 0), 0.0
        self.add_callback(_Iteration(self))

    # ---- how many, and which

    @property
    def actor(self) -> ActorCritic:
        return self.accelerator.unwrap_model(self.model)

    @property
    def episodes_per_step(self) -> int:
        """Completions of one iteration, on all processes."""
        return _episodes_per_step(self.args, self.settings)

    def get_train_dataloader(self) -> DataLoader:
        """As many placeholders as the Trainer has micro-batches to ask for; the rows come from the rollouts."""
        steps = math.ceil(len(self.train_dataset) / self.episodes_per_step)
        return DataLoader(range(steps * self.args.gradient_accumulation_steps), batch_size=None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Empty micro-batches, which begin_iteration fills when the Trainer has restored its random numbers."""
        self._own_step = [{} for _ in range(num_batches)]
        return self._own_step, 1

    def _prompt_rows(self, iteration: int) -> list[int]:
        """The iteration's prompts: the data set in an order of its own in each epoch, without a gap between epochs."""
        size, first = len(self.train_dataset), iteration * self.episodes_per_step
        orders: dict[int, np.ndarray] = {}
        rows = []
        for position in range(first, first + self.episodes_per_step):
            epoch = position // size
            if epoch not in orders:
                shuffled = self.args.train_sampling_strategy == "random"
                generator = np.random.default_rng([self._data_seed, ORDER, epoch])
                orders[epoch] = generator.permutation(size) if shuffled else np.arange(size)
            rows.append(int(orders[epoch][position % size]))
        return rows

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @contextlib.contextmanager
    def _random_numbers(self, purpose: int, iteration: int):
        """Random numbers that depend on nothing but the seed, what they are for, the iteration and the process."""
        device = self.args.device
        devices = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            seed = np.random.SeedSequence([self.args.seed, purpose, iteration, self.args.process_index])
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
            yield

    # ---- rollouts

    def _collect(
        self, dataset, rows: Sequence[int], purpose: int, iteration: int, batch_size: int, with_values: bool
    ) -> tuple[Rollouts, RolloutTimes]:
        """Completions for these rows of a data set, shared out among the processes, on all of them afterwards."""
        mine = list(range(len(rows)))[self.args.process_index :: self.args.world_size]
        mine = mine or [0]  # a process without a row would leave the others waiting
        missing = math.ceil(len(rows) / self.args.world_size) - len(mine)
        mine += mine[:1] * missing
        with self._random_numbers(purpose, iteration), self.accelerator.autocast():
            rollouts, times = collect(
                self.actor, self.scorer, [dataset[rows[i]] for i in mine], mine, self.sampling, batch_size,
                self.args.device, with_values,
            )  # fmt: skip
        return gather(rollouts, self.accelerator, len(rows)), times

    def _scores(self, rollouts: Rollouts) -> Tensor:
        """(N,), with what a missing stop token costs."""
        if self.settings.missing_eos_penalty is None:
            return rollouts.scores
        return rollouts.scores - self.settings.missing_eos_penalty * (~rollouts.finished)

    def _objective(self, rollouts: Rollouts) -> dict[str, float]:
        """Figures of completions, the same on every process."""
        mask, scores = rollouts.mask, self._scores(rollouts)
        kl = pg.kl_estimates(rollouts.logprobs, rollouts.ref_logprobs, mask, self.settings.kl_estimator).sum(1)
        return {
            "scores": scores.mean().item(),
            "scores_std": scores.std(correction=0).item(),
            "kl": kl.mean().item(),
            "entropy": -(rollouts.logprobs * mask).sum(1).mean().item(),
            "non_score_reward": -self.kl_coef * kl.mean().item(),
            "rlhf_reward": (scores - self.kl_coef * kl).mean().item(),
            "response_length": mask.sum(1).float().mean().item(),
            "without_eos": (~rollouts.finished).float().mean().item(),
        }

    def experience(self, rollouts: Rollouts) -> Experience:
        """Advantages and returns of rollouts; see stagewise.losses.policy_gradient for the formulas."""
        settings, mask = self.settings, rollouts.mask
        scores = self._scores(rollouts) - settings.reward_baseline
        if settings.score_clip is not None:
            scores = scores.clamp(-settings.score_clip, settings.score_clip)
        kl = pg.kl_estimates(rollouts.logprobs, rollouts.ref_logprobs, mask, settings.kl_estimator)
        rewards = pg.shape_rewards(scores, kl, mask, self.kl_coef)
        if settings.whiten_rewards:
            rewards = pg.whiten(rewards, mask, shift_mean=False)
        advantages, returns = pg.generalized_advantages(rewards, rollouts.values, mask, settings.gamma, settings.lam)
        return Experience(rollouts, pg.whiten(advantages, mask), returns)

    # ---- one iteration

    def begin_iteration(self) -> None:
        """Rollouts, and all updates but the last, whose micro-batches are left for the Trainer's own step."""
        self.start_clock()
        iteration, settings = self.state.global_step, self.settings
        rows = self._prompt_rows(iteration)
        rollouts, times = self._collect(self.train_dataset, rows, SAMPLING, iteration, self.rollout_batch_size, True)
        self._locations = [self.train_dataset[row][LOCATION] for row in rows]
        objective = self._objective(rollouts)
        self._stop_if_diverged(objective)
        experience = self.experience(rollouts)
        self.rollouts = rollouts
        variance = pg.explained_variance(rollouts.values, experience.returns, rollouts.mask).item()
        self._note({f"objective/{name}": value for name, value in objective.items()})
        self._note({"objective/kl_coef": self.kl_coef, "value/explained_variance": variance})
        self._times = times
        self._tokens = (int(rollouts.mask.sum()), int(rollouts.prompt_length.sum()))
        self._updates_started = time.perf_counter()
        self._last_approx_kl = 0.0
        steps = self._mini_batches(experience, iteration)
        limit = math.inf if settings.max_approx_kl is None else settings.max_approx_kl
        while len(steps) > 1 and self._last_approx_kl <= limit:
            self._update(steps.pop(0))
        for slot, micro_batch in zip(self._own_step, steps[0], strict=True):
            slot.update(micro_batch)
        if settings.target_kl is not None:
            self.kl_coef = pg.adapt_kl_coef(
                self.kl_coef, objective["kl"], settings.target_kl, len(rollouts), settings.kl_horizon
            )

    def _stop_if_diverged(self, objective: dict[str, float]) -> None:
        step = self.state.global_step
        for name in ("scores", "kl"):
            if not math.isfinite(objective[name]):
                raise TrainingDiverged(
                    f"the mean {name} of the completions after step {step} is {objective[name]}", step - 1
                )
        if self.settings.max_kl is not None and objective["kl"] > self.settings.max_kl:
            raise TrainingDiverged(
                f"the mean KL of the completions after step {step} is {objective['kl']:.1f}, above --max_kl "
                f"{self.settings.max_kl}: the policy has left its reference; a smaller --learning_rate or a larger "
                "--kl_coef holds it",
                step - 1,
            )

    def _mini_batches(self, experience: Experience, iteration: int) -> list[list[dict]]:
        """The micro-batches of this process for each optimizer step of the iteration."""
        settings, size = self.settings, self.args.per_device_train_batch_size
        episodes = len(experience.rollouts)
        lengths = (experience.rollouts.prompt_length + experience.rollouts.mask.sum(1)).numpy()
        per_step = episodes // settings.num_mini_batches
        per_process = per_step // self.args.world_size
        steps = []
        for epoch in range(settings.num_ppo_epochs):
            order = np.random.default_rng([self._data_seed, ORDER, iteration, epoch]).permutation(episodes)
            for start in range(0, episodes, per_step):
                rows = order[start : start + per_step]
                count = experience.rollouts.mask[rows].sum()
                mine = rows[self.args.process_index * per_process :][:per_process]
                # rows of like length together: less padding, and the sum over the mini-batch stays what it is
                mine = mine[np.argsort(-lengths[mine], kind="stable")]
                steps.append(
                    [self._micro_batch(experience, mine[i : i + size], count) for i in range(0, per_process, size)]
                )
        return steps

    def _micro_batch(self, experience: Experience, rows: np.ndarray, count: Tensor) -> dict:
        rollouts = experience.rollouts
        width = int(rollouts.mask[rows].sum(1).max())
        batch = rollouts.batch(rows.tolist(), self.sampling.pad_token_id)
        columns = {
            "logprobs": rollouts.logprobs,
            "values": rollouts.values,
            "advantages": experience.advantages,
            "returns": experience.returns,
        }
        return {
            **vars(batch),
            "mask": batch.mask[:, :width],
            **{name: column[rows][:, :width] for name, column in columns.items()},
            "count": count,
            LOCATION: encode_locations([self._locations[row] for row in rows]),
        }

    def _update(self, micro_batches: list[dict]) -> None:
        """One optimizer step, as the Trainer makes its own."""
        gradients = self.accelerator.gradient_state
        own_sync = gradients.sync_gradients
        for i, micro_batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            gradients._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model_wrapped):
                self.training_step(self.model_wrapped, micro_batch, 1)
        grad_norm = self._clip_grad_norm(self.model_wrapped) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.model_wrapped, grad_norm)
        self.optimizer.step()
        self.model_wrapped.zero_grad()
        gradients._set_sync_gradients(own_sync)
        self._close_update()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part that this micro-batch has in its mini-batch's policy loss + vf_coef * value loss."""
        settings, mask, count = self.settings, inputs["mask"], inputs["count"]
        logprobs, values, entropies = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            prompt_length=inputs["prompt_length"], mask=mask,
        )  # fmt: skip
        policy, policy_figures = pg.policy_loss(
            logprobs, inputs["logprobs"], inputs["advantages"], mask, settings.cliprange, count
        )
        value, value_figures = pg.value_loss(
            values, inputs["values"], inputs["returns"], mask, settings.cliprange_value, count
        )
        loss = policy + settings.vf_coef * value
        self._updates += torch.stack(
            [
                policy.detach(), value.detach(), policy_figures.approx_kl, policy_figures.clipfrac,
                policy_figures.ratio, pg.masked_mean(entropies, mask, count), value_figures.clipfrac,
            ]
        )  # fmt: skip
        # the parts of the processes add up to the loss, and what averages them divides once more
        return loss * self.accelerator.num_processes

    def _close_update(self) -> None:
        """After an optimizer step: its approx_kl, where that may end the updates."""
        self._num_updates += 1
        if self.settings.max_approx_kl is not None:
            sums = self.accelerator.reduce(self._updates.clone())
            place = UPDATE_FIGURES.index("policy/approx_kl")
            self._last_approx_kl = sums[place].item() - self._approx_kl_sum
            self._approx_kl_sum = sums[place].item()

    def end_iteration(self) -> None:
        """After the Trainer's own step: the figures of the updates, and where the time went."""
        self._num_updates += 1
        means = (self.accelerator.reduce(self._updates) / self._num_updates).tolist()
        update_s = time.perf_counter() - self._updates_started  # after tolist(), which waits for the device
        self._note(dict(zip(UPDATE_FIGURES, means, strict=True)))
        self._note({"loss": means[0] + self.settings.vf_coef * means[1]})
        sampled, read = self._tokens
        # tokens_per_second in the log: sampled tokens over the time of the whole iteration
        self.count_tokens(torch.tensor(sampled / self.args.world_size, device=self.args.device))
        # every update reads prompts and completions
        trained = (sampled + read) * self._num_updates / self.settings.num_mini_batches
        times = self._times
        rollout_s = times.generate_s + times.evaluate_s
        self._note(
            {
                "rollout/tokens_per_second": sampled / times.generate_s,
                "rollout/time_share": rollout_s / (rollout_s + update_s),
                "rollout/generate_share": times.generate_s / (rollout_s + update_s),
                "update/tokens_per_second": trained / update_s,
            }
        )
        self._updates = torch.zeros_like(self._updates)
        self._num_updates, self._approx_kl_sum = 0, 0.0

    def _note(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value)

    def log(self, logs, start_time=None):
        """Training logs get the means of the iterations since the last one."""
        if "loss" in logs and self._figures:
            for name, values in self._figures.items():
                known = [value for value in values if not math.isnan(value)]
                if known:
                    logs[name] = float(np.mean(known))
            self._figures = {}
            logs["episodes"] = self.state.global_step * self.episodes_per_step
        super().log(logs, start_time)

    def _leave_out_skipped(self, logs: dict[str, float]) -> None:
        """The figures are means over iterations whose updates were all good; an iteration has several updates."""
        _, skipped = self.step_guard.count()
        if skipped:
            logs["skipped_updates"] = skipped

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Scores, KL and lengths of one completion for each held-out prompt, sampled with the same random numbers in
        every evaluation of a run.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        started = time.time()
        rollouts, _ = self._collect(
            dataset, range(len(dataset)), EVALUATION, 0, self.args.per_device_eval_batch_size, False
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._objective(rollouts).items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics

    def samples(self, count: int) -> list[dict]:
        """Some completions of the last rollouts as text, with their scores."""
        if self.rollouts is None:
            return []
        rollouts, decode = self.rollouts, self.processing_class.decode
        kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(1)
        return [
            {
                "step": self.state.global_step,
                "prompt": decode(rollouts.prompt(row)),
                "completion": decode(rollouts.completion(row)),
                "score": round(rollouts.scores[row].item(), 4),
                "kl": round(kl[row].item(), 4),
            }
            for row in range(min(count, len(rollouts)))
        ]

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as any stage saves its result; in a checkpoint also what training needs to go on."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.actor.save_policy(str(folder))
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self.actor.save_value_model(str(folder))
            (folder / STATE_FILE).write_text(json.dumps({"kl_coef": self.kl_coef}) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.actor.load_value_model(resume_from_checkpoint)
        self.actor.load_policy(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_FILE
            if not path.is_file():
                raise InputError(f"{checkpoint}: {STATE_FILE} is missing: it is no checkpoint of PPO")
            self.kl_coef = json.loads(path.read_text(encoding="utf-8"))["kl_coef"]

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Iteration(TrainerCallback):
    """Ties an iteration to the Trainer's step."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_iteration()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_iteration()


def _episodes_per_step(args, settings: PPOSettings) -> int:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * settings.num_mini_batches
    return rows * args.world_size
