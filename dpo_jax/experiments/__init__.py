"""The paper's controlled experiment (section 6.1; figure 2, left): the reward of each method against its KL.

- `frontier`: trains every method at several strengths and measures it; figure 2, left.
- `setup`, `world`: reference, prompts and pairs (appendix C.1), shared by all runs; estimates of reward and KL.
- `points`: the file of measurements, their means over seeds and differences between methods.
- `offline`: DPO, unlikelihood and Preferred-FT, the methods of figure 2 that train on pairs.
- `ppo`, `ppo_parts`: PPO and PPO-GT, the methods of figure 2 that train on samples of the policy; `reward_model`: the
  learned reward of PPO.
- `online`: DPO on samples of the policy, an addition to the figure; `rollouts`: sampling for it and for PPO.
- `leaderboard`, `standings`: every loss, under noisy labels, in worlds whose optimum is known (`table_world`);
  `kept_paths`: its finished parts; `fitted`: the reward that a loss fits, and its calibration.
- `optimum`: the exact optimum (equation 4), an upper bound in the figure, and the best of N (figure 4).
"""
