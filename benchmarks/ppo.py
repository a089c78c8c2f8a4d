"""A whole PPO update against the experimental PPOTrainer of TRL 1.9.0: generation, scoring, critic, update and sync.

    python -m benchmarks.ppo [--prompts 12] [--new 64] [--rounds 5]

TRL 1.16 has no PPO any more; that of 1.9.0 is unmaintained. It lies in a folder of its own, so that the
trainers stay on the version that they are made for. Both train the policy and a separate critic (LoRA rank 16, float32)
with the same reward model, prompts, learning rate and numbers of tokens, one answer a prompt, one epoch, one minibatch;
TRL without gradient checkpointing. Answers have equal lengths: TRL always generates the longest. See benchmarks.rl for
the keys. Prints a table and writes build/bench/ppo.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.report import base_model, command_line, heading, write
from benchmarks.rl import ALPHA, KL, RANK, Timer, Work, compare, show, trl_options, turns

PEER = "trl==1.9.0"
PEER_FOLDER = Path("build/bench/trl-1.9.0").absolute()


def install_peer() -> None:
    if not PEER_FOLDER.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEER_FOLDER), PEER]
        subprocess.run(pip, check=True)


def trl_worker(pipe: Connection, work: Work) -> None:
    """Makes one update for every message; answers with seconds by phase."""
    sys.path.insert(0, str(PEER_FOLDER))
    import torch
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(work.threads)
    # TRL takes every pad token for padding; the model's own one ends each turn of a prompt.
    tokenizer = AutoTokenizer.from_pretrained(work.folder, padding_side="left", pad_token="<|endoftext|>")
    policy = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    assert work.reward_model is not None
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(work.reward_model, dtype=torch.float32) for _ in range(2)
    )
    lora: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA}
    projections = [name for name, module in critic.model.named_modules() if isinstance(module, torch.nn.Linear)]
    inject_adapter_in_model(LoraConfig(target_modules=projections, **lora), critic.model)
    timer = Timer()

    prompts = [
        {"input_ids": tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)}
        for one in work.messages()
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model=policy,
            ref_model=None,  # the policy without its adapter
            reward_model=reward,
            value_model=critic,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(prompts),
            eval_dataset=Dataset.from_list(prompts),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora),
            callbacks=[turns(pipe, timer, work.steps)],
            args=PPOConfig(
                **trl_options(folder),
                per_device_train_batch_size=work.prompts,
                local_rollout_forward_batch_size=work.prompts,
                total_episodes=work.prompts * work.steps,
                num_ppo_epochs=1,
                num_mini_batches=1,
                num_sample_generations=0,
                response_length=max(work.lengths),
                kl_coef=KL,
            ),
        )
        timer.wrap(trainer.policy_model, "generate", "generate")
        trainer.train()


def main() -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parser = command_line(__doc__, "ppo", rounds=5, model=True)
    parser.add_argument("--prompts", type=int, default=12, help="prompts an update, one answer each")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    install_peer()
    folder = base_model(arguments)
    limits = common.ceilings()
    with tempfile.TemporaryDirectory() as reward_model:
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).save_pretrained(
            reward_model
        )
        AutoTokenizer.from_pretrained(folder).save_pretrained(reward_model)
        lengths = [arguments.new] * arguments.prompts
        work = Work(folder, arguments.prompts, lengths, arguments.threads, arguments.rounds + 1, 1, Path(reward_model))
        result = compare("ppo", work, arguments.rounds, trl_worker)
    show(f"PPO against {PEER}", result)
    print("ceilings", limits)
    write({**heading(arguments.threads), "peer": PEER, "ceilings": limits, **result}, arguments.out)


if __name__ == "__main__":
    main()
