"""From a GRPO script: new lines are marked. The script's own reward stays beside the metagradient, with a small weight."""

from datasets import load_dataset

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer  # new, for TRL's GRPO classes
from trl_dpg.metrics import LMHeadPattern  # new


def brevity(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


trainer = DatasetPolicyGradientTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=brevity,
    target_model="openai-community/gpt2",  # new
    metric=LMHeadPattern.sixty_seven(),  # new
    args=DatasetPolicyGradientConfig(
        output_dir="runs/from_grpo",
        per_device_train_batch_size=64,  # now the target's data set as well
        num_generations=8,
        max_completion_length=64,
        learning_rate=1e-6,
        target_learning_rate=5e-6,  # new
        target_untie_lm_head=True,  # new
        reward_weights=[1.0, 0.01],  # new: the metagradient comes first
    ),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
)
trainer.train()
print(trainer.evaluate())  # validation: the metric of a target that was fine-tuned on answers to held-out prompts
