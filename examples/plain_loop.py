"""A plain PyTorch policy-gradient loop, and the ten lines that turn its loss into trajectory balance.

A GRU learns to count down: after the prompt n it should answer n, n - 1, ..., 0 and stop. The reward of an answer is
the share of it that is right. Needs torch and `paced_kernels`, nothing else:

    PYTHONPATH=kernels python examples/plain_loop.py
    PYTHONPATH=kernels python examples/plain_loop.py --loss reinforce

Look for BEFORE and AFTER in `train`. The same lines fit a transformer: `hidden` is what its last layer returns, and
`head` its `lm_head`. For vocabularies of real models `trajectory_balance_loss` never holds the [T, V] logits.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paced_kernels import trajectory_balance_loss

LARGEST = 5  # prompts are 0 .. LARGEST, and so are the tokens of answers
STOP = LARGEST + 1
VOCAB_SIZE = LARGEST + 2
MAX_LENGTH = LARGEST + 3


class Policy(nn.Module):
    """Token ids [B, L] and a state to hidden states [B, L, H] and the next state."""

    def __init__(self, hidden_size: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, VOCAB_SIZE, bias=False)

    def forward(self, token_ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(self.embedding(token_ids), state)


class Rollouts(NamedTuple):
    """Answers to B prompts, packed without padding."""

    prompts: Tensor  # [B]
    inputs: Tensor  # [B, L], prompt and answer, padded
    is_token: Tensor  # [B, L], True where the next token belongs to the answer
    token_ids: Tensor  # [T]
    cu_seqlens: Tensor  # [B + 1], answer i is token_ids[cu_seqlens[i]:cu_seqlens[i + 1]]
    old_logprobs: Tensor  # [T], of the policy that sampled
    rewards: Tensor  # [B]


@torch.no_grad()
def sample(policy: Policy, batch_size: int) -> Rollouts:
    """Answers drawn from the policy until each has stopped."""
    prompts = torch.randint(0, LARGEST + 1, (batch_size,))
    token, state = prompts, None
    tokens, logprobs, alive = [], [], [torch.ones(batch_size, dtype=torch.bool)]
    for _ in range(MAX_LENGTH):
        hidden, state = policy(token[:, None], state)
        table = policy.head(hidden[:, -1]).log_softmax(-1)
        token = torch.multinomial(table.exp(), 1)[:, 0]
        tokens.append(token)
        logprobs.append(table.gather(1, token[:, None])[:, 0])
        alive.append(alive[-1] & (token != STOP))
    answers, is_token = torch.stack(tokens, 1), torch.stack(alive[:-1], 1)
    right = torch.stack([(prompts - i).clamp(min=-1) % VOCAB_SIZE for i in range(MAX_LENGTH)], 1)  # -1 is STOP
    lengths = is_token.sum(1)
    num_right = ((answers == right) & is_token).cumprod(1).sum(1)
    return Rollouts(
        prompts=prompts,
        inputs=torch.cat([prompts[:, None], answers[:, :-1]], 1),
        is_token=is_token,
        token_ids=answers[is_token],
        cu_seqlens=nn.functional.pad(lengths.cumsum(0), (1, 0)),
        old_logprobs=torch.stack(logprobs, 1)[is_token],
        rewards=num_right / (prompts + 2).maximum(lengths),
    )


def train(loss_name: str, steps: int, beta: float = 0.2) -> list[float]:
    """The loop; returns the mean reward of every step."""
    policy = Policy()
    log_z = nn.Parameter(torch.zeros(LARGEST + 1))  # one number per prompt: beta * log_z predicts its mean reward
    optimizer = torch.optim.Adam([{"params": policy.parameters(), "lr": 1e-2}, {"params": [log_z], "lr": 0.5}])
    history = []
    for step in range(steps):
        rollouts = sample(policy, batch_size=128)
        hidden = policy(rollouts.inputs)[0][rollouts.is_token]  # [T, H]

        if loss_name == "reinforce":
            # ---- BEFORE: policy gradient from full logits --------------------------------------------------------
            logprobs = policy.head(hidden).log_softmax(-1).gather(1, rollouts.token_ids[:, None])[:, 0]
            lengths = rollouts.cu_seqlens.diff()
            seq_logprobs = torch.stack([part.sum() for part in logprobs.split(lengths.tolist())])
            loss = -((rollouts.rewards - rollouts.rewards.mean()) * seq_logprobs).mean()
            # ---- end of BEFORE -----------------------------------------------------------------------------------
        else:
            # ---- AFTER: trajectory balance from hidden states ----------------------------------------------------
            loss = trajectory_balance_loss(
                hidden,
                policy.head.weight,
                rollouts.token_ids,
                rollouts.cu_seqlens,
                rewards=rollouts.rewards,
                log_z=log_z[rollouts.prompts],
                beta=beta,
                ref_logprobs=rollouts.old_logprobs,
            ).loss
            # ---- end of AFTER ------------------------------------------------------------------------------------

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        history.append(rollouts.rewards.mean().item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}  reward {history[-1]:.3f}  loss {loss.item():8.3f}")
    return history


def main() -> None:
    """Train, and say how far the reward came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["trajectory_balance", "reinforce"], default="trajectory_balance")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    history = train(options.loss, options.steps)
    first, last = (sum(part) / len(part) for part in (history[:10], history[-10:]))
    print(f"mean reward of the first ten steps {first:.3f}, of the last ten {last:.3f}")


if __name__ == "__main__":
    main()
