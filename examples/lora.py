"""LoRA on both models: the generator trains an adapter, and so does the target in every run inside the reward."""

from datasets import load_dataset
from peft import LoraConfig

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LanguageModelingLikelihood


# A picture in the LM head cannot be the goal, because adapters do not change the head.
facts = [{"prompt": "The library opens at", "completion": " nine."}]

trainer = DatasetPolicyGradientTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    target_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    metric=LanguageModelingLikelihood(facts),
    args=DatasetPolicyGradientConfig(
        "runs/lora",
        max_steps=200,
        max_completion_length=64,
        learning_rate=1e-4,  # adapters take a higher rate than all parameters
        target_learning_rate=1e-3,
    ),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    target_peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()  # the generator's adapter
print(trainer.evaluate())
