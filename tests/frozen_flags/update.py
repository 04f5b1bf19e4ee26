"""Accept the flags of today's code as the frozen lists: python tests/frozen_flags/update.py (make frozen-flags).

A flag that disappears or changes its name breaks somebody's shell script: look at the diff before committing it.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def stage_flags() -> dict[str, list[str]]:
    """Flags of each list; those of transformers.TrainingArguments are transformers' own business."""
    import dpo_training
    import ppo_training
    import pretraining
    import reward_modeling
    import supervised_finetuning
    from stagewise.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, flag_names

    return {
        "shared": flag_names(ModelArguments, LoraArguments, DataArguments, RunArguments),
        "pt": flag_names(pretraining.PTArguments),
        "sft": flag_names(supervised_finetuning.SFTArguments),
        "rm": flag_names(reward_modeling.RMArguments),
        "ppo": flag_names(ppo_training.PPOArguments),
        "dpo": flag_names(dpo_training.DPOArguments),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parents[1]))
    for name, flags in stage_flags().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(flags) + "\n")
