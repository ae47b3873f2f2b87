"""Post-training loops: SFT, reward models, rejection sampling, DPO, PPO, evaluation; settings of each."""
