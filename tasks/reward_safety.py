"""Train the round's reward model for safety: `reward_safety@v1`; all of it is in tasks/reward.py."""

from tasks.reward import Params, run
from tasks.stage import start

if __name__ == "__main__":
    start(Params, run)
