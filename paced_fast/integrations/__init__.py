"""Adapters that add trajectory balance to other trainers.

Each adapter imports its host library; the rest of the package never imports an adapter. `losses` holds their shared
code: a loss on log-probs, a loss on hidden states, and the group's estimate of log Z.
"""
