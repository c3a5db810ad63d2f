"""Adapters that add trajectory balance to other trainers, and to a training loop of your own (`own_loop`).

Each adapter imports its host library; the rest of the package never imports an adapter. `losses` holds their shared
code: a loss on log-probs, a loss on hidden states, and the group's estimate of log Z.
"""
