"""PACED-RL (arXiv 2602.12642): the scheduler, log Z, replay, the losses and one step of training."""
