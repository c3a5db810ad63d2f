"""Adapters that put trajectory balance into other trainers; each imports its host, and nothing here is imported by the
package itself.

`losses` holds what they share: one loss on log-probs, one on hidden states, and the group's estimate of log Z.
"""
